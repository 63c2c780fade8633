"""Is it more than averaging? What a method's networks are, cost and are good for, and whether simpler ones do the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.base import score as scores
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.vectors import Array
from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.measures import novelty, similarity
from pdiff_lib.tasks.classification import Classification
from pdiff_lib.zoos.zoo import Zoo

BAGS = (1, 2, 5, 10, 50)
DRAWS = 20  # random ensembles of a size


class Audited(Experiment):
    """An `Experiment` whose methods do not see all of its originals, and whose networks are measured as in an `arena.Arena`.

    The arena splits the originals and brings them to one order of their hidden units, where these are understood; methods learn
    from the originals as they are. All test items count, as nothing here is chosen by any of them.

    Args:
        recipe: all settings; methods learn from `k_checkpoints` originals.
        store, device, progress, shared: as for `Experiment`.
        held_out: how many originals there are beside these, which no method sees: of consecutive saves evenly spread ones, of
            independent networks the last. At least two.

    Attributes:
        arena: the split, and what is known of hidden units.

    Raises:
        ValueError: checkpoints of the user's own, which are all learned from; what `Experiment` and `Arena` refuse.
    """

    def __init__(self, recipe: Recipe, *arguments: Any, held_out: int, **others: Any):
        super().__init__(recipe, *arguments, **others)
        if self.files:
            raise ValueError(f"checkpoints {recipe.own.checkpoints!r} with held_out = {held_out}: expected none, as methods learn from all "
                             "of those (an Experiment does without held-out networks)")
        self.arena = Arena(recipe, held_out, store=self.store, device=str(self.device), progress=self.progress, shared=self._shared)

    @cached_property
    def zoo(self) -> Zoo:
        """The originals that methods learn from."""
        whole = self.arena.experiment.zoo
        z = Zoo(self.arena.originals["raw"], whole.names, whole.shapes, torch.empty(0))
        self._kept.keep(ORIGINAL, z.theta)
        return z

    def theta(self, name: str) -> Float[Tensor, "M D"]:
        """The networks of a method, as of an `Experiment`; `arena.HELD_OUT`: the originals that no method sees."""
        return self.arena.held if name == HELD_OUT else super().theta(name)

    @cached_property
    def reference(self) -> novelty.Reference:
        """The originals as the arena's yardstick has them, with their scores on all test items."""
        a = self.arena
        return novelty.Reference.of(a.originals[a.orders[0]], a.canonical(a.held), self.judged(ORIGINAL).score, a.units,
                                    better=self.task.score.better)

    def frame_of(self, name: str, theta: Float[Array, "M D"]) -> pd.DataFrame:
        """The rows of `Experiment.frame`, and `relative_distance`: to the nearest original, after the best matching of hidden units
        where these are understood, 1 = the originals' own median."""
        r, networks = self.reference, self.arena.canonical(theta)
        found = novelty.matched_distances(networks, r.originals, r.groups, exclude_self=name == ORIGINAL)[0]
        return super().frame_of(name, theta).assign(relative_distance=(found / r.unit).cpu().numpy())

    def measured(self, name: str) -> dict[str, float]:
        """What the yardstick says of a method: `relative_distance` (median) and `mean_distance` (relative as well), N&P at each c
        (`np_0.5`), `z_u`, `spread`; see `novelty.Reference.measure`."""
        rows = self.frame([name])
        times = 1 if len(rows) > 1 else 2  # a method whose samples are all the same: no spread
        score, distance = (torch.tensor(rows[c].to_numpy()).repeat(times) for c in (self.task.score.column, "relative_distance"))
        theta = self.arena.canonical(self.theta(name)).repeat(times, 1)
        found = self.reference.measure(theta, score, distance * self.reference.unit)
        return {"relative_distance": found["distance"], "mean_distance": found["distance_mean"],
                **{k: v for k, v in found.items() if k.startswith("np_") or k in ("z_u", "spread")}}


def ensemble_accuracy(predictions: Integer[Tensor, "M N"], y: Integer[Tensor, "N"], size: int, draws: int = DRAWS,
                      generator: torch.Generator | None = None) -> float:
    """Accuracy of the majority vote of `size` different random networks, mean over draws.

    Args:
        predictions: class per network and image; -1: none (`evaluate.NO_CLASS`), which is no vote.
        y: true classes.
        size: voters; of equal votes, that of the first voter's class counts, then the lowest class.
        draws: how many random ensembles.
        generator: which ones.

    Returns:
        A fraction; NaN when there are fewer than `size` networks. Where nobody votes, the answer is wrong.

    Source: bagging of generated networks, as in BEND (arXiv 2403.15766); the vote is of classes, not of scores.

    >>> y = torch.tensor([0, 1, 2]); ensemble_accuracy(torch.tensor([[0, 1, 0], [0, 0, 2], [1, 1, 2]]), y, 3)
    1.0
    """
    if size > len(predictions):
        return float("nan")
    predictions, y, found = predictions.long().cpu(), y.cpu(), []
    classes = int(max(predictions.max(), y.max())) + 1
    predictions = predictions.where(predictions >= 0, classes)  # a column of its own, which is not counted
    for _ in range(draws if size < len(predictions) else 1):
        where = generator.device if generator else predictions.device
        votes = predictions[torch.randperm(len(predictions), generator=generator, device=where)[:size].cpu()]
        counts = torch.zeros(predictions.shape[1], classes + 1).scatter_add_(1, votes.T, torch.ones(votes.T.shape))
        counts.scatter_add_(1, votes[:1].T, torch.full((votes.shape[1], 1), 0.5))
        most, winner = counts[:, :classes].max(dim=1)
        found.append(((winner == y) & (most > 0)).double().mean())
    return float(torch.stack(found).mean())


def table(experiment: Experiment, names: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per method.

    Columns: those of `Experiment.summary`, `pairwise` (similarity among its networks), `bag_1` to `bag_50` (accuracy of
    their vote; of another task than classification the score of their mean output), `fit_seconds` and `sample_seconds` (as
    computed; NaN for the originals), and of an `Audited` those of `Audited.measured`.
    """
    summary = experiment.summary(list(names) if names else None)
    rows = {}
    for name in summary.index:
        bags = {f"bag_{size}": _together(experiment, name, size, experiment.generator(f"bag {size}")) for size in BAGS}
        spent = experiment.seconds.get(name, {})
        rows[name] = {"pairwise": similarity.pairwise(experiment.wrong(name)), **bags,
                      **{f"{verb}_seconds": spent.get(verb, float("nan")) for verb in ("fit", "sample")},
                      **(experiment.measured(name) if isinstance(experiment, Audited) else {})}
    return summary.join(pd.DataFrame.from_dict(rows, orient="index")).rename_axis(columns=summary.columns.name)


def _together(experiment: Experiment, name: str, size: int, generator: torch.Generator) -> float:
    outputs, task = experiment.predictions(name), experiment.task
    if isinstance(task, Classification):
        return ensemble_accuracy(outputs, task.y_test, size, generator=generator)
    if size > len(outputs):
        return float("nan")
    chosen = [torch.randperm(len(outputs), generator=generator)[:size] for _ in range(DRAWS if size < len(outputs) else 1)]
    means = torch.stack([outputs[part].mean(dim=0) for part in chosen])
    return float(task.judged(means, experiment.predictions(ORIGINAL) if task.relative else None).score.mean())


def above(accuracy: float, similar: float, others_accuracy: Float[Tensor, "B"], others_similar: Float[Tensor, "B"]) -> float:
    """How far a method lies above the frontier of others, in accuracy.

    The frontier at a similarity is the best mean accuracy that the others reach at no more similarity to the originals: one of
    them alone, or a mixture of two (some networks from one, the rest from the other: both means are then between theirs).

    Returns:
        Its accuracy less the frontier's; NaN where all others are more similar to the originals than it.

    Source: `novelty.above_frontier`, of means; the distance is the similarity's negative.

    >>> round(above(0.81, 0.6, torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0.2, 0.5, 0.9])), 3)
    -0.015
    """
    if not torch.isfinite(others_accuracy).any():
        return float("nan")
    points = [(-s, a) for s, a in zip(others_similar.double()[:, None], others_accuracy.double()[:, None])]
    own = torch.tensor([[accuracy], [-similar]], dtype=torch.float64)
    return novelty.above_frontier(*own, points, bootstrap=1).value


def frontier(accuracy: Float[Tensor, "B"], similar: Float[Tensor, "B"]) -> list[int]:
    """Which of some methods no other one beats, nor a mixture of two others; in the order of rising similarity.

    One beats another with at least its accuracy at no more similarity, and with one of the two better: equals stay both.

    >>> frontier(torch.tensor([0.7, 0.8, 0.75, 0.9]), torch.tensor([0.2, 0.5, 0.6, 0.9]))
    [0, 1, 3]
    """
    kept: list[int] = []
    for i in sorted(range(len(accuracy)), key=lambda i: (float(similar[i]), -float(accuracy[i]))):
        best = kept[-1] if kept else i
        if accuracy[i] > accuracy[best] or (accuracy[i] == accuracy[best] and similar[i] == similar[best]):
            kept.append(i)
    equal = [[j for j in kept if (accuracy[j], similar[j]) != (accuracy[i], similar[i])] for i in kept]
    return [i for i, others in zip(kept, equal) if not above(float(accuracy[i]), float(similar[i]), accuracy[others],
                                                             similar[others]) < -1e-9]


def place(summary: pd.DataFrame, simple: Sequence[str]) -> pd.DataFrame:
    """Where each method lies against the simple ones.

    Args:
        summary: of `table`; accuracies are fractions.
        simple: names of the methods that make the frontier; each of them is compared with the others of them.

    Returns:
        A row per method other than the originals: `above` (points of accuracy over the frontier at its similarity) and
        `on_frontier` (of all methods together).
    """
    methods = summary.drop(index=ORIGINAL, errors="ignore")
    best = frontier(torch.tensor(methods["mean"].to_numpy()), torch.tensor(methods.max_similarity.to_numpy()))
    rows = {}
    for name, row in methods.iterrows():
        others = methods.loc[[m for m in simple if m != name]]
        rows[name] = {"above": above(row["mean"], row.max_similarity, torch.tensor(others["mean"].to_numpy()),
                                     torch.tensor(others.max_similarity.to_numpy())),
                      "on_frontier": name in methods.index[best]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def beyond(frame: pd.DataFrame, simple: Sequence[str]) -> pd.DataFrame:
    """How far each method lies above the simple ones and mixtures of two of them, at equal similarity and at equal distance.

    Args:
        frame: rows of `Audited.frame`, of one experiment.
        simple: names of the methods that make the frontier; each of them is compared with the others of them.

    Returns:
        A row per method other than the originals: `similarity`, `similarity_low`, `similarity_high`, `distance`, `distance_low` and
        `distance_high`: of `novelty.above_frontier`, in the score's own units, with the 95 % interval over networks.

    Raises:
        ValueError: a frame without relative distances, or simple methods that are not in it.
    """
    parts = {name: part for name, part in frame.groupby("method", sort=False)}
    if missing := [*({"relative_distance"} - {*frame.columns}), *(m for m in simple if m not in parts)]:
        raise ValueError(f"a frame without {', '.join(missing)}: expected rows of Audited.frame, with all simple methods")
    score, rows = scores.of(frame), {}
    for name in (m for m in parts if m != ORIGINAL):
        rows[name] = {}
        for axis, column, sign in (("similarity", "max_similarity", -1), ("distance", "relative_distance", 1)):
            sets = {m: (sign * torch.tensor(parts[m][column].to_numpy()).double(), torch.tensor(parts[m][score.column].to_numpy()))
                    for m in (name, *simple)}
            distance, reached = sets.pop(name)
            found = novelty.above_frontier(reached, distance, list(sets.values()), better=score.better)
            rows[name] |= {axis: found.value, f"{axis}_low": found.low, f"{axis}_high": found.high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
