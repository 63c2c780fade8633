"""Permutations of hidden units: networks that differ in nothing but the order of their units are the same function.

Independently trained networks number their units at random. `align` brings them to the order of a reference by matching
weights (Git Re-Basin, Ainsworth et al. 2023, Algorithm 1); `augment` shows a generator several orders of each network. Where
a unit's scale is free as well, `scalings` says so; `canonical` takes both from many networks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from timm.layers import ClassifierHead, Mlp, NormMlpClassifierHead, SelectAdaptivePool2d
from timm.layers.activations import GELU, GELUTanh
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage, Downsample
from torch import Tensor, nn

from pdiff_lib.base import vectors
from pdiff_lib.base.vectors import Array
from pdiff_lib.networks import canonical, subset
from pdiff_lib.networks.canonical import Groups, Scalings, align as align, permute as permute
from pdiff_lib.networks.classifiers import _Attention, _Residual, _ViTMini
from pdiff_lib.networks.implicit import Sine

SUPPORTED = "hyperrep-cnn, mlp-mini, convnet-mini, resnet-mini, vit-mini, convnext-mini, or another sequence of linear, convolution and norm layers"
HOMOGENEOUS = (nn.LeakyReLU, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout,
               SelectAdaptivePool2d)  # f(a x) = a f(x) for a > 0
UNITWISE = (*HOMOGENEOUS, nn.GELU, GELU, GELUTanh, nn.ELU, nn.SiLU, nn.Tanh, nn.Sigmoid, Sine)  # do to each unit the same
IN_ORDER = (nn.Sequential, ConvNeXt, ConvNeXtStage, Downsample, Mlp, ClassifierHead, NormMlpClassifierHead)  # one child after another


def groups(net: nn.Module, sub: subset.Subset) -> Groups:
    """Which numbers of a parameter vector belong to which hidden unit, for each layer of hidden units.

    Derived from the order of the layers: a layer's outputs, its bias, the layer norms after it and the inputs of the next
    layer (through flattening: as many inputs per channel as it has positions; through a skip connection: those of both
    branches) permute together. In attention whole heads do, then within each head what q and k, and what v and `out` share.
    Then checked: permutations that generate all others must leave the function as it is. ViT-mini adds fixed positions to its
    tokens, so that the width of its residual stream has one order only, and is no group.

    Args:
        net: the network, with its `input_shape`.
        sub: all of its parameters.

    Returns:
        One tensor per group: row u holds the positions in `theta` that belong to unit u, in the same order for every
        unit. Permuting units is permuting rows. Groups within the units of another one come after it.

    Raises:
        ValueError: a subset other than "all", or a network whose layers are not understood.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)); net.input_shape = (2,)
    >>> groups(net, subset.select(net, "all"))[0]
    tensor([[ 0,  1,  6,  9],
            [ 2,  3,  7, 10],
            [ 4,  5,  8, 11]])
    """
    together = _Walk(net, sub).groups
    single = random(together, 1, torch.Generator().manual_seed(1))  # each group by itself, not all of a size alike
    orders = [torch.stack([*_generators(len(g)), p[0]]) for g, p in zip(together, single)]
    if not together or not _keeps_the_function(net, sub, lambda theta: permute(theta.expand(3, -1), together, orders)):
        raise ValueError(f"no permutations were found that leave the function of {type(net).__name__} as it is: "
                         f"expected {SUPPORTED}")
    return together


def scalings(net: nn.Module, sub: subset.Subset) -> Scalings:
    """Which numbers of a parameter vector scale a hidden unit's value, and which take it up: a positive factor on the first and
    its inverse on the second leave the function as it is.

    Derived with the groups, and checked like them. Incoming are weights and bias of a linear or convolution layer, or those of a
    layer norm; outgoing are the weights of the layer that reads the unit, where all that lies between is positively homogeneous
    (ReLU, LeakyReLU, pooling, flattening; not tanh or GELU) and nothing else reads it (no skip connection). In attention: q and k,
    v and `out`; layer scale: the layer before it, and gamma.

    Args:
        net: the network, with its `input_shape`.
        sub: all of its parameters.

    Returns:
        (incoming [units numbers], outgoing [units numbers]) per layer of such units; none, where there are none.

    Raises:
        ValueError: a subset other than "all", or a network whose layers are not understood.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)); net.input_shape = (2,)
    >>> [(incoming.tolist(), outgoing.tolist()) for incoming, outgoing in scalings(net, subset.select(net, "all"))]
    [([[0, 1, 6], [2, 3, 7], [4, 5, 8]], [[9], [10], [11]])]
    """
    found = _Walk(net, sub).scalings

    def rescaled(theta: Tensor) -> Tensor:
        for scaling in found:
            theta = canonical.scaled(theta, scaling, torch.linspace(0.5, 2, len(scaling[0]))[None])
        return theta

    if not _keeps_the_function(net, sub, rescaled):
        raise ValueError(f"no scales were found that leave the function of {type(net).__name__} as it is: expected {SUPPORTED}")
    return found


class _Units(NamedTuple):
    """What is known of the values between two layers."""

    members: list[Tensor] | None  # [units numbers] each, of their group; None: their order is fixed, as that of the input
    writers: tuple[Tensor, ...] = ()  # [units numbers] each: numbers that a unit's value is proportional to, if it is


class _Walk:
    """Follows the units through the layers of a network; `groups` and `scalings` are what it finds."""

    def __init__(self, net: nn.Module, sub: subset.Subset):
        if sub != subset.select(net, "all"):
            raise ValueError(f"a subset of {len(sub.names)} tensors: expected all of the network's, as a permutation of hidden "
                             "units moves numbers in every layer")
        self.at = {name: p.long() for name, p in sub.unflatten(torch.arange(sub.numel, dtype=torch.float64)).items()}
        self.found: list[list[Tensor]] = []
        self._scalings: list[tuple[Tensor, Tensor]] = []
        children = dict(net.named_children())
        (name, inner), = children.items() if len(children) == 1 and not isinstance(net, nn.Sequential) else [("", net)]
        last = self.through(inner, f"{name}." if name else "", _Units(None))
        self.groups = tuple(torch.cat(members, dim=1) for members in self.found if members is not last.members)
        self.scalings = tuple(self._scalings)

    def through(self, module: nn.Module, prefix: str, units: _Units) -> _Units:
        """The units after a layer. Adds to their group what belongs to them, and opens new groups."""
        if isinstance(module, UNITWISE):
            return units if isinstance(module, HOMOGENEOUS) else _Units(units.members)
        if isinstance(module, IN_ORDER):
            every = [name for name, _ in module.named_modules(remove_duplicate=False)]  # one layer may stand in two places
            return self.children(module, prefix, [name for name in every if name and "." not in name], units)
        own = {name: self.at.get(prefix + name) for name, _ in module.named_parameters(recurse=False)}
        if tied := [name for name, positions in own.items() if positions is None]:
            raise ValueError(f"{prefix}{tied[0]} is a parameter of another layer as well: expected {SUPPORTED}")
        stream = _Units(units.members)  # read by two: neither may have it scaled
        if isinstance(module, _Residual):
            return self.joined(stream, self.through(module.layers, f"{prefix}layers.", stream))
        if isinstance(module, ConvNeXtBlock):
            branch = self.children(module, prefix, ["conv_dw", "norm", "mlp"], stream)
            if own:
                branch = self.unitwise(branch, own["gamma"][:, None], own)
            return self.joined(self.through(module.shortcut, f"{prefix}shortcut.", stream), branch)
        if isinstance(module, _ViTMini):
            tokens = self.children(module, prefix, ["embed"], units)
            return self.children(module, prefix, ["blocks", "norm", "head"], self.joined(_Units(None), tokens))
        if isinstance(module, _Attention):
            return self.attention(self.at[f"{prefix}qkv.weight"], self.at[f"{prefix}out.weight"], module.heads, units)
        if isinstance(module, nn.LayerNorm):
            return self.unitwise(stream, None, own)
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels:
            return self.unitwise(units, own["weight"].flatten(1), own)
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            self.read(units, own["weight"])
            return self.opened(*(positions.flatten(1) if positions.ndim > 1 else positions[:, None] for positions in own.values()))
        raise ValueError(f"no permutations are known for {type(module).__name__} ({prefix.rstrip('.') or 'the network'}): "
                         f"expected {SUPPORTED}")

    def children(self, module: nn.Module, prefix: str, names: Iterable[str], units: _Units) -> _Units:
        for name in names:
            units = self.through(module.get_submodule(name), f"{prefix}{name}.", units)
        return units

    def attention(self, qkv: Int64[Tensor, "_ _"], out: Int64[Tensor, "_ _"], heads: int, units: _Units) -> _Units:
        self.read(units, qkv)
        q, k, v = qkv.unflatten(0, (3, heads, -1))
        o = out.T.unflatten(0, (heads, -1))
        self.found.append([part.flatten(1) for part in (q, k, v, o)])
        self.found += [[a[h], b[h]] for h in range(heads) for a, b in ((q, k), (v, o))]
        self._scalings += [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in ((q, k), (v, o))]
        return self.opened(out)

    def read(self, units: _Units, weight: Tensor) -> None:
        """A layer that mixes units reads them along axis 1 of its weight."""
        columns = _rows(weight, 1, units)
        if units.members is not None:
            units.members.append(columns)
        self.pair(units, columns)

    def unitwise(self, units: _Units, reads: Tensor | None, own: dict[str, Tensor]) -> _Units:
        """A layer with numbers of its own for each unit; `reads` are those that are multiplied by the unit's value."""
        rows = tuple(_rows(positions, 0, units) for positions in own.values())
        if units.members is not None:
            units.members.extend(rows)
        if reads is not None:
            self.pair(units, reads)
        return _Units(units.members, rows)

    def pair(self, units: _Units, readers: Tensor) -> None:
        if units.writers and len(units.writers[0]) == len(readers):
            self._scalings.append((torch.cat(units.writers, dim=1), readers))

    def opened(self, *rows: Tensor) -> _Units:
        self.found.append([*rows])
        return _Units(self.found[-1], rows)

    def joined(self, a: _Units, b: _Units) -> _Units:
        """The units of a sum, which have one order for both."""
        if a.members is not b.members:
            kept, other = (b, a) if b.members is None else (a, b)
            self.found = [members for members in self.found if members is not other.members]
            if kept.members is not None:
                kept.members.extend(other.members)
            a = kept
        return _Units(a.members)


def _rows(positions: Tensor, axis: int, units: _Units) -> Int64[Tensor, "units numbers"]:
    """The positions by unit along an axis, on which each unit may have several neighbouring entries (after flattening)."""
    count = len(units.members[0]) if units.members else positions.shape[axis]
    if positions.shape[axis] % count:
        raise ValueError(f"{positions.shape[axis]} inputs after {count} units: expected a multiple, {SUPPORTED}")
    return positions.movedim(axis, 0).reshape(count, -1)


@torch.no_grad()
def _keeps_the_function(net: nn.Module, sub: subset.Subset, change: Callable[[Tensor], Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)
    theta = sub.flatten(net).cpu()[None]
    theta = theta + 0.1 * torch.randn(theta.shape, generator=generator)  # layer norms start as all ones
    x = torch.randn(64, *net.input_shape, generator=generator)  # so many that no unit is silent for all of them
    where, modes = next(net.parameters()), {m: m.training for m in net.modules()}
    every = (*theta, *change(theta))
    try:
        a, *b = (torch.func.functional_call(net.eval(), sub.unflatten(t.to(where)), (x.to(where),)) for t in every)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return all(torch.allclose(a, c, rtol=1e-3, atol=1e-4 * float(a.abs().max())) for c in b)


def _generators(units: int) -> tuple[Int64[Tensor, "_"], Int64[Tensor, "_"]]:
    """Two permutations that all others are made of: each unit one on, and the first two exchanged."""
    rolled, swapped = torch.arange(units).roll(1), torch.arange(units)
    swapped[:2] = swapped[:2].flip(0)
    return rolled, swapped


def random(groups: Groups, m: int, generator: torch.Generator | None = None) -> list[Int64[Tensor, "m _"]]:
    """A random permutation of each group's units for each of m networks, drawn where the generator lives.

    >>> [p.shape for p in random((torch.zeros(3, 7, dtype=int), torch.zeros(5, 2, dtype=int)), 4)]
    [torch.Size([4, 3]), torch.Size([4, 5])]
    """
    where = generator.device if generator else torch.device("cpu")
    return [torch.rand(m, len(g), generator=generator, device=where).argsort(dim=1).to(g.device) for g in groups]


def augment(theta: Float[Array, "K D"], groups: Groups, copies: int,
            generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
    """The networks, followed by randomly permuted copies of them: K (1 + copies) vectors, copy after copy.

    Raises:
        ValueError: a negative number of copies, or what `vectors.vectors` refuses.
    """
    if copies < 0:
        raise ValueError(f"copies is {copies}: expected at least 0")
    theta = vectors.vectors(theta)
    return torch.cat([theta, *(permute(theta, groups, random(groups, len(theta), generator)) for _ in range(copies))])


class Canonical:
    """A step before a generator (`coded.Coded`): hidden units in one order, and on request on one scale.

    Nothing is undone by `decode`: a network in another order of its units is the same function.

    Args:
        net: the network, with its `input_shape`; all of its parameters are in the vectors.
        balanced: whether units are scaled first (`canonical.balance`), where their activations allow it.
        rounds: 1: the order of the first network as it is, by `align`; more: of the mean of what the round before gave, by
            `canonical.match`, wherever the networks start from (3 of `canonical.canonical`).

    Attributes:
        reference: [D], what vectors are brought to; from `fit`.

    Raises:
        ValueError: a network whose layers are not understood, or fewer than one round.
    """

    def __init__(self, net: nn.Module, balanced: bool = False, rounds: int = 1):
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}: expected at least 1")
        sub, self.rounds = subset.select(net, "all"), rounds
        self.groups, self.scalings = groups(net, sub), scalings(net, sub) if balanced else ()

    def fit(self, theta: Float[Array, "K D"]) -> Canonical:
        """Find the reference."""
        theta = canonical.balance(theta, self.scalings)
        self.reference = theta[0].clone() if self.rounds == 1 else canonical.centre(theta, self.groups, rounds=self.rounds)
        return self

    def encode(self, theta: Float[Array, "M D"]) -> Float[Tensor, "M D"]:
        """The same functions in the reference's order."""
        match = align if self.rounds == 1 else canonical.match
        return match(canonical.balance(theta, self.scalings), self.reference, self.groups)

    def decode(self, code: Float[Array, "M D"]) -> Float[Tensor, "M D"]:
        """As they are."""
        return vectors.vectors(code)
