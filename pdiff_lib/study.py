"""Recipes that differ in a few settings, over several seeds: the rows of an ablation, their shared stages computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from pdiff_lib.base import score as scores
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment


class Study:
    """An `Experiment` per row and seed. All are made here, so that a wrong row is said before any long work.

    Args:
        recipe: what the rows have in common.
        rows: settings of each row, by its name (the paper's, where it has that row): `{"x10": {"sigma_z": 1.0}}`.
        seeds: of network, zoo, p-diff and samples together.
        store, device, progress: as for `Experiment`.
        kind: what makes an experiment of a recipe; with `Experiment`'s arguments.

    Attributes:
        experiments: by (row, seed).

    Raises:
        ValueError: no rows or seeds, a seed given twice, or what `Recipe.of` and `Experiment` refuse; names the row.
    """

    def __init__(self, recipe: Recipe, rows: Mapping[str, Mapping[str, Any]], seeds: Sequence[int] = (0,), *,
                 store: Store | None = None, device: str | None = None, progress: bool = True,
                 kind: Callable[..., Experiment] = Experiment):
        if not rows or not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"rows are {list(rows)}, seeds {list(seeds)}: expected at least one of each, and no seed twice")
        store, shared, flat = store or Store(), {}, recipe.flat()
        self.experiments: dict[tuple[str, int], Experiment] = {}
        for row, own in rows.items():
            for seed in seeds:
                try:
                    settings = Recipe.of(**{**flat, "seed": seed, "pdiff_seed": seed, **own})
                    self.experiments[row, seed] = kind(settings, store, device, progress, shared)
                except ValueError as e:
                    raise ValueError(f"row {row!r}: {e}") from e
        self.store = store

    @property
    def first(self) -> Experiment:
        """The first row at the first seed."""
        return next(iter(self.experiments.values()))

    @property
    def title(self) -> str:
        """Of the first experiment's title the parts that all rows share: where K differs, no K."""
        titles = [e.title.split(", ") for e in self.experiments.values()]
        return ", ".join(part for part in titles[0] if all(part in title for title in titles))

    def __iter__(self) -> Iterator[tuple[str, int, Experiment]]:
        return ((row, seed, e) for (row, seed), e in self.experiments.items())

    def frame(self, methods: Sequence[str] = (ORIGINAL, PDIFF)) -> pd.DataFrame:
        """The rows of `Experiment.frame` of all experiments, with columns `row` and `seed` in front."""
        parts = []
        for row, seed, e in self:
            part = e.frame(list(methods))
            part.insert(0, "seed", seed)
            part.insert(0, "row", row)
            parts.append(part)
        return self.first.task.score.of_frame(pd.concat(parts, ignore_index=True))


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """A line per row, method and seed: n, mean and best score (accuracies are fractions), mean and 5th and 95th percentile of the maximum
    similarity, and `gain`, the mean score beyond that of the same row's and seed's originals (where they are there)."""
    groups = frame.groupby(["row", "method", "seed"], sort=False)
    score = scores.of(frame)
    table = groups.agg(**score.aggregates, max_similarity=("max_similarity", "mean"),
                       low=("max_similarity", lambda s: s.quantile(0.05)), high=("max_similarity", lambda s: s.quantile(0.95)),
                       distance=("distance", "mean"), outside_span=("outside_span", "mean")).reset_index()
    own = table[table.method == ORIGINAL].set_index(["row", "seed"])["mean"]
    table["gain"] = table["mean"] - own.reindex(pd.MultiIndex.from_frame(table[["row", "seed"]])).to_numpy()
    return table


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of every column of `by_seed`, a line per row and method; columns
    (measure, "mean" or "std"), and the number of seeds. One seed has no deviation: NaN."""
    table = by_seed(frame).drop(columns="seed").groupby(["row", "method"], sort=False)
    return pd.concat([table.agg(["mean", "std"]), table.size().rename(("seeds", "n"))], axis=1)
