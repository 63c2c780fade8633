"""Objects to which fields are fitted: what they are worth at points of [-1, 1]^d. Pictures, and glyphs as bodies; others are of `meshes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Store
from pdiff_lib.tasks import data as images, meshes

THRESHOLD = 0.5  # of a glyph's ink, from 0 to 1; of how often a body's surface goes around a point
DEPTH = 0.25  # half of an extruded glyph's
EDGE = 4.0  # what the solidity of an extruded glyph falls by per unit of length before and behind it


@dataclass(frozen=True, eq=False)
class Objects:
    """O objects, of which fields learn the values at n points each, and are judged at N others that are the same for all.

    Attributes:
        name: of the data set, for titles.
        names: [O] of each object ("training image 12", a file's path in its folder).
        labels: [O] 0 .. number of classes - 1.
        classes: their names.
        points: [O n d], coordinates from -1 to 1. A picture's are (x to the right, y down), a body's (x, y, z); y is up in an extruded
            glyph.
        values: [O n] there: grey values from 0 to 1, or whether inside.
        test_points: [N d], uniform.
        test_values: [O N] there.
        fitted: how many of them networks may be fitted to, the first ones; by the others, test objects, networks are judged.
        look: (rows, [p d]) -> [rows p], what the objects are at any points: grey values, or what is inside from `THRESHOLD` on.
    """

    name: str
    names: tuple[str, ...]
    labels: Int64[Tensor, "O"]
    classes: tuple[str, ...]
    points: Float[Tensor, "O n d"]
    values: Float[Tensor, "O n"] | Bool[Tensor, "O n"]
    test_points: Float[Tensor, "N d"]
    test_values: Float[Tensor, "O N"] | Bool[Tensor, "O N"]
    fitted: int
    look: Callable[[Sequence[int], Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def d(self) -> int:
        """Of the points: 2 or 3."""
        return self.points.shape[2]


def of(settings: recipe.Data, store: Store | None = None) -> Objects:
    """The objects that a recipe names, in a random order (of `data_seed`): training images before test images.

    Args:
        settings: `dataset`, `field_kind`, `field_points`, `field_test_points`, `train_images` and `test_images`; of images
            `image_size`, to which they are brought first. Meshes for testing: 0 is a fifth of those in the folder.
        store: where the points of meshes are kept.

    Raises:
        ValueError: a colour image that is to stay one, an object that is empty, and what `data.load` or `meshes.load` refuse.
    """
    if settings.field_kind == "mesh":
        return Objects(recipe.short(settings.dataset), *meshes.load(settings, store))
    if settings.image_channels == 3:
        raise ValueError("image_channels is 3 with task 'fields': expected 1, or 0 (colour images become grey), as a field gives one number")
    found = images.load(settings.dataset, size=settings.image_size, channels=1, train_images=settings.train_images,
                        test_images=settings.test_images, seed=settings.data_seed)
    # RandomState, whose numbers NumPy promises never to change; stored images are often in the order of their classes.
    orders = [torch.from_numpy(np.random.RandomState(settings.data_seed).permutation(len(y))) for y in (found.y_train, found.y_test)]
    pictures = torch.cat([x[rows] for x, rows in zip((found.x_train, found.x_test), orders)])
    names = [f"{part} image {int(i)}" for part, rows in zip(("training", "test"), orders) for i in rows]
    solid, d = settings.field_kind == "extruded", 2 + (settings.field_kind == "extruded")

    def look(rows: Sequence[int], where: Float[Tensor, "p d"]) -> Float[Tensor, "rows p"]:
        chosen = pictures[list(rows)]
        return extruded(chosen, found.size, where) if solid else at(chosen, found.size, where)

    points, test_points = (uniform(n, d, training.seed_for(settings.data_seed, purpose)) for purpose, n in
                           (("field points", settings.field_points), ("field test points", settings.field_test_points)))
    values, test_values = (look(range(len(names)), where) for where in (points, test_points))
    if settings.field_kind != "grey":
        values, test_values = values >= THRESHOLD, test_values >= THRESHOLD
        for part in (values, test_values):
            if len(empty := (~part.any(dim=1)).nonzero()):
                raise ValueError(f"{names[int(empty[0])]} of {found.name!r} is empty: no grey value of at least {THRESHOLD:g} (white on "
                                 f"black) at {part.shape[1]} points; expected glyphs, more points, or field_kind 'grey'")
    labels = torch.cat([y[rows] for y, rows in zip((found.y_train, found.y_test), orders)])
    return Objects(recipe.short(found.name), tuple(names), labels, found.classes, points.expand(len(names), -1, -1), values, test_points,
                   test_values, len(found.y_train), look)


def uniform(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Random points of [-1, 1]^d."""
    return 2 * torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) - 1


def at(pictures: UInt8[Tensor, "O 1 h w"], side: int, points: Float[Tensor, "n 2"]) -> Float[Tensor, "O n"]:
    """Grey values from 0 to 1 at points (x, y) of [-1, 1]^2 (the whole picture, its outer edges), bilinear between centres of pixels.

    >>> at(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), 2, torch.tensor([[0., 0.], [-1., 0.]])).tolist()
    [[0.5, 0.0]]
    """
    x = pictures.float() / 255
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return F.grid_sample(x.transpose(0, 1), points[None, None], padding_mode="border", align_corners=False)[0, :, 0]


def extruded(pictures: UInt8[Tensor, "O 1 h w"], side: int, points: Float[Tensor, "n 3"]) -> Float[Tensor, "O n"]:
    """How solid glyphs are that reach from -`DEPTH` to `DEPTH` along z, y pointing up: the ink, and less before and behind it.

    >>> extruded(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), 2, torch.tensor([[0., 0., 0.], [0., 0., 0.5]])).tolist()
    [[1.0, -0.5]]
    """
    ink = at(pictures, side, points[:, :2] * torch.tensor([1.0, -1.0]))
    return torch.minimum(ink, THRESHOLD + EDGE * (DEPTH - points[:, 2].abs()))
