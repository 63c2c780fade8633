"""Parameter vectors `theta [K D]`, whatever network they belong to: the border at which they come in, and their scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

ROUNDING = 1e-6  # of float32, relative: a spread below it is none
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # float8 is not among them: it comes with scales
Array = Tensor | np.ndarray  # what a vector may come as
Vectors = Float32[Tensor, "K D"]


def scales(theta: Float[Tensor, "K D"], sizes: Sequence[int]) -> Float[Tensor, "T"]:
    """One standard deviation per tensor: of its numbers within a checkpoint, averaged over the checkpoints.

    That of a single number is 0, as is that of numbers which are all alike (up to rounding): of such a tensor it is the
    standard deviation over the checkpoints, and 0 only where all of them agree.

    >>> scales(torch.tensor([[1., 3., 0.25], [1., 3., 0.75]]), (2, 1))
    tensor([1.0000, 0.2500])
    """
    found = []
    for p in theta.split(list(sizes), dim=1):
        within = p.std(dim=1, correction=0).mean()
        found.append(torch.where(within > ROUNDING * p.mean().abs(), within, p.std(correction=0)))
    return torch.stack(found)


class Standardiser:
    """Each tensor of `theta` by its mean and one standard deviation.

    Args:
        theta: [K D], what the statistics come from.
        sizes: lengths of the tensors; None treats the vector as one tensor.
        centre: "tensor": mean and standard deviation are scalars per tensor, over its numbers within a checkpoint, then
            averaged over the checkpoints (the authors' way; METHOD "From checkpoints to vectors"), or over the checkpoints
            where a checkpoint has no spread to estimate (`scales`). "vector": the mean is the mean checkpoint, and the
            standard deviation the root mean square of what a tensor's numbers deviate from it.

    A tensor that is the same constant in all checkpoints keeps its scale.
    """

    def __init__(self, theta: Float[Array, "K D"], sizes: Sequence[int] | None = None, centre: str = "tensor"):
        theta = vectors(theta)
        sizes = tuple(sizes or (theta.shape[1],))
        if sum(sizes) != theta.shape[1]:
            raise ValueError(f"sizes add up to {sum(sizes)}: expected {theta.shape[1]}, the length of the vectors")
        lengths = torch.tensor(sizes, device=theta.device)
        if centre == "vector":
            self.mean = theta.mean(dim=0)
            std = torch.stack([p.square().mean().sqrt() for p in (theta - self.mean).split(sizes, dim=1)])
        else:
            self.mean = torch.stack([p.mean() for p in theta.split(sizes, dim=1)]).repeat_interleave(lengths)
            std = scales(theta, sizes)
        self.std = torch.where(std > 0, std, 1.0).repeat_interleave(lengths)

    def __call__(self, theta: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Raw to standardised, where the statistics are."""
        return (theta.to(self.mean.device) - self.mean) / self.std

    def inverse(self, v: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Standardised to raw, where the statistics are."""
        return v.to(self.mean.device) * self.std + self.mean


def distinct(theta: Float[Array, "K D"]) -> None:
    """Refuse originals that are all the same.

    Raises:
        ValueError: they are; or what `vectors` refuses, fewer than two among it.
    """
    theta = vectors(theta, at_least=2)
    if bool((theta == theta[0]).all()):
        raise ValueError(f"all {len(theta)} originals are the same vector: expected at least two different ones")


def vector(theta: Any, numel: int | None = None, device: torch.device | str | None = None) -> Float32[Tensor, "D"]:
    """`vectors` for a single one, [D]."""
    known = isinstance(theta, (Tensor, np.ndarray))
    if known and (theta.ndim != 1 or numel not in (None, len(theta))):
        raise ValueError(f"theta has shape {list(theta.shape)}: expected [{numel or 'D'}]")
    return vectors(theta[None] if known else theta, numel, device=device)[0]


def vectors(theta: Any, numel: int | None = None, at_least: int = 1, device: torch.device | str | None = None) -> Vectors:
    """The border for parameter vectors: what comes in, as the rest of the library has it.

    Args:
        theta: [K D] tensor or NumPy array of a real floating type, anywhere, with or without a gradient.
        numel: D, when it is known.
        at_least: how many vectors there must be.
        device: where they are wanted; None: where they are.

    Returns:
        Detached float32 numbers in one block of memory; `theta` itself when it is that already.

    Raises:
        ValueError: neither a tensor nor an array, numbers of another type, not [K D] with D = `numel`, fewer than `at_least`
            vectors, or NaN or infinity among the numbers, as they are or as float32.

    >>> vectors(torch.ones(2, 3, dtype=torch.float64, requires_grad=True)).dtype
    torch.float32
    """
    if not isinstance(theta, (Tensor, np.ndarray)) or isinstance(theta, np.ma.MaskedArray):
        raise ValueError(f"theta is a {type(theta).__name__}: expected a tensor or a NumPy array [vectors, {numel or 'D'}]")
    real = theta.dtype in FLOATS if isinstance(theta, Tensor) else np.issubdtype(theta.dtype, np.floating)
    if not real or (isinstance(theta, Tensor) and (theta.layout != torch.strided or theta.is_meta)):
        kind = f"{theta.dtype} ({theta.layout}, on {theta.device})" if isinstance(theta, Tensor) else theta.dtype
        raise ValueError(f"theta holds numbers of type {kind}: expected dense floats of 16, 32 or 64 bits")
    if theta.ndim != 2 or (numel is not None and theta.shape[1] != numel):
        single = "; a single vector is theta[None]" if theta.ndim == 1 else ""
        raise ValueError(f"theta has shape {list(theta.shape)}: expected [vectors, {numel or 'D'}]{single}")
    if len(theta) < at_least:
        raise ValueError(f"theta holds {len(theta)} vectors: expected at least {at_least}")
    given = theta
    if isinstance(theta, np.ndarray):
        with np.errstate(over="ignore"):  # said below, in words
            theta = torch.from_numpy(theta.astype(np.float32, order="C"))  # a copy: any byte order, any strides, read-only
    theta = (theta.detach() if theta.requires_grad else theta).to(device, torch.float32).contiguous()
    if theta.is_inference() and not torch.is_inference_mode_enabled():
        theta = theta.clone()  # such tensors can be neither changed nor trained on
    if not torch.isfinite(theta.sum(dim=1)).all() and (bad := ~torch.isfinite(theta).all(dim=1)).any():  # a sum is quick
        row = int(bad.nonzero()[0])
        beyond = " (finite as given, but beyond the range of float32)" if bool((abs(given[row]) < torch.inf).all()) else ""
        raise ValueError(f"theta holds NaN or infinity in {int(bad.sum())} of {len(theta)} vectors, first in vector {row}"
                         f"{beyond}")
    return theta
