"""Surfaces: where a field in space crosses a level, as triangles; points on triangles; a picture of a body without a renderer."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pdiff_lib.base.extras import extra

LIGHT = (-0.4, 0.6, 0.7)  # towards it: to the left, above, before the body


def trimesh() -> ModuleType:
    """The package that reads and writes meshes.

    Raises:
        ValueError: it is not installed.
    """
    return extra("trimesh", "trimesh", "meshes are read and written by", "shapes")


def marching_cubes(values: Float[Tensor, "s s s"], level: float) -> tuple[Float[Tensor, "V 3"], Int64[Tensor, "F 3"]]:
    """The surface between cells below and above a level, in the coordinates of the cells' centres (`implicit.raster(s, 3)`).

    Args:
        values: of a field at these centres; a surface that would leave the cube is closed at its border.
        level: what is above is inside.

    Returns:
        Vertices, and faces that look outward; none of both where nothing is inside.

    Raises:
        ValueError: scikit-image is missing, or values that are not finite.

    Source: Lewiner et al. 2003, by scikit-image.
    """
    measure = extra("skimage.measure", "scikit-image", "surfaces are found by", "shapes")
    if not torch.isfinite(values).all():
        raise ValueError(f"values {list(values.shape)}, {int((~torch.isfinite(values)).sum())} of them not finite: expected finite ones "
                         "[s, s, s]")
    if not (values > level).any():
        return torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int64)
    # Around it a layer that lies as far below the level as the values reach above it: the border is half a cell away.
    outside = 2 * level - max(float(values.max()), level + 1e-6)
    padded = F.pad(values.float().cpu(), (1,) * 6, value=outside).numpy()
    vertices, faces, *_ = measure.marching_cubes(padded, level, gradient_direction="ascent")
    side = values.shape[0]
    return torch.from_numpy((vertices - 0.5) * (2 / side) - 1).float(), torch.from_numpy(faces.astype(np.int64))


def points_on(vertices: Float[Tensor, "V 3"], faces: Int64[Tensor, "F 3"], n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n 3"]:
    """Points uniform on triangles."""
    a, b, c = vertices[faces].unbind(dim=1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).double().cumsum(dim=0)
    pick = torch.searchsorted(area, area[-1] * torch.rand(n, generator=generator, dtype=torch.float64)).clamp(max=len(faces) - 1)
    u, v = torch.rand(2, n, 1, generator=generator)
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    return a[pick] + u * (b - a)[pick] + v * (c - a)[pick]


def seen(values: Float[Tensor, "M s s s"], level: float, up: int = 2) -> Float[Tensor, "M s s"]:
    """Bodies as a camera far away sees them, lit from the upper left: brightness from 0 to 1, NaN beside the body, and
    all over for values that are not all finite.

    Args:
        values: of fields at the centres of cells; the axes are (x, y, z).
        level: what is above is inside.
        up: the axis that points up in the picture, 1 (y; seen along z) or 2 (z; seen along y, from its negative side).

    Raises:
        ValueError: another axis.

    >>> seen(torch.ones(1, 2, 2, 2), 0.5).shape
    torch.Size([1, 2, 2])
    """
    if up not in (1, 2):
        raise ValueError(f"up is {up}: expected 1 or 2")
    # [M, up, right, depth], the first slice of depth being the nearest one
    v = values.permute(0, 3, 1, 2) if up == 2 else values.permute(0, 2, 1, 3).flip(3)
    v = v.float()
    inside = (v > level) & torch.isfinite(values).flatten(1).all(dim=1)[:, None, None, None]
    side = v.shape[-1]
    first = inside.int().argmax(dim=3)
    here = v.gather(3, first.unsqueeze(3))[..., 0]
    before = v.gather(3, (first - 1).clamp(min=0).unsqueeze(3))[..., 0]
    part = ((level - before) / (here - before).clamp(min=1e-6)).clamp(0, 1).where(first > 0, 1.0)
    depth = first - 1 + part  # where the level is crossed, in cells
    shown = inside.any(dim=3)
    smooth = depth.where(shown, torch.nan)
    steps = []
    for axis in (2, 1):
        ahead, back = smooth.roll(-1, axis), smooth.roll(1, axis)
        slope = torch.where(torch.isfinite(ahead - back), (ahead - back) / 2, torch.where(torch.isfinite(ahead), ahead - smooth, smooth - back))
        steps.append(slope.nan_to_num(0.0).clamp(-side / 8, side / 8))
    normal = torch.stack([steps[0], steps[1], torch.ones_like(depth)], dim=-1)  # towards the camera, which looks along rising depth
    light = torch.tensor(LIGHT, device=v.device)
    brightness = (F.normalize(normal, dim=-1) @ F.normalize(light, dim=0)).clamp(min=0)
    return (0.15 + 0.85 * brightness).where(shown, torch.nan).flip(1)  # rows from the top
