"""Generated shapes against real ones: distances of point sets, what is told from their matrices, and fields on shared points.

A matrix of distances has a row per generated shape and a column per reference (held-out, or training) shape. What is broken is never
left out in silence: `emptiness` counts it first, `chamfer` has NaN for it, `nearest` never takes it, and all else refuses the matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from scipy.spatial import KDTree
from torch import Tensor

from pdiff_lib.base.vectors import Array
from pdiff_lib.measures import similarity

BLOCK = 2**22  # points asked for at a time, or float32 numbers per intermediate result: 16 MB


def chamfer(a: Float[Array, "M P d"], b: Float[Array, "N Q d"]) -> Float[Tensor, "M N"]:
    """Chamfer distance of each point set to each other: **mean squared** distance of a set's points to the other's nearest, both ways,
    **added**. In squared units of the coordinates; float32, where `a` is.

    Args:
        a, b: any dimension d (2: glyphs, 3: surfaces). The sets themselves, `chamfer(a, a)`, take half the time.

    Returns:
        NaN for each pair with a set that has NaN or infinity in it. (A field without a surface has no points to draw: a set of NaN
        in its place keeps the rows those of the fields.)

    Raises:
        ValueError: no sets, sets of no points, another shape or type of numbers, or sets of two dimensions.

    Source: `_pairwise_EMD_CD_` in the code of PointFlow (Yang et al. 2019, arXiv 1906.12320), PVD (Zhou et al. 2021) and HyperDiffusion
    (Erkoc et al. 2023). `distChamfer` in the first and the last is a difference of products in float32, which leaves copies above or
    below 0; here they are at 0. For its test shapes HyperDiffusion first takes off each set's mean and divides by the standard
    deviation of all its coordinates: this is left to the caller.

    >>> chamfer(torch.tensor([[[0., 0.], [1., 0.]]]), torch.tensor([[[0., 0.]], [[3., 4.]]]))  # (0 + 1) / 2 + 0, 22.5 + 20
    tensor([[ 0.5000, 42.5000]])
    """
    own = a is b
    a = _sets(a)
    b = a if own else _sets(b).to(a.device)
    if a.shape[2] != b.shape[2]:
        raise ValueError(f"points of {a.shape[2]} and {b.shape[2]} dimensions: expected the same")
    broken_a, broken_b = (~torch.isfinite(s).all(dim=2).all(dim=1) for s in (a, b))
    a, b = (s.masked_fill(broken[:, None, None], 0) for s, broken in ((a, broken_a), (b, broken_b)))
    there = _one_way(a, b)
    distance = there + (there if own else _one_way(b, a)).T
    return distance.masked_fill(broken_a[:, None] | broken_b, torch.nan).float()


def _sets(points: Array) -> Float[Tensor, "M P d"]:
    points = torch.as_tensor(points).detach()
    if points.ndim != 3 or not points.is_floating_point() or 0 in points.shape:
        raise ValueError(f"points are {points.dtype} {list(points.shape)}: expected floats [sets, points, dimensions], at least one of each")
    return points if points.dtype == torch.float64 else points.float()


def _one_way(a: Float[Tensor, "M P d"], b: Float[Tensor, "N Q d"]) -> Float[Tensor, "M N"]:
    """Mean squared distance of the points of each a to the nearest point of each b: by a tree on the CPU (half the time of
    matrix products in blocks, and exact near 0), by all pairs elsewhere."""
    return _by_tree(a, b) if a.device.type == "cpu" else _by_pairs(a, b)


def _by_tree(a: Float[Tensor, "M P d"], b: Float[Tensor, "N Q d"]) -> Float[Tensor, "M N"]:
    found = torch.empty(len(a), len(b), dtype=torch.float64)
    trees = [KDTree(points) for points in b.double().numpy()]
    m = max(1, BLOCK // a.shape[1])
    for row in range(0, len(a), m):
        asked = a[row:row + m].flatten(0, 1).double().numpy()
        for j, tree in enumerate(trees):
            distance, _ = tree.query(asked, workers=torch.get_num_threads())
            found[row:row + m, j] = torch.from_numpy(distance).square().view(-1, a.shape[1]).mean(dim=1)
    return found


def _by_pairs(a: Float[Tensor, "M P d"], b: Float[Tensor, "N Q d"]) -> Float[Tensor, "M N"]:
    p = max(1, BLOCK // b.shape[1])
    n = max(1, BLOCK // (min(p, a.shape[1]) * b.shape[1]))

    def least(points: Float[Tensor, "p d"], others: Float[Tensor, "n Q d"]) -> Float[Tensor, "n p"]:
        return sum((x[:, None] - y[:, None]).square() for x, y in zip(points.unbind(1), others.unbind(2))).amin(dim=2)

    return torch.stack([torch.cat([torch.cat([least(part, others) for part in points.split(p)], dim=1).mean(dim=1) for others in b.split(n)])
                        for points in a])


# ---------------------------------------------------------------- matrices of distances

def nearest(distance: Float[Tensor, "M N"], exclude_self: bool = False) -> tuple[Float[Tensor, "M"], Int64[Tensor, "M"]]:
    """Distance to the nearest shape of each row, and its index, the first of several. NaN and infinity never win; where there is
    nothing else, the distance is NaN and the index N, which is no shape's.

    Args:
        distance: of generated shapes to training shapes.
        exclude_self: rows and columns are the same shapes, and none is compared with itself.

    Raises:
        ValueError: no rows or columns, or `exclude_self` with other than a square, at least [2, 2].

    >>> nearest(torch.tensor([[.2, .1], [torch.nan, .3], [torch.nan, torch.nan]]))
    (tensor([0.1000, 0.3000,    nan]), tensor([1, 1, 2]))

    Are they copies? Z_U of `novelty` takes these distances, of generated and of held-out shapes, those that are finite:

    >>> from pdiff_lib.measures import novelty
    >>> generated, held_out = torch.tensor([[0., 4.], [3., 0.], [0., 5.]]), torch.tensor([[1., 2.], [2., 3.], [4., 3.]])
    >>> novelty.data_copying(nearest(generated)[0], nearest(held_out)[0])
    -2.08...
    """
    _matrix(distance)
    m, n = distance.shape
    if exclude_self:
        if m != n or m < 2:
            raise ValueError(f"exclude_self with distances {[m, n]}: expected a square, at least [2, 2]")
        distance = distance.clone().fill_diagonal_(torch.inf)
    value, index = distance.where(torch.isfinite(distance), torch.inf).min(dim=1)
    none = torch.isinf(value)
    return value.masked_fill(none, torch.nan), index.masked_fill(none, n)


def minimum_matching_distance(distance: Float[Tensor, "M N"]) -> float:
    """MMD: mean over the reference shapes of the distance to their nearest generated one. Lower is better. Looks at the best of the
    generated alone: bad ones beside them cost nothing.

    Args:
        distance: [generated, reference].

    Raises:
        ValueError: no rows or columns, or a distance that is not finite.

    Source: PointFlow (Yang et al. 2019), `lgan_mmd_cov` in its code; from Achlioptas et al. 2018.

    >>> minimum_matching_distance(torch.tensor([[1., 5.], [2., 3.]]))  # (1 + 3) / 2
    2.0
    """
    return float(_finite(distance).amin(dim=0).double().mean())


def coverage(distance: Float[Tensor, "M N"]) -> float:
    """COV: share of reference shapes that are the nearest one of some generated shape. Higher is better; M generated shapes cover at
    most M / N. Of references at the same distance the first is covered, and no other.

    Args, Raises, Source: as for `minimum_matching_distance`.

    >>> coverage(torch.tensor([[1., 5.], [2., 2.]]))
    0.5
    """
    return len(_finite(distance).min(dim=1).indices.unique()) / distance.shape[1]


def one_nearest_neighbour(generated: Float[Tensor, "M M"], between: Float[Tensor, "M N"], reference: Float[Tensor, "N N"]) -> float:
    """1-NNA: how often a shape's nearest other one tells whether it was generated. .5 is best: the sets cannot be told apart. 1: they
    lie apart; 0: each has a twin in the other set, as copies of the references have. Of several shapes at the same distance each
    counts with its share.

    Args:
        generated, between, reference: distances among the generated, of generated to reference shapes, and among the references; the
            diagonals are not looked at. As many generated as references: else chance is not .5, but
            (M (M - 1) + N (N - 1)) / ((M + N) (M + N - 1)).

    Raises:
        ValueError: no generated or reference shapes, other shapes of matrices, or a distance that is not finite.

    Source: PointFlow (Yang et al. 2019), `knn` in its code, which takes any one of those at the same distance; Lopez-Paz and Oquab 2017.

    >>> one_nearest_neighbour(torch.zeros(1, 1), torch.tensor([[1., 1.]]), torch.tensor([[0., 3.], [3., 0.]]))
    0.0
    """
    m, n = _matrix(between).shape
    if generated.shape != (m, m) or reference.shape != (n, n):
        raise ValueError(f"distances {list(generated.shape)} among the generated and {list(reference.shape)} among the references, "
                         f"{[m, n]} between them: expected {[m, m]} and {[n, n]}")
    distance = torch.cat([torch.cat([generated, between], dim=1), torch.cat([between.T, reference], dim=1)]).fill_diagonal_(0)
    _finite(distance).fill_diagonal_(torch.inf)
    label = torch.arange(m + n, device=distance.device) < m
    tied = distance == distance.amin(dim=1, keepdim=True)
    return float(((tied & (label == label[:, None])).sum(dim=1).double() / tied.sum(dim=1)).mean())


def _matrix(distance: Tensor) -> Tensor:
    if distance.ndim != 2 or not distance.is_floating_point() or 0 in distance.shape:
        raise ValueError(f"distances are {distance.dtype} {list(distance.shape)}: expected floats [shapes, shapes], at least one of each")
    return distance


def _finite(distance: Tensor) -> Tensor:
    bad = ~torch.isfinite(_matrix(distance))
    if bad.any():
        raise ValueError(f"{int(bad.sum())} of {distance.numel()} distances are NaN or infinite, first in row and column "
                         f"{bad.nonzero()[0].tolist()}: expected none; count broken shapes (`emptiness`), then leave them out")
    return distance


# ---------------------------------------------------------------- fields on shared points

class Outcomes(NamedTuple):
    """What became of each field; `whole` where it is none of these."""
    empty: Bool[Tensor, "M"]
    full: Bool[Tensor, "M"]
    broken: Bool[Tensor, "M"]

    @property
    def whole(self) -> Bool[Tensor, "M"]:
        return ~(self.empty | self.full | self.broken)


def outcomes(occupancy: Bool[Tensor, "M P"] | Float[Tensor, "M P"], level: float | None = None) -> Outcomes:
    """Which fields are empty (no point is inside), full (all are), or broken (NaN or infinity at any point, and neither of the two).

    Args:
        occupancy: inside or not; or numbers, which need a level.
        level: a number from which on a point is inside: .5 for probabilities, 0 for logits.

    Raises:
        ValueError: numbers without a finite level, a level of what has none, or no fields or points.
    """
    if occupancy.ndim != 2 or 0 in occupancy.shape or not (occupancy.is_floating_point() or occupancy.dtype == torch.bool):
        raise ValueError(f"occupancy is {occupancy.dtype} {list(occupancy.shape)}: expected bool or floats [fields, points], at least one "
                         "of each")
    if occupancy.is_floating_point() != (level is not None) or (level is not None and not math.isfinite(level)):
        raise ValueError(f"level is {level} for occupancy of {occupancy.dtype}: expected a finite one for floats, and none for bool")
    broken = ~torch.isfinite(occupancy).all(dim=1)
    inside = occupancy if level is None else occupancy >= level
    return Outcomes(~inside.any(dim=1) & ~broken, inside.all(dim=1) & ~broken, broken)


def emptiness(occupancy: Bool[Tensor, "M P"] | Float[Tensor, "M P"], level: float | None = None) -> dict[str, float]:
    """Shares of fields that are empty, full and broken: to be reported before any is dropped. Arguments and errors as `outcomes`.

    HyperDiffusion (`calc_metrics` in its code) draws 1.1 times as many shapes as there are references, drops the empty ones, and
    measures the first of the rest: its numbers do not tell how many there were.

    >>> emptiness(torch.tensor([[.9, .1], [.2, .1], [.2, torch.nan], [.3, .4]]), level=.5)
    {'empty': 0.5, 'full': 0.0, 'broken': 0.25}
    """
    return {name: float(which.double().mean()) for name, which in outcomes(occupancy, level)._asdict().items()}


def iou(a: Bool[Tensor, "M P"], b: Bool[Tensor, "N P"]) -> Float[Tensor, "M N"]:
    """Intersection over union of occupancies on the same points, all pairs as matrix products (`similarity.iou`; exact below 2^24
    points). Two empty fields are alike: 1.

    Raises:
        ValueError: not bool, not over the same points, or over none.

    >>> iou(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False], [False, False, False]]))
    tensor([[0.5000, 0.0000]])
    """
    for o in (a, b):
        if o.dtype != torch.bool or o.ndim != 2 or o.shape[1] == 0:
            raise ValueError(f"occupancy is {o.dtype} {list(o.shape)}: expected bool [fields, points], at least one point")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"occupancies at {a.shape[1]} and {b.shape[1]} points: expected the same points")
    return similarity.iou(a, b)


def psnr(values: Float[Tensor, "M P"], targets: Float[Tensor, "M P"], peak: float = 1.0) -> Float[Tensor, "M"]:
    """Peak signal-to-noise ratio in dB, row by row: 10 log10(peak^2 / mean squared error). Infinite for equal rows; NaN for a row with
    NaN or infinity.

    Args:
        peak: the largest value that there could be, above 0 (255 for bytes).

    Raises:
        ValueError: other shapes, no points, or a peak that is not above 0.

    >>> psnr(torch.tensor([[.1, .9], [1., 0.]]), torch.tensor([[0., 1.], [1., 0.]]))
    tensor([20.0000,     inf])
    """
    if values.shape != targets.shape or values.ndim != 2 or values.shape[1] == 0 or not 0 < peak < torch.inf:
        raise ValueError(f"values {list(values.shape)}, targets {list(targets.shape)}, peak {peak}: expected twice the same [fields, points], "
                         "at least one point, and a peak above 0")
    error = (values.double() - targets.to(values.device).double()).square().mean(dim=1)
    return (10 * (peak**2 / error).log10()).masked_fill(~torch.isfinite(error), torch.nan).float()
