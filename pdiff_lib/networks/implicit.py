"""Fields: small networks from a point to one number, each of them an object (a picture's grey values, a shape's inside)."""

from __future__ import annotations

import math
import re

import torch
from jaxtyping import Float
from torch import Tensor, nn

OCTAVES, FREQUENCY = 4, 30.0  # HyperDiffusion's, SIREN's
NAMES = ("'field-128-128-128' (hidden layers; ReLU), 'field-32-32-o6' (with 6 octaves in place of 4), 'siren-32-32' (sines) or "
         "'siren-32-32-w10' (of frequency 10 in place of 30)")
_NAME = re.compile(r"(field)((?:-[1-9]\d*)+)(?:-o(\d+))?|(siren)((?:-[1-9]\d*)+)(?:-w(\d*\.?\d+))?")


class Sine(nn.Module):
    """sin(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Field(nn.Module):
    """Points -> one number each (a logit of being inside, or a grey value), by a multilayer perceptron on encoded coordinates.

    Attributes:
        input_shape: (d,).
        octaves: of the encoding; 0: none.
    """

    def __init__(self, d: int, octaves: int, *layers: nn.Module):
        super().__init__()
        self.input_shape, self.octaves, self.layers = (d,), octaves, nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B 1"]:
        return self.layers(encoded(x, self.octaves))


def encoded(x: Float[Tensor, "*B d"], octaves: int) -> Float[Tensor, "*B e"]:
    """Coordinates, then sine and cosine of 1, 2, 4, ... times each: e = d (1 + 2 octaves).

    Source: Mildenhall et al. 2020 (NeRF), Eq. 4, as HyperDiffusion's code has it: the coordinates stay, and no factor of pi.

    >>> encoded(torch.zeros(5, 3), 4).shape, encoded(torch.zeros(2), 1).tolist()
    (torch.Size([5, 27]), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    """
    return torch.cat([x, *(wave(2.0**i * x) for i in range(octaves) for wave in (torch.sin, torch.cos))], dim=-1)


def create(name: str, d: int) -> Field:
    """The field called `name`, in train mode, on the CPU; initial weights from the global random state.

    Args:
        name: "field-H-...-H" with the widths of hidden layers: ReLU on coordinates with 4 octaves (PyTorch's initial weights);
            "-oN" behind it: with N octaves. "siren-H-...-H": sines, on plain coordinates, with SIREN's initial weights for a frequency
            of 30; "-wX": of X.
        d: of the points.

    Raises:
        ValueError: another name, or fewer than one dimension.

    Source: Erkoc et al. 2023 (HyperDiffusion): "field-128-128-128" in three dimensions, 36,737 numbers. Sitzmann et al. 2020 (SIREN):
        sin(w (W x + b)), here with w inside W and b: the same functions, and the same training by Adam at w times the learning rate.

    >>> [sum(p.numel() for p in create(name, d).parameters()) for name, d in (("field-128-128-128", 3), ("field-32-32", 2))]
    [36737, 1697]
    """
    found = _NAME.fullmatch(name)
    if found is None or d < 1:
        raise ValueError(f"network {name!r} of points with {d} coordinates: expected at least one, and {NAMES}")
    plain, hidden, octaves, _, waves, frequency = found.groups()
    octaves = (OCTAVES if octaves is None else int(octaves)) if plain else 0
    widths = [d * (1 + 2 * octaves), *map(int, (hidden or waves).split("-")[1:])]
    linear = [nn.Linear(a, b) for a, b in zip(widths, [*widths[1:], 1])]
    if not plain:
        w = FREQUENCY if frequency is None else float(frequency)
        if w <= 0:
            raise ValueError(f"network {name!r}: expected a frequency above 0")
        for i, layer in enumerate(linear):
            scale = w if layer is not linear[-1] else 1.0  # of what the sine is taken of
            bound = scale * (math.sqrt(6 / layer.in_features) / w if i else 1 / layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound)
            layer.bias.data *= scale
    layers = [part for layer in linear[:-1] for part in (layer, nn.ReLU() if plain else Sine())]
    return Field(d, octaves, *layers, linear[-1])


def raster(side: int, d: int = 2) -> Float[Tensor, "n d"]:
    """The centres of side^d equal cells of [-1, 1]^d, the last axis running fastest: of a picture in two dimensions (x to the right, y
    down) row by row, so that values reshape to [side, side]; in three dimensions the axes are (x, y, z).

    Raises:
        ValueError: fewer than one cell or dimension.

    >>> raster(2).tolist()
    [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
    """
    if side < 1 or d < 1:
        raise ValueError(f"side is {side} in {d} dimensions: expected at least 1 each")
    axis = (torch.arange(side) + 0.5) * (2 / side) - 1
    points = torch.cartesian_prod(*[axis] * d).view(-1, d)
    return points.flip(1) if d == 2 else points
