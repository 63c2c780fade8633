"""Figures of what networks see: every sure box where it is, disagreements marked, masks in their colours."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from pdiff_lib import plots

X = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


def boxes(fig, row, col, columns=2):
    """Lines in one picture: (left, top, right, lower edge), label, bold."""
    axis = (row - 1) * columns + col
    name = "x" if axis == 1 else f"x{axis}"
    return [((t.x[0] + 0.5, t.y[0] + 0.5, t.x[1] + 0.5, t.y[2] + 0.5), t.text[0], t.line.width > 2) for t in fig.data
            if t.type == "scatter" and t.xaxis == name and t.x[0] is not None]


def test_boxes_that_only_one_network_has_are_bold_in_the_row_that_has_them():
    nothing = [-1.0] * 6
    first = torch.tensor([[[1, 2, 9, 10, 0.9, 1], [3, 3, 6, 6, 0.8, 0]], [[0, 0, 4, 4, 0.3, 0], nothing]])
    second = torch.tensor([[[1, 2, 9, 11, 0.6, 1], nothing], [[8, 8, 12, 12, 0.7, 0], nothing]])
    fig = plots.detections(X, {"original": first, "generated": second}, ("cat", "dog"), "scenes")
    assert boxes(fig, 1, 1) == [((1, 2, 9, 10), "dog", False), ((3, 3, 6, 6), "cat", True)] and boxes(fig, 1, 2) == []  # not sure
    assert boxes(fig, 2, 1) == [((1, 2, 9, 11), "dog", False)] and boxes(fig, 2, 2) == [((8, 8, 12, 12), "cat", True)]
    assert [a.text for a in fig.layout.annotations] == ["original", "generated"]


def pixels(fig, row, col):
    """One picture of a row of them."""
    source = [t.source for t in fig.data if t.type == "image"][row - 1]
    strip = np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    side, gap = len(strip), 1
    assert (strip.shape[1] + gap) % (side + gap) == 0 and (strip[:, side::side + gap] == 255).all()
    return strip[:, (col - 1) * (side + gap):][:, :side]


def test_masks_have_a_colour_for_each_class_and_differences_a_row():
    a, b = torch.zeros(2, 16, 16, dtype=torch.int64), torch.zeros(2, 16, 16, dtype=torch.int64)
    a[0, :4], b[0, :3], b[1, 0, 0] = 1, 1, -1
    fig = plots.masks(X, {"original": a, "generated": b}, ("background", "cat"), "scenes")
    assert [n.text for n in fig.layout.annotations] == ["image", "original", "generated", "generated: differs"]
    assert (pixels(fig, 2, 1)[:4] == (0, 0x72, 0xB2)).all() and (pixels(fig, 2, 1)[4:] == 150).all()
    assert (pixels(fig, 3, 2)[0, 0] == 0).all()  # no class
    differs = (pixels(fig, 4, 1) == (213, 94, 0)).all(axis=-1)
    assert differs[3].all() and differs.sum() == 16 and (pixels(fig, 4, 2) == (213, 94, 0)).all(axis=-1).sum() == 1
    assert {t.name for t in fig.data if t.type == "scatter"} == {"cat", "no class (not finite)"}


def test_no_two_classes_share_a_colour_and_none_is_that_of_nothing():
    given = torch.arange(25).clamp(max=23).view(1, 5, 5).repeat(2, 1, 1)
    given[1, 0, 0] = -1
    fig = plots.masks(torch.zeros(2, 3, 5, 5, dtype=torch.uint8), {"original": given}, ("background", *map(str, range(1, 24))), "scenes")
    colours = {t.name: t.marker.color for t in fig.data if t.type == "scatter"}
    assert len(colours) == 24 and len(set(colours.values())) == 24 and colours["no class (not finite)"] == "rgb(0, 0, 0)"
    assert "rgb" + str(tuple(pixels(fig, 2, 1)[4, 4].tolist())) == colours["23"]


def test_images_made_have_a_row_of_differences_and_what_is_not_finite_is_no_image():
    first = torch.linspace(-1, 1, 16).view(1, 1, 4, 4).repeat(2, 1, 1, 1)
    second = first + 0.1
    second[1, 0, 0, 0] = torch.nan
    fig = plots.made({"original": first, "generated": second}, "digits")
    assert [a.text for a in fig.layout.annotations] == ["original", "generated", "generated: difference x4"]
    assert (pixels(fig, 1, 1)[0, 0] == 0).all() and (pixels(fig, 1, 1)[3, 3] == 255).all()
    assert abs(pixels(fig, 3, 1).astype(int) - round(127.5 * 1.4)).max() <= 1
    assert (pixels(fig, 2, 2) == (213, 94, 0)).all() and (pixels(fig, 3, 2) == (213, 94, 0)).all()
