"""One order and one scale of the hidden units for many networks at once: the same functions, as near to each other as can be.

`balance` takes the scale from each unit that has one to give away, `match` the order (weight matching to a reference, Git
Re-Basin, Ainsworth et al. 2023), `canonical` both. They know a network by its `symmetry.groups` and `symmetry.scalings` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pdiff_lib.base import vectors
from pdiff_lib.base.vectors import Array

Groups = tuple[Int64[Tensor, "_ _"], ...]  # a tensor [units numbers] per group
Scaling = tuple[Int64[Tensor, "_ _"], Int64[Tensor, "_ _"]]  # [units incoming] and [units outgoing]
Scalings = tuple[Scaling, ...]
BALANCED = 1e-7  # of a factor, relative: the rounding of float32
SWEEPS = 1000  # over all layers, at most: the minis take 2 to 35, a sequence of six layers 55
NUMBERS = 2**24  # of float64, in work at once


def permute(theta: Float[Array, "M D"], groups: Groups, permutations: Sequence[Int64[Tensor, "M _"]]) -> Float[Tensor, "M D"]:
    """Reorder the hidden units: unit u of the result is unit `permutations[group][u]` of the network.

    Args:
        theta: parameter vectors, raw.
        groups: from `symmetry.groups`.
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


def scaled(theta: Float[Tensor, "M D"], scaling: Scaling, factors: Float[Tensor, "M units"]) -> Float[Tensor, "M D"]:
    """Incoming numbers times, outgoing numbers over a positive factor per unit: the same function.

    >>> scaled(torch.tensor([[1., 2., 3., 4.]]), (torch.tensor([[0], [1]]), torch.tensor([[2], [3]])), torch.tensor([[2., 4.]]))
    tensor([[2.0000, 8.0000, 1.5000, 1.0000]])
    """
    theta, (incoming, outgoing) = theta.clone(), (positions.to(theta.device) for positions in scaling)
    theta[:, incoming] *= factors[..., None]
    theta[:, outgoing] /= factors[..., None]
    return theta


def balance(theta: Float[Array, "K D"], scalings: Scalings) -> Float[Tensor, "K D"]:
    """Scale each hidden unit so that the norms of its incoming and of its outgoing numbers are the same.

    Where layers share numbers, over all of them until nothing moves: of all the scales that a function has, the one with the
    smallest norm of `theta`, wherever the network started. A unit with nothing but zeros on one side stays as it is.

    Args:
        theta: parameter vectors, raw.
        scalings: from `symmetry.scalings`; none: nothing happens.

    Returns:
        New vectors of the same functions (up to rounding).

    Raises:
        ValueError: positions beyond the vectors, or what `vectors.vectors` refuses.

    Source: ENorm (Stock et al. 2019), layers in turn to the smallest norm; the norms are those of whole units, with their biases.

    >>> balance(torch.tensor([[8., 2.]]), ((torch.tensor([[0]]), torch.tensor([[1]])),))
    tensor([[4., 4.]])
    """
    theta = vectors.vectors(theta)
    _within(theta, [positions for scaling in scalings for positions in scaling])
    if not scalings:
        return theta.clone()
    scalings = tuple((i.to(theta.device), o.to(theta.device)) for i, o in scalings)
    return torch.cat([_balanced(part.double(), scalings).float() for part in _parts(theta)])


def _balanced(theta: Float64[Tensor, "M D"], scalings: Scalings) -> Float64[Tensor, "M D"]:
    moving = torch.arange(len(theta), device=theta.device)
    for _ in range(SWEEPS):
        part, change = theta[moving], theta.new_zeros(len(moving))
        for incoming, outgoing in scalings:
            norms = part[:, incoming].norm(dim=2), part[:, outgoing].norm(dim=2)
            factors = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0]).sqrt(), 1.0)
            part, change = scaled(part, (incoming, outgoing), factors), change.maximum(factors.log().abs().amax(1))
        theta[moving] = part
        moving = moving[change > BALANCED]  # each network by itself: the others make no difference to it
        if not len(moving) or len(scalings) == 1:
            break
    return theta


def align(theta: Float[Array, "K D"], reference: Float[Array, "D"], groups: Groups,
          sweeps: int = 100) -> Float[Tensor, "K D"]:
    """Permute each network's hidden units to come as near to the reference as possible, group by group until nothing changes.

    Each step solves one group exactly while the others stay; the distance to the reference never increases, and ends in a
    local minimum.

    Args:
        theta: parameter vectors, raw.
        reference: the vector whose order is taken over.
        groups: from `symmetry.groups`.
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
            theta[:, g] = _taken(theta, g, order)
        if not changed:
            break
    return theta.to(device)


def match(theta: Float[Array, "K D"], reference: Float[Array, "D"], groups: Groups) -> Float[Tensor, "K D"]:
    """Permute each network's hidden units to come near to the reference, whatever order they come in.

    `align` starts from the order that a network has, and may end in another local minimum for another one. This starts
    from layer after layer, each matched by those of its numbers that later layers do not permute (the incoming ones, in a
    sequence of layers). Then, as there, group by group until nothing changes: the distance to the reference does not increase
    on the way. With one hidden layer this is the nearest of all permutations.

    Args:
        theta: parameter vectors, raw.
        reference: the vector whose order is taken over.
        groups: from `symmetry.groups`.

    Returns:
        New vectors of the same functions, the same to the bit for permuted networks (up to ties, and to units that are equal).

    Raises:
        ValueError: a reference of another length, positions beyond the vectors, or what `vectors.vectors` refuses.

    Source: weight matching, Git Re-Basin (Ainsworth et al. 2023), Algorithm 1; all networks at once, only the assignments one by
        one, and these only where the best place of two units is the same. The start is ours.
    """
    theta, reference = vectors.vectors(theta), vectors.vector(reference)
    if reference.shape != theta.shape[1:]:
        raise ValueError(f"the reference has shape {list(reference.shape)}: expected [{theta.shape[1]}]")
    _within(theta, groups)
    groups, reference = tuple(g.to(theta.device) for g in groups), reference.to(theta.device)
    return torch.cat([_descended(_started(part, reference, groups), reference, groups) for part in _parts(theta)])


def _started(theta: Float[Tensor, "M D"], reference: Float[Tensor, "D"], groups: Groups) -> Float[Tensor, "M D"]:
    """An order to start from that does not depend on the order before."""
    theta, later = theta.clone(), torch.zeros(theta.shape[1], dtype=torch.long, device=theta.device)
    for g in groups:
        later[g] += 1
    for g in groups:
        later[g] -= 1
        alone = g[:, (later[g] == 0).all(dim=0)]  # no group that is still to come moves these
        if alone.shape[1]:
            order = _assigned(_gain(theta, reference, alone))
        else:  # heads of attention, whose numbers have an order of their own: by the ranks of the norms
            order = torch.empty(len(theta), len(g), dtype=torch.long, device=theta.device)
            order[:, _by_norm(reference[None], g)[0]] = _by_norm(theta, g)
        theta[:, g] = _taken(theta, g, order)
    return theta


def _descended(theta: Float[Tensor, "M D"], reference: Float[Tensor, "D"], groups: Groups) -> Float[Tensor, "M D"]:
    """Group by group to a local minimum; only networks in which something has changed since that group was matched."""
    open_ = torch.ones(len(groups), len(theta), dtype=torch.bool, device=theta.device)
    while bool(open_.any()):
        for i, g in enumerate(groups):
            rows = open_[i].nonzero()[:, 0]
            gain, stay = _gain(theta[rows], reference, g), torch.arange(len(g), device=theta.device)
            order = _assigned(gain)
            better = gain.gather(2, order[..., None]).sum((1, 2)) - gain.diagonal(dim1=1, dim2=2).sum(1)
            moves = (better > 1e-9 * gain.abs().sum((1, 2))) & (order != stay).any(1)  # ties must not go round in circles
            theta[rows[moves, None, None], g] = _taken(theta[rows[moves]], g, order[moves])
            open_[:, rows[moves]] = True
            open_[i] = False
    return theta


def canonical(theta: Float[Array, "K D"], groups: Groups, scalings: Scalings = (), reference: Float[Array, "D"] | None = None,
              rounds: int = 3) -> Float[Tensor, "K D"]:
    """One order and one scale of the hidden units for all networks: balanced, then matched to `centre`.

    Args:
        theta: parameter vectors, raw.
        groups: from `symmetry.groups`.
        scalings: from `symmetry.scalings`; none: the scales stay as they are.
        reference: what the first round matches to; None: the first network, its units by norm.
        rounds: of matching, at least 1; the later ones match to the mean of what the one before gave.

    Returns:
        New vectors of the same functions. They do not depend on the order or (with scalings, up to rounding) the scale of the
        units that came in; ties apart, and but for that of a reference that was given.

    Raises:
        ValueError: fewer than one round, or what `match` and `balance` refuse.
    """
    theta = balance(theta, scalings)
    start = None if reference is None else balance(vectors.vector(reference, theta.shape[1])[None], scalings)[0]
    return match(theta, centre(theta, groups, start, rounds), groups)


def centre(theta: Float[Array, "K D"], groups: Groups, reference: Float[Array, "D"] | None = None,
           rounds: int = 3) -> Float[Tensor, "D"]:
    """What the last of the rounds matches to: the reference in the first one, then the mean of the matched networks.

    Args:
        theta: parameter vectors, balanced where they can be.
        groups, reference, rounds: as of `canonical`.

    Raises:
        ValueError: as `canonical`.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: expected at least 1")
    theta = vectors.vectors(theta)
    _within(theta, groups)
    if reference is None:
        first = theta[:1].clone()
        for g in (g.to(theta.device) for g in groups):  # a group before those within its units, as `symmetry.groups` has them
            first[:, g] = _taken(first, g, _by_norm(first, g))
        reference = first[0]
    reference = vectors.vector(reference, theta.shape[1], theta.device)
    for _ in range(rounds - 1):
        reference = match(theta, reference, groups).mean(dim=0, dtype=torch.float64).float()
    return reference


def _gain(theta: Float[Tensor, "M D"], reference: Float[Tensor, "D"], g: Int64[Tensor, "U _"]) -> Float64[Tensor, "M U U"]:
    """Of unit v in the place of unit u: the inner product, as the norms stay."""
    return torch.einsum("un,mvn->muv", reference[g].double(), theta[:, g].double())


def _assigned(gain: Float64[Tensor, "M U U"]) -> Int64[Tensor, "M U"]:
    """For each network the unit in each place, with the largest sum of gains."""
    order, places = gain.argmax(dim=2), torch.arange(gain.shape[1], device=gain.device)
    clash = (order.sort(dim=1).values != places).any(dim=1).nonzero()[:, 0]  # elsewhere each place has the best there is
    if len(clash):
        solved = [torch.from_numpy(linear_sum_assignment(m, maximize=True)[1]) for m in gain[clash].cpu().numpy()]
        order[clash] = torch.stack(solved).to(gain.device)
    return order


def _taken(theta: Float[Tensor, "M D"], g: Int64[Tensor, "U n"], order: Int64[Tensor, "M U"]) -> Float[Tensor, "M U n"]:
    """The numbers of a group with unit `order[u]` in place u."""
    return theta.gather(1, g[order].flatten(1)).view(len(theta), *g.shape)


def _by_norm(theta: Float[Tensor, "M D"], g: Int64[Tensor, "U _"]) -> Int64[Tensor, "M U"]:
    """Units from the largest to the smallest norm, which no other permutation changes."""
    return theta[:, g].double().square().sum(dim=2).argsort(dim=1, descending=True)


def _parts(theta: Float[Tensor, "K D"]) -> tuple[Tensor, ...]:
    """Networks that are in work together: as many as bound the memory of their float64 copies."""
    return theta.split(max(1, NUMBERS // max(1, theta.shape[1])))


def _within(theta: Float[Tensor, "K D"], positions: list[Tensor] | Groups) -> None:
    last = max((int(p.max()) for p in positions if p.numel()), default=0)
    if last >= theta.shape[1]:
        raise ValueError(f"theta has {theta.shape[1]} numbers per vector: expected more than {last}, the last position of a unit; "
                         "do vectors and groups belong to the same network?")
