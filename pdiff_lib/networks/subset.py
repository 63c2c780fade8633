"""Which parameters are generated: choosing them, and moving between a network and a flat vector `theta [D]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pdiff_lib.base.vectors import (
    FLOATS,
    Array,
    Standardiser as Standardiser,  # the face: what a user of `subset` looks for here
    distinct as distinct,
    scales as scales,
    vector,
    vectors,
)
from pdiff_lib.networks.norms import in_forward_order

SMALLEST, LARGEST = 1e-10, 1e30  # variances: below the first, batch norm's own epsilon (1e-5) is all that counts

@dataclass(frozen=True)
class Subset:
    """A choice of a network's numbers, in a fixed order: parameters, and running statistics of batch norms where a vector holds
    these too. A running variance is in the vector as its logarithm: it stays positive, whatever is generated.

    Attributes:
        names: as in `net.named_parameters()` and `net.named_buffers()`.
        shapes: their shapes.

    Source: the logarithm is what the authors' code takes where variances are generated.
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
        """The chosen numbers of a network (or of a state dict) as one vector; a copy. Variances are taken as at least 1e-10.

        Raises:
            ValueError: a tensor is missing, has another shape, or holds no floats.
        """
        tensors = tensors_of(net) if isinstance(net, nn.Module) else net
        parts = [t.detach().reshape(-1) for t in self._of(tensors)]
        return torch.cat([t.clamp(min=SMALLEST).log() if is_variance(n) else t for n, t in zip(self.names, parts)])

    def unflatten(self, theta: Float[Array, "D"]) -> dict[str, Tensor]:
        """The vector as named tensors (views, but for variances), ready for `torch.func.functional_call`; in its own precision.

        Raises:
            ValueError: the vector has another length, or holds no floats.
        """
        theta = theta if isinstance(theta, Tensor) and theta.dtype in FLOATS else vector(theta, self.numel)
        if theta.shape != (self.numel,):
            raise ValueError(f"theta has shape {list(theta.shape)}: expected [{self.numel}]")
        parts = {n: part.view(s) for n, s, part in zip(self.names, self.shapes, theta.split(self.sizes))}
        return {n: p.clamp(max=math.log(LARGEST)).exp() if is_variance(n) else p for n, p in parts.items()}

    def load(self, net: nn.Module, theta: Float[Array, "D"]) -> nn.Module:
        """Write the vector into the network, in place; returns the network.

        Raises:
            ValueError: a network without these parameters, or what `vector` refuses.
        """
        values = self.unflatten(vector(theta, self.numel)).values()
        with torch.no_grad():
            for tensor, value in zip(self._of(tensors_of(net)), values):
                tensor.copy_(value)
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


def is_variance(name: str) -> bool:
    """Whether a tensor is a running variance, which vectors hold as logarithms."""
    return name.rpartition(".")[2] == "running_var"


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def statistics(net: nn.Module) -> Subset:
    """The running statistics of all batch norms; a subset without tensors where there are none.

    >>> statistics(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).names
    ('1.running_mean', '1.running_var')
    """
    norms = {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    found = {f"{n}.{kind}".lstrip("."): (m.num_features,) for n, m in norms.items() for kind in ("running_mean", "running_var")}
    return Subset(tuple(found), tuple(found.values()))


def with_statistics(net: nn.Module, sub: Subset) -> Subset:
    """A subset, then the running statistics of all batch norms of the network.

    Raises:
        ValueError: it has none.
    """
    own = statistics(net)
    if not own.names:
        raise ValueError(f"{type(net).__name__} has no batch norm with running statistics: expected a network with some, or "
                         "vectors of parameters alone (buffers: network)")
    return Subset(sub.names + own.names, sub.shapes + own.shapes)


def select(net: nn.Module, choice: str | Sequence[str]) -> Subset:
    """Choose parameters.

    Args:
        net: the network.
        choice: "last_norms:N" (weights and biases of the last N normalisation layers in forward order), "all" (every
            parameter; running statistics of batch norm are not parameters: see `with_statistics`), or name patterns with * and ?
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
