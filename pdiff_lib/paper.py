"""The paper's numbers and its authors' logged ones, to stand beside a run's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent / "reference"


@cache
def tables() -> pd.DataFrame:
    """Every number in the paper's tables: table, setting, method, metric, value (accuracies in percent)."""
    return pd.read_csv(FOLDER / "paper_tables.csv", dtype={"table": str})


@cache
def logs() -> pd.DataFrame:
    """What the authors' published runs logged, a row per experiment (accuracies as fractions)."""
    return pd.read_csv(FOLDER / "authors_logs.csv")


def beside(summary: pd.DataFrame, setting: str, experiment: str | None = None) -> pd.DataFrame:
    """A run's accuracies next to the paper's and the authors' logged ones.

    Args:
        summary: `Experiment.summary`.
        setting: of the paper's tables, such as "ResNet-18 / CIFAR-100".
        experiment: of the authors' logs, such as "cifar100_resnet18"; None: not logged.

    Returns:
        A row per method and metric; columns `paper`, `authors' log`, `this run`, in percent (similarities as they are);
        empty where a source has no number.

    Raises:
        ValueError: a setting or an experiment that does not exist.
    """
    numbers = tables()[tables().setting == setting].drop_duplicates(["method", "metric"]).set_index(["method", "metric"]).value
    if numbers.empty:
        raise ValueError(f"no setting {setting!r} in the paper's tables: expected one of {sorted(set(tables().setting))}")
    log = logs().set_index("experiment")
    if experiment is not None and experiment not in log.index:
        raise ValueError(f"no experiment {experiment!r} in the authors' logs: expected one of {sorted(log.index)}")
    best, mean, similar = "best accuracy (%)", "average accuracy (%)", "maximum similarity, mean"
    rows = {("original", best): ("original", "best", 100, "original_acc_max"),
            ("original", mean): ("original", "mean", 100, "original_acc_mean"),
            ("ensemble", best): ("average", "best", 100, None),
            ("p-diff", best): ("p-diff", "best", 100, "generated_acc_max"),
            ("p-diff", mean): ("p-diff", "mean", 100, "generated_acc_mean"),
            ("p-diff", similar): ("p-diff", "max_similarity", 1, "max_similarity_generated_mean")}
    table = []
    for (method, metric), (own, column, scale, logged) in rows.items():
        table.append({"method": method, "metric": metric, "paper": numbers.get((method, metric)),
                      "authors' log": scale * log.loc[experiment, logged] if experiment and logged else None,
                      "this run": scale * summary.loc[own, column]})
    return pd.DataFrame(table).set_index(["method", "metric"]).astype(float)
