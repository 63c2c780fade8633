"""Permutations of hidden units: networks that differ in nothing but the order of their units are the same function.

Independently trained networks number their units at random. `align` brings them to the order of a reference by matching
weights (Git Re-Basin, Ainsworth et al. 2023, Algorithm 1); `augment` shows a generator several orders of each network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pdiff_lib.base import vectors
from pdiff_lib.base.vectors import Array
from pdiff_lib.networks import subset
from pdiff_lib.networks.classifiers import _Residual

SUPPORTED = "hyperrep-cnn, mlp-mini, convnet-mini, resnet-mini, or another sequence of linear, convolution and norm layers"
UNITWISE = (nn.LeakyReLU, nn.ReLU, nn.GELU, nn.ELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.MaxPool2d, nn.AvgPool2d,
            nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout)  # do to each unit the same, whatever its number
Groups = tuple[Int64[Tensor, "_ _"], ...]  # a tensor [units numbers] per group


def groups(net: nn.Module, sub: subset.Subset) -> Groups:
    """Which numbers of a parameter vector belong to which hidden unit, for each layer of hidden units.

    Derived from the order of the layers: a layer's outputs, its bias, the layer norms after it and the inputs of the next
    layer (through flattening: as many inputs per channel as it has positions; through a skip connection: those of both
    branches) permute together. Then checked: permutations that generate all others must leave the function as it is.

    Args:
        net: the network, with its `input_shape`.
        sub: all of its parameters.

    Returns:
        One tensor per group: row u holds the positions in `theta` that belong to unit u, in the same order for every
        unit. Permuting units is permuting rows.

    Raises:
        ValueError: a subset other than "all", or a network whose layers are not understood.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)); net.input_shape = (2,)
    >>> groups(net, subset.select(net, "all"))[0]
    tensor([[ 0,  1,  6,  9],
            [ 2,  3,  7, 10],
            [ 4,  5,  8, 11]])
    """
    if sub != subset.select(net, "all"):
        raise ValueError(f"a subset of {len(sub.names)} tensors: expected all of the network's, as a permutation of hidden "
                         "units moves numbers in every layer")
    children = [m for m in net.children()]
    inner = net if isinstance(net, nn.Sequential) else children[0] if len(children) == 1 else net
    prefix = "" if inner is net else next(n for n, _ in net.named_children()) + "."
    found: list[list[Tensor]] = []
    last = _walk(inner, prefix, None, _positions(sub), found)
    together = tuple(torch.cat(members, dim=1) for members in found if members is not last)
    if not together or not _keeps_the_function(net, sub, together):
        raise ValueError(f"no permutations were found that leave the function of {type(net).__name__} as it is: "
                         f"expected {SUPPORTED}")
    return together


def _positions(sub: subset.Subset) -> dict[str, Int64[Tensor, "..."]]:
    """Where the numbers of each tensor stand in `theta`."""
    return {name: p.long() for name, p in sub.unflatten(torch.arange(sub.numel, dtype=torch.float64)).items()}


def _walk(module: nn.Module, prefix: str, units: list[Tensor] | None, at: dict[str, Tensor], found: list[list[Tensor]]):
    """Follow the units through a layer: adds to the group `units` what belongs to them (None: the input, which does not
    permute), opens new groups in `found`; returns the group of the layer's output."""
    if isinstance(module, UNITWISE):
        return units
    if isinstance(module, nn.Sequential):
        for name, layer in module.named_children():
            units = _walk(layer, f"{prefix}{name}.", units, at, found)
        return units
    if isinstance(module, _Residual):
        out = _walk(module.layers, f"{prefix}layers.", units, at, found)
        found[:] = [members for members in found if members is not out]  # x + f(x): one order for both
        if units is not None and out is not units:
            units += out
        return units
    own = {name: at[prefix + name] for name, _ in module.named_parameters(recurse=False)}
    if isinstance(module, nn.LayerNorm):
        if units is not None:
            units += [_rows(positions, 0, units) for positions in own.values()]
        return units
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        if units is not None:
            units.append(_rows(own["weight"], 1, units))
        found.append([positions.flatten(1) if positions.ndim > 1 else positions[:, None] for positions in own.values()])
        return found[-1]
    raise ValueError(f"no permutations are known for {type(module).__name__} ({prefix.rstrip('.') or 'the network'}): "
                     f"expected {SUPPORTED}")


def _rows(positions: Tensor, axis: int, units: list[Tensor]) -> Int64[Tensor, "units numbers"]:
    """The positions by unit along an axis, on which each unit may have several neighbouring entries (after flattening)."""
    count = len(units[0])
    if positions.shape[axis] % count:
        raise ValueError(f"{positions.shape[axis]} inputs after {count} units: expected a multiple, {SUPPORTED}")
    return positions.movedim(axis, 0).reshape(count, -1)


@torch.no_grad()
def _keeps_the_function(net: nn.Module, sub: subset.Subset, together: Groups) -> bool:
    generator = torch.Generator().manual_seed(0)
    theta = sub.flatten(net).cpu()[None]
    theta = theta + 0.1 * torch.randn(theta.shape, generator=generator)  # layer norms start as all ones
    moved = permute(theta.expand(2, -1), together, [torch.stack(_generators(len(g))) for g in together])
    x = torch.randn(64, *net.input_shape, generator=generator)  # so many that no unit is silent for all of them
    where, modes = next(net.parameters()), {m: m.training for m in net.modules()}
    try:
        a, *b = (torch.func.functional_call(net.eval(), sub.unflatten(t.to(where)), (x.to(where),)) for t in (*theta, *moved))
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


def permute(theta: Float[Array, "M D"], groups: Groups, permutations: Sequence[Int64[Tensor, "M _"]]) -> Float[Tensor, "M D"]:
    """Reorder the hidden units: unit u of the result is unit `permutations[group][u]` of the network.

    Args:
        theta: parameter vectors, raw.
        groups: from `groups`.
        permutations: for each group and each network.

    Returns:
        New vectors of the same functions.

    Raises:
        ValueError: not one permutation per group and network, or what `vectors.vectors` refuses.

    >>> permute(torch.tensor([[1., 2., 3., 4.]]), (torch.tensor([[0, 2], [1, 3]]),), [torch.tensor([[1, 0]])])
    tensor([[2., 1., 4., 3.]])
    """
    theta, expected = vectors.vectors(theta).clone(), [(len(theta), len(g)) for g in groups]
    if [tuple(p.shape) for p in permutations] != expected:
        raise ValueError(f"permutations of shapes {[tuple(p.shape) for p in permutations]}: expected {expected}")
    for positions, order in zip(groups, permutations):
        if bool((order.sort(dim=1).values != torch.arange(len(positions), device=order.device)).any()):
            raise ValueError(f"permutations of {len(positions)} units do not hold each of them once: expected that, as units "
                             "would be lost")
        positions = positions.to(theta.device)
        moved = positions[order.to(theta.device)].flatten(1)
        theta[:, positions.flatten()] = theta.gather(1, moved)
    return theta


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


def align(theta: Float[Array, "K D"], reference: Float[Array, "D"], groups: Groups,
          sweeps: int = 100) -> Float[Tensor, "K D"]:
    """Permute each network's hidden units to come as near to the reference as possible, group by group until nothing changes.

    Each step solves one group exactly while the others stay; the distance to the reference never increases, and ends in a
    local minimum.

    Args:
        theta: parameter vectors, raw.
        reference: the vector whose order is taken over.
        groups: from `groups`.
        sweeps: over all groups, at most.

    Returns:
        New vectors of the same functions.

    Raises:
        ValueError: a reference of another length, or what `vectors.vectors` refuses.

    Source: weight matching, Git Re-Basin (Ainsworth et al. 2023), Algorithm 1; groups in the order of the layers, where the
        algorithm has a random order. All networks together.
    """
    theta, reference = vectors.vectors(theta), vectors.vector(reference)
    if reference.shape != theta.shape[1:]:
        raise ValueError(f"the reference has shape {list(reference.shape)}: expected [{theta.shape[1]}]")
    device, theta, reference = theta.device, theta.cpu().clone(), reference.cpu().double()
    for _ in range(sweeps):
        changed = False
        for g in groups:
            gain = torch.einsum("un,kvn->kuv", reference[g], theta[:, g].double())  # of unit v in the place of unit u
            order = torch.stack([torch.from_numpy(linear_sum_assignment(m, maximize=True)[1]) for m in gain.numpy()])
            better = gain.gather(2, order[..., None]).sum((1, 2)) - gain.diagonal(dim1=1, dim2=2).sum(1)
            order[better <= 1e-9 * gain.abs().sum((1, 2))] = torch.arange(len(g))  # ties must not go round in circles
            changed |= bool((order != torch.arange(len(g))).any())
            theta = permute(theta, (g,), [order])
        if not changed:
            break
    return theta.to(device)


class Canonical:
    """A step before a generator (`coded.Coded`): hidden units in the order of the first network's, as `align` brings them.

    Nothing is undone by `decode`: a network in another order of its units is the same function.

    Args:
        net: the network, with its `input_shape`; all of its parameters are in the vectors.

    Raises:
        ValueError: a network whose layers are not understood.
    """

    def __init__(self, net: nn.Module):
        self.groups = groups(net, subset.select(net, "all"))

    def fit(self, theta: Float[Array, "K D"]) -> Canonical:
        """Take the first network for the reference."""
        self.reference = vectors.vectors(theta)[0].clone()
        return self

    def encode(self, theta: Float[Array, "M D"]) -> Float[Tensor, "M D"]:
        """The same functions in the reference's order."""
        return align(theta, self.reference, self.groups)

    def decode(self, code: Float[Array, "M D"]) -> Float[Tensor, "M D"]:
        """As they are."""
        return vectors.vectors(code)
