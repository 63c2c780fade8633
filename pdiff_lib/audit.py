"""Is it more than averaging? What a method's networks are, cost and are good for, and whether simpler ones do the same."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.measures import similarity
from pdiff_lib.tasks.classification import Classification

BAGS = (1, 2, 5, 10, 50)
DRAWS = 20  # random ensembles of a size


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
    their vote; of another task than classification the score of their mean output), and `fit_seconds` and `sample_seconds` (as computed; NaN for the originals).
    """
    summary = experiment.summary(list(names) if names else None)
    rows = {}
    for name in summary.index:
        bags = {f"bag_{size}": _together(experiment, name, size, experiment.generator(f"bag {size}")) for size in BAGS}
        spent = experiment.seconds.get(name, {})
        rows[name] = {"pairwise": similarity.pairwise(experiment.wrong(name)), **bags,
                      **{f"{verb}_seconds": spent.get(verb, float("nan")) for verb in ("fit", "sample")}}
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

    >>> round(above(0.81, 0.6, torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0.2, 0.5, 0.9])), 3)
    -0.015
    """
    fair = others_similar <= similar
    if not fair.any():
        return float("nan")
    left, right = (others_accuracy[fair], others_similar[fair]), (others_accuracy[~fair], others_similar[~fair])
    share = (similar - left[1][:, None]) / (right[1] - left[1][:, None])
    mixtures = left[0][:, None] + share * (right[0] - left[0][:, None])
    return accuracy - float(torch.cat([left[0], mixtures.flatten()]).max())


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
