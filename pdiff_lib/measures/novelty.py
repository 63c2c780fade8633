"""New and good at once? How far networks lie from all originals, whatever the order of their hidden units, and how good they are there.

A network with its hidden units in another order is the same function, so a distance is that after the best matching of the units.
Other symmetries (of ReLU: a unit's inputs times s, its outputs by s) are not looked for: balance all networks before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pdiff_lib.base import vectors
from pdiff_lib.base.score import Score
from pdiff_lib.base.vectors import Array
from pdiff_lib.networks.symmetry import Groups, permute

BLOCK = 2**22  # float64 numbers per intermediate result: 32 MB
CANDIDATES = 16  # originals that a network is matched with at a time
NOVEL = (0.5, 0.75, 1.0, 2.0)  # relative distances from which on a network is novel
BAR = 0.1  # of the originals may be worse than a performant network


def matched_distances(theta: Float[Array, "M D"], originals: Float[Array, "K D"], groups: Groups | None = None,
                      exclude_self: bool = False) -> tuple[Float[Tensor, "M"], Int64[Tensor, "M"]]:
    """Euclidean distance, in raw units, to the nearest original after the best matching of hidden units, and the original's index.

    Exact for one group, and for none: the best order is an assignment, solved where a lower bound leaves a chance to come nearer.
    For several groups **an upper bound**: of each network at least the `CANDIDATES` originals with the lowest bounds and those
    with the shortest distances as given are matched (by `matched`, to a local optimum), unless their bound rules them out.

    Args:
        theta, originals: raw parameter vectors.
        groups: from `symmetry.groups`; None: units as they are.
        exclude_self: the networks **are** the originals, row by row, and none is compared with itself.

    Raises:
        ValueError: what `vectors.vectors` refuses, originals or groups of another length, `exclude_self` with other vectors.
    """
    theta, originals, groups = _both(theta, originals, groups)
    if exclude_self and (len(theta) != len(originals) or len(theta) < 2):
        raise ValueError(f"exclude_self with {len(theta)} networks and {len(originals)} originals: expected at least two, themselves")
    return _nearest(theta, originals, groups, torch.arange(len(theta), device=theta.device) if exclude_self else None)


def matched(theta: Float[Array, "M D"], others: Float[Array, "M D"], groups: Groups) -> Float[Tensor, "M D"]:
    """Permute the hidden units of each network to come as near as possible to another one's, row by row (Git Re-Basin, Algorithm 1).

    Exact for one group. Of several, one is matched while the others stay, until nothing changes: a local optimum, never farther than
    as given. Of two starts the nearer end counts: as given, and each group matched without what later ones share (finds copies).

    Raises:
        ValueError: what `vectors.vectors` refuses, another number of others, vectors or groups of another length.
    """
    theta, others, groups = _both(theta, others, groups)
    if len(theta) != len(others):
        raise ValueError(f"{len(theta)} networks and {len(others)} others: expected one for each")
    found = []
    for a, b in zip(*(t.split(max(1, BLOCK // t.shape[1])) for t in (theta, others))):
        ends = torch.cat([a, _sweep(a, b, groups, forward=True)])
        for _ in range(100):
            before, ends = ends, _sweep(ends, b.repeat(2, 1), groups)
            if torch.equal(before, ends):
                break
        nearer = (ends.view(2, *a.shape).double() - b.double()).square().sum(dim=2).argmin(dim=0)
        found.append(ends.view(2, *a.shape)[nearer, torch.arange(len(a), device=a.device)])
    return torch.cat(found)


def _sweep(theta: Tensor, others: Tensor, groups: Groups, forward: bool = False) -> Float[Tensor, "M D"]:
    """Match each group once; `forward`: by the numbers that no later group moves (heads of attention: by all of them, sorted)."""
    for i, g in enumerate(groups):
        alone = ~torch.isin(g, torch.cat([g[:0, 0], *(h.flatten() for h in groups[i + 1:])])).any(dim=0)
        by = g[:, alone] if forward and alone.any() else g
        a, b = ((t[:, by].sort(dim=2).values if forward and not alone.any() else t[:, by]).double() for t in (theta, others))
        gain = torch.einsum("mun,mvn->muv", b, a)  # of unit v in the place of unit u
        order = torch.from_numpy(np.stack([linear_sum_assignment(m, maximize=True)[1] for m in gain.cpu().numpy()])).to(gain.device)
        better = gain.gather(2, order[..., None]).sum((1, 2)) - gain.diagonal(dim1=1, dim2=2).sum(1)
        order[better <= 1e-12 * gain.abs().sum((1, 2))] = torch.arange(len(g), device=gain.device)  # no circles through ties
        theta = permute(theta, (g,), [order])
    return theta


def _nearest(theta: Tensor, originals: Tensor, groups: Groups, own: Tensor | None) -> tuple[Float[Tensor, "M"], Int64[Tensor, "M"]]:
    """As `matched_distances`; own: [M] the original that each network is, None: they are others."""
    best = torch.full((len(theta),), torch.inf, dtype=torch.float64, device=theta.device)
    nearest = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
    for rows, columns, bound in _bounds(theta, originals, groups, own):
        a, b, least, index = theta[rows], originals[columns], best[rows], nearest[rows]  # views
        order = bound.argsort(dim=1)
        if len(groups) > 1:
            order = torch.cat([o[:, :CANDIDATES] for o in (order, _squares(a.double(), b.double()).argsort(dim=1))], dim=1)
        for tried in order.split(CANDIDATES, dim=1):
            row, slot = (bound.gather(1, tried) < least[:, None]).nonzero(as_tuple=True)
            if not len(row):
                break  # no bound of a later one is lower than the lowest
            pairs = a[row], b[tried[row, slot]]
            squares = torch.full(tried.shape, torch.inf, dtype=torch.float64, device=theta.device)
            squares[row, slot] = (matched(*pairs, groups).double() - pairs[1].double()).square().sum(dim=1)
            value, where = squares.min(dim=1)
            index[:] = (columns.start + tried.gather(1, where[:, None])[:, 0]).where(value < least, index)
            least[:] = torch.minimum(value, least)
    return best.sqrt().float(), nearest


def _bounds(theta: Tensor, originals: Tensor, groups: Groups, own: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Lower bounds [m k] of squared distances, all pairs in blocks (rows, columns): what holds in any order. They add the distance of
    numbers that stay, that of numbers that several groups move, sorted (rearrangement inequality), and of those that one group moves
    a bound of the assignment."""
    orbit, before = torch.arange(theta.shape[1], device=theta.device), None  # numbers that can come to each other's places
    while before is None or not torch.equal(orbit, before):
        before = orbit.clone()
        for g in groups:
            orbit[g] = orbit[g].amin(dim=0)
    many = orbit.bincount()[orbit]
    units = [g[:, many[g[0]] == len(g)] for g in groups if len(g) > 1]
    left = (many > 1).index_fill(0, torch.cat([orbit[:0], *(u.flatten() for u in units)]), False)
    several = [orbit.where(left & (many == n), -1).argsort(stable=True)[-int((left & (many == n)).sum()):].view(-1, n)
               for n in many[left].unique().tolist()]

    def orderless(v: Tensor) -> Tensor:
        return torch.cat([v[:, many == 1], *(v[:, s].sort(dim=2).values.flatten(1) for s in several)], dim=1).double()

    size = max((len(g) for g in groups), default=1) ** 2
    k = min(len(originals), max(1, BLOCK // size))
    m = max(1, BLOCK // max(k * size, CANDIDATES * theta.shape[1]))
    for column in range(0, len(originals), k):
        b = originals[column:column + k]
        fixed, by_unit = orderless(b), [b[:, u].double().transpose(0, 1).flatten(0, 1) for u in units]  # [U k n]: k runs fastest
        for row in range(0, len(theta), m):
            a = theta[row:row + m]
            bound = _squares(orderless(a), fixed)
            for u, others in zip(units, by_unit):
                bound += _least(_squares(a[:, u].double().flatten(0, 1), others).view(len(a), len(u), len(u), len(b)))
            if own is not None:
                bound[own[row:row + m, None] == torch.arange(column, column + len(b), device=own.device)] = torch.inf
            yield slice(row, row + m), slice(column, column + k), bound


def _squares(a: Float[Tensor, "m n"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m k"]:
    return torch.addmm(b.square().sum(dim=1).expand(len(a), -1), a, b.T, alpha=-2) + a.square().sum(dim=1)[:, None]


def _least(cost: Float[Tensor, "m U U k"]) -> Float[Tensor, "m k"]:
    """No assignment costs less: minima of rows, then of columns of what is left, or the other way round (both are dual feasible)."""
    rows, columns = cost.amin(dim=2), cost.amin(dim=1)
    after_rows, after_columns = (cost - rows[:, :, None]).amin(dim=1), (cost - columns[:, None]).amin(dim=2)
    return torch.maximum(rows.sum(1) + after_rows.sum(1), columns.sum(1) + after_columns.sum(1))


def _both(theta: Array, others: Array, groups: Groups | None) -> tuple[Tensor, Tensor, Groups]:
    """All where theta is, the vectors of one length."""
    others = vectors.vectors(others)
    theta, groups = vectors.vectors(theta, others.shape[1]), groups or ()
    if (longest := max((int(g.max()) + 1 for g in groups), default=0)) > theta.shape[1]:
        raise ValueError(f"groups of vectors of at least {longest} numbers: expected {theta.shape[1]}")
    return theta, others.to(theta.device), tuple(g.to(theta.device) for g in groups)


def leave_one_out(originals: Float[Array, "K D"], groups: Groups | None = None, at_most: int = 512,
                  generator: torch.Generator | None = None) -> float:
    """Median of the originals' matched distances to their nearest other one: the unit of relative distance. Of more than `at_most`
    originals so many are drawn (`generator`; None: one with seed 0) and compared with all others. ValueError: what `matched_distances`
    refuses, `at_most` below 1, or a median of 0, as most are copies of others."""
    _, originals, groups = _both(vectors.vectors(originals, at_least=2), originals, groups)
    if at_most < 1:
        raise ValueError(f"at_most is {at_most}: expected at least 1")
    generator = generator or torch.Generator().manual_seed(0)
    some = torch.randperm(len(originals), generator=generator, device=generator.device)[:at_most].to(originals.device)
    if (unit := float(_nearest(originals[some], originals, groups, some)[0].quantile(0.5))) > 0:
        return unit
    raise ValueError(f"the median distance among {len(originals)} originals is 0: expected fewer copies")


def novel_and_performant(score: Float[Tensor, "M"], distance: Float[Tensor, "M"], bar: float, unit: float,
                         c: Sequence[float] = NOVEL, better: str = "higher") -> dict[float, float]:
    """Share of networks at a distance of at least c units **and** with a finite score at least as good as the bar, for each c.

    >>> novel_and_performant(torch.tensor([.9, .9, .5, torch.nan]), torch.tensor([1., 3., 3., 3.]), 0.8, 2.0, (.5, 1.))
    {0.5: 0.5, 1.0: 0.25}
    """
    good = torch.isfinite(score) & ((score - bar) * _sign(better) >= 0)
    return {share: float((good & (distance.to(good.device) >= share * unit)).double().mean()) for share in c}


def _sign(better: str) -> int:
    return 1 if Score("score", better=better).better == "higher" else -1


def data_copying(generated: Float[Tensor, "M"], held_out: Float[Tensor, "N"]) -> float:
    """Z_U, the normalised Mann-Whitney U of distances to the nearest training network, ties corrected: far below 0, generated
    networks are nearer than held-out ones, as copies are. 0 also where all distances are equal. ValueError: one that is not finite.

    Source: Meehan et al. 2020 (arXiv 2004.05675), Z_U over the whole space, not cell by cell.
    """
    generated, held_out, m, n = generated.double(), held_out.to(generated).double(), len(generated), len(held_out)
    if not torch.isfinite(torch.cat([generated, held_out])).all():
        raise ValueError("distances with NaN or infinity: expected finite ones; count what is broken, then leave it out")
    u = sum(float(torch.searchsorted(held_out.sort().values, generated, right=right).double().sum()) / 2 for right in (False, True))
    ties = torch.cat([generated, held_out]).unique(return_counts=True)[1].double()
    variance = m * n / 12 * (m + n + 1 - float((ties**3 - ties).sum()) / ((m + n) * (m + n - 1)))
    return (u - m * n / 2) / variance**0.5 if len(ties) > 1 else 0.0


def spread(theta: Float[Array, "M D"], originals: Float[Array, "K D"]) -> float:
    """Standard deviation of the networks, at least two, over that of the originals: roots of the parameters' mean variance over
    networks, units as they are. 1: as diverse; below: collapsing."""
    theta, originals, _ = _both(vectors.vectors(theta, at_least=2), vectors.vectors(originals, at_least=2), None)
    return float((theta.double().var(dim=0).mean() / originals.double().var(dim=0).mean()).sqrt())


class Above(NamedTuple):
    """Score above the frontier (positive: better) with its 95 % interval."""
    value: float
    low: float
    high: float


def above_frontier(score: Float[Tensor, "M"], distance: Float[Tensor, "M"], frontier: Sequence[tuple[Tensor, Tensor]],
                   bootstrap: int = 1000, generator: torch.Generator | None = None, better: str = "higher") -> Above:
    """How far a method's mean score lies above the best that baselines reach at no smaller a mean distance to the originals: one of
    them alone, or a mixture of two (some networks from one, the rest from the other: both means are then between theirs).

    Args:
        frontier: distances and scores of each baseline at each strength; one with a score that is not finite is left out.
        bootstrap: how often the method's networks and each baseline's are drawn anew, with replacement (`generator`; None: seed 0).

    Returns:
        NaN beyond the baselines' largest mean distance (give them more strength), and for a mean score that is not finite. The
        interval is over the draws that have a value, and NaN where fewer than 95 % have.

    Raises:
        ValueError: no baseline with finite scores, no draws, or other than a distance for each score.
    """
    sets = [(distance, score), *((d, s) for d, s in frontier if torch.isfinite(s).all())]
    sizes = [(len(d), len(s)) for d, s in ((distance, score), *frontier)]
    if len(sets) < 2 or bootstrap < 1 or any(m != n or m < 1 for m, n in sizes):
        raise ValueError(f"{len(sets) - 1} baselines with finite scores, {bootstrap} draws, distances and scores of {sizes} networks: "
                         "expected at least one of each, and a distance for each score")
    generator, means = generator or torch.Generator().manual_seed(0), []
    for d, s in sets:
        drawn = torch.randint(len(d), (bootstrap, len(d)), generator=generator, device=generator.device).cpu()
        drawn = torch.cat([torch.arange(len(d))[None], drawn])  # first, the networks as they are
        means.append(torch.stack([d.double().cpu()[drawn].mean(dim=1), _sign(better) * s.double().cpu()[drawn].mean(dim=1)]))
    (x, y), (at, reached) = means[0], torch.stack(means[1:], dim=-1)  # [1 + bootstrap], [1 + bootstrap, B]
    far, (left, right) = at >= x[:, None], (at[:, :, None], at[:, None])
    share = (x[:, None, None] - left) / (right - left)
    mixed = reached[:, :, None] + share * (reached[:, None] - reached[:, :, None])
    best = torch.cat([reached.where(far, -torch.inf), mixed.where(~far[:, :, None] & far[:, None], -torch.inf).flatten(1)], dim=1).amax(1)
    value = (y - best).where(far.any(dim=1), torch.nan)
    known = value[1:][~value[1:].isnan()]
    return Above(float(value[0]), *(float(known.quantile(q)) if len(known) >= 0.95 * bootstrap else torch.nan for q in (0.025, 0.975)))


@dataclass(frozen=True)
class Reference:
    """What the networks of a zoo's methods are measured against, made once by `of`.

    Attributes:
        unit: `leave_one_out` of the originals.
        bar: the score that all but the worst tenth (`BAR`) of the originals reach.
        held_out_distances: [N] matched, of networks that no method has seen, to the nearest original.
    """

    originals: Float[Tensor, "K D"]
    groups: Groups | None
    better: str
    unit: float
    bar: float
    held_out_distances: Float[Tensor, "N"]

    @classmethod
    def of(cls, originals: Float[Array, "K D"], held_out: Float[Array, "N D"], score_of_originals: Float[Tensor, "K"],
           groups: Groups | None = None, better: str = "higher", at_most: int = 512, generator: torch.Generator | None = None) -> Reference:
        """One finite score per original, `better` "higher" or "lower" (else ValueError); the rest as for `leave_one_out`."""
        originals, quantile = vectors.vectors(originals, at_least=2), BAR if _sign(better) > 0 else 1 - BAR
        if len(score_of_originals) != len(originals) or not torch.isfinite(score_of_originals).all():
            raise ValueError(f"scores {score_of_originals} of {len(originals)} originals: expected a finite one each")
        unit, bar = leave_one_out(originals, groups, at_most, generator), float(score_of_originals.double().quantile(quantile))
        return cls(originals, groups, better, unit, bar, matched_distances(held_out, originals, groups)[0])

    def measure(self, theta: Float[Array, "M D"], score: Float[Tensor, "M"],
                distance: Float[Tensor, "M"] | None = None) -> dict[str, float]:
        """A row of a table: mean and deviation of the finite scores, the share of others; median and mean relative distance, share that
        is novel and performant at each c (`np_0.5`), Z_U, spread. `distance`: `matched_distances`, where they are known already."""
        distance = matched_distances(theta, self.originals, self.groups)[0] if distance is None else distance
        if not len(score) == len(theta) == len(distance):
            raise ValueError(f"{len(score)} scores and {len(distance)} distances of {len(theta)} networks: expected one each")
        finite, relative = score[torch.isfinite(score)].double(), distance.double() / self.unit
        return {"score": float(finite.mean()), "score_std": float(finite.std(correction=0)), "not_finite": 1 - len(finite) / len(score),
                "distance": float(relative.quantile(0.5)), "distance_mean": float(relative.mean()),
                **{f"np_{c:g}": v for c, v in novel_and_performant(score, distance, self.bar, self.unit, better=self.better).items()},
                "z_u": data_copying(distance, self.held_out_distances), "spread": spread(theta, self.originals)}
