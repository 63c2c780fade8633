"""Which parameters are generated: choosing them, and moving between a network and a flat vector `theta [D]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from pdiff_lib.norms import in_forward_order

ROUNDING = 1e-6  # of float32, relative: a spread below it is none
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # float8 is not among them: it comes with scales
Array = Tensor | np.ndarray  # what a vector may come as
Vectors = Float32[Tensor, "K D"]


@dataclass(frozen=True)
class Subset:
    """A choice of a network's parameters, in a fixed order.

    Attributes:
        names: parameter names, as in `net.named_parameters()`.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each tensor has: where one ends and the next begins in `theta`."""
        return tuple(prod(s) for s in self.shapes)

    @property
    def numel(self) -> int:
        """D, the length of `theta`."""
        return sum(self.sizes)

    def flatten(self, net: nn.Module | Mapping[str, Tensor]) -> Float[Tensor, "D"]:
        """The chosen parameters of a network (or of a state dict) as one vector; a copy.

        Raises:
            ValueError: a tensor is missing, has another shape, or holds no floats.
        """
        tensors = dict(net.named_parameters()) if isinstance(net, nn.Module) else net
        return torch.cat([t.detach().reshape(-1) for t in self._of(tensors)])

    def unflatten(self, theta: Float[Array, "D"]) -> dict[str, Tensor]:
        """The vector as named tensors (views), ready for `torch.func.functional_call`; in its own precision.

        Raises:
            ValueError: the vector has another length, or holds no floats.
        """
        theta = theta if isinstance(theta, Tensor) and theta.dtype in FLOATS else vector(theta, self.numel)
        if theta.shape != (self.numel,):
            raise ValueError(f"theta has shape {list(theta.shape)}: expected [{self.numel}]")
        return {n: part.view(s) for n, s, part in zip(self.names, self.shapes, theta.split(self.sizes))}

    def load(self, net: nn.Module, theta: Float[Array, "D"]) -> nn.Module:
        """Write the vector into the network, in place; returns the network.

        Raises:
            ValueError: a network without these parameters, or what `vector` refuses.
        """
        values = self.unflatten(vector(theta, self.numel)).values()
        with torch.no_grad():
            for parameter, value in zip(self._of(dict(net.named_parameters())), values):
                parameter.copy_(value)
        return net

    def still(self, theta: Float[Array, "K D"]) -> list[str]:
        """Names of the tensors that are the same in all vectors: nothing is learned of them but their value."""
        theta = vectors(theta, self.numel)
        return [n for n, part in zip(self.names, theta.split(self.sizes, dim=1)) if bool((part == part[0]).all())]

    def _of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        for name, shape in zip(self.names, self.shapes):
            if name not in tensors:
                raise ValueError(f"no parameter {name!r} here: expected {', '.join(self.names[:4])}, ...")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}: expected {shape}")
            if tensors[name].dtype not in FLOATS:
                raise ValueError(f"{name} holds numbers of type {tensors[name].dtype}: expected floats of 16, 32 or 64 bits")
        return [tensors[name] for name in self.names]


def select(net: nn.Module, choice: str | Sequence[str]) -> Subset:
    """Choose parameters.

    Args:
        net: the network.
        choice: "last_norms:N" (weights and biases of the last N normalisation layers in forward order), "all" (every
            parameter; running statistics of batch norm are not parameters), or name patterns with * and ?
            (a list, or one string with commas), in the network's own order.

    Raises:
        ValueError: a pattern that matches nothing, or fewer normalisation layers than asked for.

    Source: Section 3.1, Table 6.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> select(net, "last_norms:1").names, select(net, "0.*,2.bias").numel, select(net, "all").numel
    (('1.weight', '1.bias'), 17, 29)
    """
    parameters = {n: tuple(p.shape) for n, p in net.named_parameters()}
    if isinstance(choice, str) and choice.startswith("last_norms:"):
        count = choice.partition(":")[2]
        if not count.isdigit() or int(count) < 1:
            raise ValueError(f"subset {choice!r}: expected last_norms:N with N at least 1")
        norms = in_forward_order(net)
        if len(norms) < int(count):
            raise ValueError(f"subset {choice!r}: {type(net).__name__} has {len(norms)} normalisation layers with parameters")
        chosen = [f"{m}.{p}" for m in norms[-int(count):] for p, _ in net.get_submodule(m).named_parameters(recurse=False)]
    elif choice == "all":
        chosen = list(parameters)
    else:
        patterns = [p.strip() for p in choice.split(",")] if isinstance(choice, str) else list(choice)
        for pattern in patterns:
            if not any(fnmatchcase(n, pattern) for n in parameters):
                raise ValueError(f"subset pattern {pattern!r} matches no parameter of {type(net).__name__}: expected "
                                 f"last_norms:N, all, or patterns over names such as {', '.join(list(parameters)[-3:])}")
        chosen = [n for n in parameters if any(fnmatchcase(n, p) for p in patterns)]
    return Subset(tuple(chosen), tuple(parameters[n] for n in chosen))


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
    bad = ~torch.isfinite(theta).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        beyond = " (finite as given, but beyond the range of float32)" if bool((abs(given[row]) < torch.inf).all()) else ""
        raise ValueError(f"theta holds NaN or infinity in {int(bad.sum())} of {len(theta)} vectors, first in vector {row}"
                         f"{beyond}")
    return theta
