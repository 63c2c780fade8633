"""The paper's numbers and its authors' logged ones, to stand beside a run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).parent / "reference"
BEST, MEAN, LOW, HIGH = "best accuracy (%)", "average accuracy (%)", "max similarity, low", "max similarity, high"
# Our names of networks and datasets: the paper's, the authors' in their logs.
NETWORKS = {"resnet18": ("ResNet-18", "resnet18"), "resnet50": ("ResNet-50", "resnet50"),
            "vit_tiny_patch16_224": ("ViT-Tiny", "vittiny"), "vit_base_patch16_224": ("ViT-Base", "vitbase"),
            "convnext_tiny": ("ConvNeXt-Tiny", "convnexttiny"), "convnext_base": ("ConvNeXt-Base", "convnextbase"),
            "convnet-mini": ("ConvNet-mini", "convnet"), "mlp-mini": ("MLP-mini", "mlp"), "resnet-mini": ("ResNet-mini", "resnet"),
            "vit-mini": ("ViT-mini", "vit"), "convnext-mini": ("ConvNeXt-mini", "convnext")}
DATASETS = {"cifar10": ("CIFAR-10", "cifar10"), "cifar100": ("CIFAR-100", "cifar100"), "stl10": ("STL-10", "stl10"),
            "flowers": ("Flowers", "flowers"), "pets": ("Pets", "pets"), "food101": ("Food-101", "food101"),
            "imagenet": ("ImageNet-1K", "in1k")}
# Rows of the paper's tables and the authors' experiment of that name.
ABLATIONS = {("3a", "no noise augmentation"): "noise_0000a00", ("3a", "parameter noise only"): "noise_0001a00",
             ("3a", "latent noise only"): "noise_0000a01", ("3d", "Adam"): "adam_optimizer", ("3e", "K=200"): "numberckpt_200",
             ("3e", "K=300 (default)"): "numberckpt_300", ("3e", "K=400"): "numberckpt_400", ("4", "x0.01"): "noise_x001",
             ("4", "x0.1"): "noise_x01", ("4", "x10"): "noise_x10", ("4", "x100"): "noise_x100"}
SCORED = ("1", "2", "3a", "3b", "3c", "3d", "3e", "3f", "4", "6", "7", "8", "9", "10", "11", "12", "13")
CELLS = ("00_quickstart", "32a_partial_generation", "32b_full_generation")  # their records are cells of Tables 1 and 2
DEFAULT = "cifar100_resnet18"  # the authors' experiment behind every row that is called the default


@cache
def tables() -> pd.DataFrame:
    """Every number in the paper's tables: table, setting, method, metric, value (accuracies in percent)."""
    return pd.read_csv(FOLDER / "paper_tables.csv", dtype={"table": str})


@cache
def logs() -> pd.DataFrame:
    """What the authors' published runs logged, a row per experiment (accuracies as fractions)."""
    return pd.read_csv(FOLDER / "authors_logs.csv")


def setting(network: str, dataset: str) -> str:
    """A network and a dataset of ours as the paper's tables name them: "ResNet-18 / CIFAR-100"; names it lacks stay.

    >>> setting("resnet18", "cifar100"), setting("resnet18", "digits")
    ('ResNet-18 / CIFAR-100', 'ResNet-18 / digits')
    """
    return f"{NETWORKS.get(network, (network,))[0]} / {DATASETS.get(dataset, (dataset,))[0]}"


def logged(table: str, setting: str, method: str, metric: str) -> float:
    """What the authors' published run of a number in the paper's tables logged, in the unit of the tables; NaN: not logged."""
    names = {theirs: log for theirs, log in (*NETWORKS.values(), *DATASETS.values())}
    network, _, dataset = setting.partition(" / ")
    experiment = ABLATIONS.get((table, setting)) or (DEFAULT if "default" in setting or setting == "T=1000" else None)
    if table in ("1", "2", "8") and network in names and dataset in names:
        experiment = "vae_sample" if method == "vae" else f"{names[dataset]}_{names[network]}"
    who = "original" if method == "original" else "generated"
    column = {BEST: f"{who}_acc_max", MEAN: f"{who}_acc_mean"}.get(metric)
    log = logs().drop_duplicates("experiment").set_index("experiment")
    if method == "ensemble" or column is None or experiment not in log.index:
        return float("nan")
    return 100 * float(log.loc[experiment, column])


def entry(table: str, setting: str, method: str, metric: str, value: float, std: float = float("nan"), n: int = 1) -> dict:
    """One number of a run for the scorecard, under the paper's own names; `record(numbers={"scorecard": [...]})` keeps it.

    Args:
        table, setting, method, metric: as in `tables()`.
        value: in the unit of the metric (accuracies in percent).
        std: over seeds or networks, NaN when there is one.
        n: seeds.
    """
    return {"table": table, "setting": setting, "method": method, "metric": metric, "value": float(value), "std": float(std), "n": int(n)}


def entries(table: str, over_seeds: pd.DataFrame, setting: str | None = None) -> list[dict]:
    """The scorecard's numbers in a table of `study.over_seeds`: those that the paper's table has too.

    Args:
        table: of the paper, such as "3c".
        over_seeds: a line per row and method.
        setting: the paper's row that all lines stand for; None: each line's `row` is the paper's name.
    """
    known = set(tables()[tables().table == table][["setting", "method", "metric"]].itertuples(index=False, name=None))
    names, columns = {"average": "ensemble", "VAE": "vae"}, {BEST: ("best", 100), MEAN: ("mean", 100), LOW: ("low", 1), HIGH: ("high", 1)}
    return [entry(table, setting or row, names.get(method, method), metric, scale * line[column, "mean"], scale * line[column, "std"],
                  int(line["seeds", "n"]))
            for (row, method), line in over_seeds.iterrows() for metric, (column, scale) in columns.items()
            if (setting or row, names.get(method, method), metric) in known]


def cell(methods: Mapping[str, Mapping[str, Any]], network: str, dataset: str, subset: str) -> list[dict]:
    """A run's cell of Table 1 (part of a network) or Table 2 (`subset` "all") for the scorecard.

    Args:
        methods: `Experiment.summary` as a dict of its rows; accuracies are fractions.
        network, dataset, subset: of the recipe.
    """
    table, where = "2" if subset == "all" else "1", setting(network, dataset)
    names = {"original": "original", "average": "ensemble", "p-diff": "p-diff", "p-diff, centred": "p-diff, centred"}
    return [entry(table, where, theirs, BEST, 100 * methods[ours]["best"]) for ours, theirs in names.items() if ours in methods]


def _entries(record: Mapping[str, Any]) -> list[dict]:
    numbers, s = record["numbers"], record["settings"]
    if record["notebook"] in CELLS and s["network"] in NETWORKS:
        return cell(numbers["methods"], s["network"], s["dataset"], s["subset"])
    return numbers.get("scorecard", [])


def scorecard(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Every number of the paper's tables beside the authors' log and what recorded runs found.

    Args:
        records: of `results.records`: those with `numbers["scorecard"]` (a list of `entry`), and those of `CELLS`.
            Of several runs for one number the newest of the largest scale counts: one row each.

    Returns:
        A row per number of the paper and scale found: columns of `tables()` with `value` named `paper`, `log`, `ours`,
        `std`, `n`, `scale` ("not run" where no record has it), `notebook`, `device`. Numbers of ours that the paper does
        not have follow at the end, `paper` empty.
    """
    key = ["table", "setting", "method", "metric"]
    found = pd.DataFrame([{**e, "scale": r["scale"], "notebook": r["notebook"], "device": r["device"], "created": r["created"]}
                          for r in records for e in _entries(r)],
                         columns=[*key, "value", "std", "n", "scale", "notebook", "device", "created"])
    newest = found.sort_values("created").drop_duplicates([*key, "scale"], keep="last").drop(columns="created")
    theirs = tables()[tables().table.isin(SCORED)].rename(columns={"value": "paper"}).reset_index(names="order")
    card = theirs.merge(newest.rename(columns={"value": "ours"}), on=key, how="outer", sort=False)
    card["log"] = [float("nan") if pd.isna(r.paper) else logged(r.table, r.setting, r.method, r.metric) for r in card.itertuples()]
    of_table = card.table.map({t: i for i, t in enumerate(SCORED)})
    card = card.assign(of_table=of_table).sort_values(["of_table", "order"], kind="stable")  # as the paper prints them
    return card.fillna({"scale": "not run", "notebook": "", "device": ""})[
        [*key, "paper", "log", "ours", "std", "n", "scale", "notebook", "device"]].reset_index(drop=True)


def markdown(card: pd.DataFrame) -> str:
    """A scorecard as the gallery's table: a line per row of the paper's tables and method that was run at some scale, and
    what of each table was not run."""
    theirs = card.dropna(subset="paper").drop_duplicates(["table", "setting", "method", "metric"])
    lines = ["| table | row | method | metric | paper | authors' log | ours | seeds | scale |", "|---|---|---|---|---|---|---|---|---|"]
    for r in card[card.ours.notna()].itertuples():
        spread = "" if pd.isna(r.std) else f" +- {r.std:.2f}"
        lines.append(f"| {r.table} | {r.setting} | {r.method} | {r.metric} | {'' if pd.isna(r.paper) else f'{r.paper:g}'} | {'' if pd.isna(r.log) else f'{r.log:.2f}'} | "
                     f"{r.ours:.2f}{spread} | {r.n:.0f} | {r.scale} |")
    missing = theirs[theirs.ours.isna()].groupby("table", sort=False)
    rest = [f"Table {table}: {len(part)} of {(theirs.table == table).sum()} numbers" for table, part in missing]
    return "\n".join([*lines, "", f"Not run: {'; '.join(rest)}." if rest else "Everything was run."])


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
    similar = "maximum similarity, mean"
    rows = {("original", BEST): ("original", "best", 100, "original_acc_max"),
            ("original", MEAN): ("original", "mean", 100, "original_acc_mean"),
            ("ensemble", BEST): ("average", "best", 100, None),
            ("p-diff", BEST): ("p-diff", "best", 100, "generated_acc_max"),
            ("p-diff", MEAN): ("p-diff", "mean", 100, "generated_acc_mean"),
            ("p-diff", similar): ("p-diff", "max_similarity", 1, "max_similarity_generated_mean")}
    table = []
    for (method, metric), (own, column, scale, logged) in rows.items():
        table.append({"method": method, "metric": metric, "paper": numbers.get((method, metric)),
                      "authors' log": scale * log.loc[experiment, logged] if experiment and logged else None,
                      "this run": scale * summary.loc[own, column]})
    return pd.DataFrame(table).set_index(["method", "metric"]).astype(float)
