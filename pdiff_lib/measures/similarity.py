"""How much a network is like another: in what it gets wrong (Eq. 7), and in parameter space."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdiff_lib.base import vectors
from pdiff_lib.base.runs import tensor_digest
from pdiff_lib.base.vectors import Array

COLUMNS = 2048  # images per matrix product: bounds the memory of the float copies, and keeps them in the cache
KEEP = 2**26  # bytes that a basis may take to be kept until others are asked for


def iou(wrong_a: Bool[Tensor, "A N"], wrong_b: Bool[Tensor, "B N"]) -> Float[Tensor, "A B"]:
    """Intersection over union of wrong predictions, all pairs at once by matrix products (exact in float32).

    Two networks that are never wrong agree entirely: 1.

    Raises:
        ValueError: not boolean, or not over the same images.

    Source: Eq. 7.

    >>> a = torch.tensor([[True, True, False]]); iou(a, torch.tensor([[True, False, False], [False, False, True]]))
    tensor([[0.5000, 0.0000]])
    """
    for w in (wrong_a, wrong_b):
        if w.dtype != torch.bool or w.ndim != 2:
            raise ValueError(f"wrong predictions are {w.dtype} {list(w.shape)}: expected bool [models, images]")
    if wrong_a.shape[1] != wrong_b.shape[1]:
        raise ValueError(f"wrong predictions over {wrong_a.shape[1]} and {wrong_b.shape[1]} images: expected the same images")
    wrong_b = wrong_b.to(wrong_a.device)
    size_a, size_b = wrong_a.new_zeros(len(wrong_a), dtype=torch.float32), wrong_b.new_zeros(len(wrong_b), dtype=torch.float32)
    both = torch.zeros(len(wrong_a), len(wrong_b), device=wrong_a.device)
    for a, b in zip(wrong_a.split(COLUMNS, 1), wrong_b.split(COLUMNS, 1)):
        left = a.float()
        right = left if wrong_b is wrong_a else b.float()  # the conversion costs as much as the product
        both.addmm_(left, right.T)
        size_a += left.sum(1)
        size_b += right.sum(1)
    either = size_a[:, None] + size_b - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def maximum(wrong: Bool[Tensor, "M N"], wrong_originals: Bool[Tensor, "K N"],
            exclude_self: bool = False) -> Float[Tensor, "M"]:
    """Maximum similarity to the originals (Section 4): 1 = makes the same mistakes as one of them.

    Args:
        wrong: of the networks in question.
        wrong_originals: of the originals.
        exclude_self: the networks **are** the originals, row by row, and none is compared with itself.

    Raises:
        ValueError: `exclude_self` with other than the originals' number of rows, or a single original.
    """
    return nearest(wrong, wrong_originals, exclude_self)[0]


def nearest(wrong: Bool[Tensor, "M N"], wrong_originals: Bool[Tensor, "K N"],
            exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Maximum similarity, and the index of the original that has it: float [M], int64 [M]. Arguments as `maximum`."""
    return highest(iou(wrong, wrong_originals), exclude_self)


def highest(pairs: Float[Tensor, "M K"], exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The highest similarity to an original, and its index: float [M], int64 [M]; NaN and -1 where there is a NaN.

    Args:
        pairs: of each network with each original.
        exclude_self: as in `maximum`, which raises the same.
    """
    if exclude_self:
        if pairs.shape[0] != pairs.shape[1] or len(pairs) < 2:
            raise ValueError(f"exclude_self with {pairs.shape[0]} networks and {pairs.shape[1]} originals: expected the "
                             "originals themselves, at least two")
        pairs.fill_diagonal_(-torch.inf)
    value, nearest = pairs.max(dim=1)
    return value, nearest.where(~value.isnan(), -1)


def distance(theta: Float[Array, "M D"], originals: Float[Array, "K D"], exclude_self: bool = False) -> Float[Tensor, "M"]:
    """Euclidean distance to the nearest original, in raw parameter units. `exclude_self` as in `maximum`.

    Raises:
        ValueError: what `vectors.vectors` refuses, originals of another length, or `exclude_self` with other vectors.
    """
    theta, originals = _both(theta, originals)
    if exclude_self and (len(theta) != len(originals) or len(theta) < 2):
        raise ValueError(f"exclude_self with {len(theta)} networks and {len(originals)} originals: expected the originals "
                         "themselves, at least two")
    # Centred: distances are small beside the vectors, and float32 squares would lose them.
    mean = originals.mean(dim=0)
    pairs = torch.cdist(theta - mean, originals - mean, compute_mode="donot_use_mm_for_euclid_dist")
    if exclude_self:
        pairs.fill_diagonal_(torch.inf)
    return pairs.amin(dim=1)


def outside_span(theta: Float[Array, "M D"], originals: Float[Array, "K D"]) -> Float[Tensor, "M"]:
    """Share of a vector's deviation from the originals' mean that lies outside their span (ratio of lengths).

    0: an affine combination of the originals (a copy, an average, any PCA reconstruction). 1: at a right angle to all
    of them. K vectors span at most K-1 directions.

    Raises:
        ValueError: what `vectors.vectors` refuses, or originals of another length.
    """
    theta, originals = _both(theta, originals)
    mean = originals.double().mean(dim=0)
    deviation, basis = theta.double() - mean, _basis(originals, mean)
    outside = deviation - deviation @ basis.T @ basis
    length = deviation.norm(dim=1)
    # The mean itself deviates by float32 rounding alone, and has no direction to speak of.
    tiny = length <= 1e-6 * originals.double().norm(dim=1).mean()
    return torch.where(tiny, 0.0, outside.norm(dim=1) / length.clamp(min=1e-300)).float()


_kept: dict[tuple[str, torch.device], Tensor] = {}  # of the originals that were asked for last: a table asks once per method


def _basis(originals: Float[Tensor, "K D"], mean: Float[Tensor, "D"]) -> Float[Tensor, "k D"]:
    """Orthonormal directions that the originals span about their mean."""
    key = tensor_digest(originals), originals.device
    if key not in _kept:
        _, singular, basis = torch.linalg.svd(originals.double() - mean, full_matrices=False)
        basis = basis[singular > max(1e-6 * float(singular[0]), 1e-12 * float(originals.norm()))]  # beyond rounding
        _kept.clear()
        if basis.nbytes > KEEP:
            return basis
        _kept[key] = basis
    return _kept[key]


def _both(theta: Float[Array, "M D"], originals: Float[Array, "K D"]) -> tuple[Tensor, Tensor]:
    """Both as vectors of one length on one device, the first's."""
    originals = vectors.vectors(originals)
    theta = vectors.vectors(theta, originals.shape[1])
    return theta, originals.to(theta.device)


def pairwise(wrong: Bool[Tensor, "M N"]) -> float:
    """Mean IoU (Eq. 7) over all pairs of different networks: how alike the generated are; 1 when there is a single one.

    >>> pairwise(torch.tensor([[True, True], [True, False], [False, True]]))
    0.333...
    """
    if len(wrong) < 2:
        return 1.0
    pairs = iou(wrong, wrong)
    return float((pairs.sum() - pairs.diagonal().sum()) / (len(pairs) * (len(pairs) - 1)))
