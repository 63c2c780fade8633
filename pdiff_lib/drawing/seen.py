"""Figures of what networks see in images, and of images that they make: network beside network, with what they disagree about. `plots` has
them too."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from plotly.subplots import make_subplots
from torch import Tensor
from torchvision.ops import box_iou

from pdiff_lib.drawing.palette import COLOURS

SURE, SAME = 0.5, 0.5  # score from which a detection is drawn, IoU from which two mean the same
AGREED, ALONE = COLOURS[4], COLOURS[1]
PIXELS, SMALL = 150, 80  # of a picture's side; of one that is made
WRONG = (213, 94, 0)  # on masks: differing from the first row; of what is made: not finite
GAP = 40  # of a picture's side to the space between pictures
ENHANCED = 4.0  # how strongly images' differences are drawn


def detections(x: UInt8[Tensor, "n 3 s s"], found: Mapping[str, Float[Tensor, "n most 6"]], classes: Sequence[str], title: str) -> go.Figure:
    """What several networks find in the same images, a row for each.

    Args:
        x: images.
        found: by what stands before each row: left, top, right, lower edge in pixels, score and class (-1: nothing) of each detection. Drawn
            are those with a score of at least .5.
        classes: names of the classes.
        title: what, on what, at which scale.

    The first row is what others are compared with: a box that only one of the two has (none of the same class with an IoU of at least .5)
    is drawn bold, in orange, in the row that has it; of the first row, where any of the others lacks it.
    """
    names = list(found)
    fig = _grid(names, len(x), x.shape[-1], title)
    sure = {name: [[box for box in image.tolist() if box[5] >= 0 and box[4] >= SURE] for image in each] for name, each in found.items()}
    for i, row in enumerate(names):
        for j, image in enumerate(x):
            fig.add_trace(_picture(image), row=i + 1, col=j + 1)
            others = [sure[name][j] for name in (names[1:] if i == 0 else names[:1])]
            for box in sure[row][j]:
                agreed = all(any(_same(box, other) for other in each) for each in others)
                left, top, right, low = (edge - 0.5 for edge in box[:4])
                score, label = box[4:]
                fig.add_trace(go.Scatter(
                    x=[left, right, right, left, left], y=[top, top, low, low, top], mode="lines+text", text=[classes[int(label)]],
                    textposition="bottom right", textfont={"size": 9, "color": AGREED if agreed else ALONE},
                    line={"width": 1.5 if agreed else 3, "color": AGREED if agreed else ALONE}, showlegend=False, hoverinfo="text",
                    hovertext=f"{classes[int(label)]}, score {score:.2f}{'' if agreed else ', not in ' + ('another row' if i == 0 else names[0])}"),
                    row=i + 1, col=j + 1)
    return fig


def masks(x: UInt8[Tensor, "n 3 s s"], given: Mapping[str, Int64[Tensor, "n s s"]], classes: Sequence[str], title: str) -> go.Figure:
    """The classes that several networks give to the pixels of the same images, a row for each, and one for each row but the first with the pixels
    on which it differs from the first.

    Args:
        x: images.
        given: by what stands before each row: classes, 0 for the background; negative: none.
        classes: names of the classes, the background first.
        title: what, on what, at which scale.
    """
    first = next(iter(given.values()))
    rows = {"image": x} | {name: _painted(x, each) for name, each in given.items()}
    for name, each in list(given.items())[1:]:
        differs = (each != first)[:, None]
        rows[f"{name}: differs"] = torch.where(differs, torch.tensor(WRONG, dtype=torch.uint8)[None, :, None, None], x // 3 + 128)
    fig = _strips(rows, PIXELS, title)
    for c in sorted(set(torch.cat([each.flatten() for each in given.values()]).unique().tolist()) - {0}):
        colour = (0, 0, 0) if c < 0 else _colour(c)
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker={"symbol": "square", "size": 10, "color": f"rgb{colour}"},
                                 name="no class (not finite)" if c < 0 else classes[c]), row=1, col=1)
    return fig


def made(rows: Mapping[str, Float[Tensor, "n C s s"]], title: str) -> go.Figure:
    """Images that several networks make of the same noises, a row for each, and one for each row but the first with its difference from the first,
    enhanced.

    Args:
        rows: by what stands before each row: images of one or three channels, about -1 to 1. One that is not finite is drawn in orange.
        title: what, on what, at which scale.
    """
    first, drawn = next(iter(rows.values())), {}
    for name, row in rows.items():
        drawn[name] = _bytes(row)
        if row is not first:
            drawn[f"{name}: difference x{ENHANCED:g}"] = _bytes(ENHANCED * (row - first))
    return _strips(drawn, SMALL, title)


def _bytes(images: Float[Tensor, "n C s s"]) -> UInt8[Tensor, "n 3 s s"]:
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    found = (127.5 * (images.clamp(-1, 1) + 1)).round().nan_to_num(0).byte().expand(-1, 3, -1, -1)
    return torch.where(finite[:, None, None, None], found, torch.tensor(WRONG, dtype=torch.uint8)[None, :, None, None])


def _painted(x: UInt8[Tensor, "n 3 s s"], given: Int64[Tensor, "n s s"]) -> UInt8[Tensor, "n 3 s s"]:
    """Images, grey and pale, with the colours of classes on them."""
    table = torch.tensor([(0, 0, 0), *(_colour(c) for c in range(1, int(given.max()) + 1))], dtype=torch.uint8)
    colour = table[given.clamp(min=0)].permute(0, 3, 1, 2)
    pale = (x.float().mean(dim=1, keepdim=True) / 3 + 150).byte().expand_as(x)
    return torch.where((given != 0)[:, None], colour, pale)


def _colour(c: int) -> tuple[int, int, int]:
    """Of class c, from 1 on: the palette's, then the same paler; black, which means no class, is left out."""
    colours = [colour for colour in COLOURS if colour != "#000000"]
    turn, i = divmod(c - 1, len(colours))
    return tuple(round(255 - (255 - int(colours[i][at:at + 2], 16)) * 0.55**turn) for at in (1, 3, 5))


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[5] == b[5] and float(box_iou(torch.tensor([a[:4]]), torch.tensor([b[:4]]))) >= SAME


def _grid(names: Sequence[str], n: int, side: int, title: str) -> go.Figure:
    edges = [-0.5, side - 0.5]  # a pixel is drawn around its number
    fig = _laid(make_subplots(len(names), n, horizontal_spacing=0.004, vertical_spacing=0.012, row_titles=list(names)), n, len(names), PIXELS, title)
    return fig.update_xaxes(range=edges).update_yaxes(range=edges[::-1])


def _strips(rows: Mapping[str, UInt8[Tensor, "n 3 s s"]], pixels: int, title: str) -> go.Figure:
    """Images in rows, each row one picture: many axes make a large file."""
    n, _, _, side = next(iter(rows.values())).shape
    gap = -(-side // GAP)
    fig = make_subplots(len(rows), 1, vertical_spacing=0.012, row_titles=list(rows))
    for i, row in enumerate(rows.values()):
        fig.add_trace(_picture(F.pad(row, (0, gap), value=255).movedim(0, 2).flatten(2)[..., :-gap]), row=i + 1, col=1)
    fig.update_xaxes(range=[-0.5, n * (side + gap) - gap - 0.5]).update_yaxes(range=[side - 0.5, -0.5])
    return _laid(fig, n, len(rows), pixels, title)


def _laid(fig: go.Figure, columns: int, rows: int, pixels: int, title: str) -> go.Figure:
    fig.update_xaxes(visible=False).update_yaxes(visible=False)
    fig.for_each_annotation(lambda a: a.update(x=-0.005, xanchor="right", textangle=0, font_size=12))
    return fig.update_layout(title=title, width=pixels * columns + 260, height=pixels * rows + 90, margin={"l": 170, "r": 90, "t": 60, "b": 10})


def _picture(image: UInt8[Tensor, "3 h w"]) -> go.Image:
    held = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(held, "PNG")
    return go.Image(source="data:image/png;base64," + base64.b64encode(held.getvalue()).decode(), hoverinfo="skip")
