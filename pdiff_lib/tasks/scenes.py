"""Scenes: images with several objects in them, each with its box, its class and its mask. Made here, by pasting real glyphs or silhouettes
on real photographs; those of one's own come from `annotations`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pdiff_lib.base import training
from pdiff_lib.tasks import annotations, sources
from pdiff_lib.tasks.annotations import NOTHING, NOT_COUNTED as NOT_COUNTED

MADE = "scenes"  # and "scenes:OBJECTS@PHOTOGRAPHS"
HOW_MANY = 2000, 500  # scenes for training and testing, where 0 are asked for
MOST, SIDES, VISIBLE, TRIES = 4, (0.25, 0.55), 0.6, 20  # objects; their longer sides, in sides of the scene; what must stay in sight
CONTRAST = 60  # grey levels, at least, between an object and what it is pasted on, in the mean of the channels
GLYPH = 64  # pixels of a side, to which glyphs of several sizes are brought
INK = 0.5  # from which share of ink on a pixel belongs to an object
Photographs = Callable[[int, int, int, np.random.RandomState], list[Tensor]]  # (part, how many, side, random)


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images with objects.

    Attributes:
        name: of the data set.
        x_train, x_test: pixels 0..255, squares.
        y_train, y_test: [N O 6] of each object: left, top, right and lower edge of the box in pixels (0 .. s), class, and 1 for a crowd or an
            object that is marked as difficult, which is neither learned nor counted (COCO's and Pascal VOC's way). Class `NOTHING`:
            no object.
        masks_train, masks_test: 0 for no object, 1 + class, `NOT_COUNTED`; [N 0 0] where there are none.
        classes: their names.
    """

    name: str
    x_train: UInt8[Tensor, "N 3 s s"]
    y_train: Float[Tensor, "N O 6"]
    masks_train: UInt8[Tensor, "N a a"]
    x_test: UInt8[Tensor, "M 3 s s"]
    y_test: Float[Tensor, "M P 6"]
    masks_test: UInt8[Tensor, "M b b"]
    classes: tuple[str, ...]

    @property
    def size(self) -> int:
        """s: side of the images in pixels."""
        return self.x_train.shape[-1]


def is_made(name: str) -> bool:
    """Whether a data set's name asks for scenes that are made here."""
    return name.partition(":")[0] == MADE


def load(name: str, size: int, train_images: int = 0, test_images: int = 0, seed: int = 0, root: str | Path | None = None,
         download: bool = True) -> Scenes:
    """Scenes by name.

    Args:
        name: "scenes": scikit-learn's digits on its two photographs, which are cut: scenes for training show their left parts, those for testing
            their right. "scenes:animals+mnist@cifar10": objects from these data sets (grey, bright on dark; any that `data.load` knows,
            "+" between them; classes keep their names), photographs from another. Else TRAIN.json,TEST.json or a folder of Pascal VOC:
            see `annotations.load`.
        size: side in pixels of the scenes.
        train_images, test_images: how many; 0: 2,000 and 500, or all that are annotated.
        seed: of everything random.
        root, download: as for `data.load`.

    Returns:
        Made scenes hold 1 to 4 objects, whose longer sides are .25 to .55 of the scene's; at least .6 of each stays in sight, and boxes are
        exact: of what is seen. Training images of the two data sets make training scenes, test images test scenes, and within each none is
        used again before all have been: no object and no photograph stands in scenes of both.

    Raises:
        ValueError: an unknown data set, impossible sizes, or what `annotations.load` refuses.
    """
    if size < 16 or min(train_images, test_images) < 0:
        raise ValueError(f"image_size {size}, {train_images} training and {test_images} test images of {name!r}: expected at least 16 "
                         "pixels, and numbers from 0")
    if not is_made(name):
        return Scenes(name, *annotations.load(name, size, train_images, test_images, seed))
    what, _, where = (name.partition(":")[2] or "digits@photographs").partition("@")
    if not all((what, where)):
        raise ValueError(f"data {name!r}: expected 'scenes', or 'scenes:OBJECTS@PHOTOGRAPHS', say 'scenes:mnist+fashion-mnist@cifar10'")
    counts = [n or some for n, some in zip((train_images, test_images), HOW_MANY)]
    root = sources.root_of(root)
    classes: list[str] = []
    glyphs: list[list[tuple[Tensor, int]]] = [[], []]
    for one in what.split("+"):
        _, splits, _ = sources.find(one, GLYPH, root, download)
        named = sources.classes_of(one, *splits)
        for part, split in enumerate(splits):
            rows = sources.subset_of(one, "", split.labels, min(len(split.labels), MOST * counts[part]), seed)
            inks = sources.decode_all(one, [split], [rows], GLYPH, 1)
            glyphs[part] += [(ink, len(classes) + int(label)) for ink, label in zip(inks, split.labels[rows])]
        classes += [f"{one} {c}" if c in classes else c for c in named]
    photographs = _two_photographs if where == "photographs" else _photographs(where, size, root, download, seed)
    parts = []
    for part, n in enumerate(counts):
        random = np.random.RandomState(training.seed_for(seed, f"scenes {part}") % 2**32)
        parts += _made(glyphs[part], photographs(part, n, size, random), random)
    return Scenes(name, *parts, tuple(classes))


def mirrored(seed: int, x: UInt8[Tensor, "B 3 s s"], y: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the images, at random, left to right, with their objects [B O 6] or masks [B s s]."""
    turned = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device) < 0.5
    if y.is_floating_point():
        other = torch.cat([x.shape[-1] - y[..., [2]], y[..., [1]], x.shape[-1] - y[..., [0]], y[..., 3:]], dim=-1)
    else:
        other = y.flip(-1)
    return torch.where(turned[:, None, None, None], x.flip(-1), x), torch.where(turned[:, None, None], other, y)


def _two_photographs(part: int, n: int, size: int, random: np.random.RandomState) -> list[Tensor]:
    """Squares of scikit-learn's photographs: from their left .6 for training, from the rest for testing."""
    from sklearn.datasets import load_sample_images  # here, as importing it takes more than a second

    whole = [torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in load_sample_images().images]
    halves = [x[..., :int(0.6 * x.shape[2])] if part == 0 else x[..., int(0.6 * x.shape[2]):] for x in whole]
    found = []
    for i in range(n):
        x = halves[i % 2]
        side = random.randint(min(size, min(x.shape[1:]) - 1), min(x.shape[1:]))
        top, left = (random.randint(0, length - side + 1) for length in x.shape[1:])
        found.append(_resized(x[:, top:top + side, left:left + side].float(), size, size))
    return found


def _photographs(name: str, size: int, root: Path, download: bool, seed: int) -> Photographs:
    _, splits, _ = sources.find(name, size, root, download)
    sources.classes_of(name, *splits)

    def some(part: int, n: int, size: int, random: np.random.RandomState) -> list[Tensor]:
        labels = splits[part].labels
        rows = sources.subset_of(name, "", labels, min(n, len(labels)), seed)
        x = sources.decode_all(name, [splits[part]], [rows], size, 3)
        order = random.permutation(len(x))
        return [_resized(x[order[i % len(x)]].float(), size, size) for i in range(n)]

    return some


def _made(glyphs: list[tuple[Tensor, int]], photographs: list[Tensor], random: np.random.RandomState) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes [n 3 s s], objects [n 4 6] and masks [n s s]."""
    order, used, s = random.permutation(len(glyphs)), 0, photographs[0].shape[-1]
    x, y = torch.empty(len(photographs), 3, s, s, dtype=torch.uint8), torch.zeros(len(photographs), MOST, 6)
    masks = torch.zeros(len(photographs), s, s, dtype=torch.uint8)
    y[..., 4] = NOTHING
    for i, picture in enumerate(photographs):
        inside: list[Tensor] = []  # of each object [s s], whether it is seen there
        sizes: list[int] = []  # of each, in pixels, when nothing was before it
        labels: list[int] = []
        for _ in range(random.randint(1, MOST + 1)):
            ink, label = glyphs[order[used % len(glyphs)]]
            used += 1
            placed = _placed(ink, s, inside, sizes, random)
            if placed is None:
                continue
            alpha, own = placed
            picture = torch.lerp(picture, _colour(picture[:, own].mean(dim=1), random)[:, None, None], alpha)
            inside = [other & ~own for other in inside] + [own]
            sizes.append(int(own.sum()))
            labels.append(label)
        for j, (seen, label) in enumerate(zip(inside, labels)):
            rows, columns = seen.any(dim=1).nonzero()[:, 0], seen.any(dim=0).nonzero()[:, 0]
            y[i, j] = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, label, 0])
            masks[i][seen] = 1 + label
        x[i] = picture.round().clamp(0, 255)
    return x, y, masks


def _placed(ink: UInt8[Tensor, "1 h w"], s: int, others: list[Tensor], sizes: list[int],
            random: np.random.RandomState) -> tuple[Tensor, Tensor] | None:
    """A glyph somewhere in a scene: how much of each pixel it covers [s s], and which pixels are its own; None where it would hide others."""
    share = ink[0].float() / 255
    rows, columns = (share > INK / 2).any(dim=1).nonzero()[:, 0], (share > INK / 2).any(dim=0).nonzero()[:, 0]
    if not len(rows):
        return None
    share = share[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    side = random.uniform(*SIDES) * s
    h, w = (max(4, round(side * length / max(share.shape))) for length in share.shape)
    share = _resized(share[None], h, w)[0].clamp(0, 1)
    for _ in range(TRIES):
        top, left = random.randint(0, s - h + 1), random.randint(0, s - w + 1)
        alpha = F.pad(share, (left, s - w - left, top, s - h - top))
        own = alpha >= INK
        if own.any() and all(int((other & ~own).sum()) >= VISIBLE * size for other, size in zip(others, sizes)):
            return alpha, own
    return None


def _colour(under: Float[Tensor, "3"], random: np.random.RandomState) -> Float[Tensor, "3"]:
    while True:
        colour = torch.from_numpy(random.randint(0, 256, 3)).float()
        if float((colour - under).abs().mean()) >= CONTRAST:
            return colour


def _resized(x: Float[Tensor, "c h w"], h: int, w: int) -> Float[Tensor, "c i j"]:
    return F.interpolate(x[None], (h, w), mode="bilinear", antialias=True, align_corners=False)[0]

