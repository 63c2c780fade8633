"""Which parameters are generated: choosing them, and moving between a network and a flat vector `theta [D]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
