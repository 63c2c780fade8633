"""paper.py: the numbers that stand beside a run's are those of the paper and of its authors' logs."""

import csv
import math

import pandas as pd
import pytest

from pdiff_lib import paper

BEST, MEAN, SIMILAR = "best accuracy (%)", "average accuracy (%)", "maximum similarity, mean"
SUMMARY = pd.DataFrame({"best": [0.5, 0.52, 0.55], "mean": [0.45, 0.52, 0.5], "max_similarity": [0.8, 0.9, 0.85]},
                       index=["original", "average", "p-diff"])
RUN = {("original", BEST): 50, ("original", MEAN): 45, ("ensemble", BEST): 52, ("p-diff", BEST): 55,
       ("p-diff", MEAN): 50, ("p-diff", SIMILAR): 0.85}
# ResNet-18 / CIFAR-100: Tables 1 and 8; the log of cifar100_resnet18.
PAPER = {("original", BEST): 77.4, ("original", MEAN): 76.9, ("ensemble", BEST): 77.7, ("p-diff", BEST): 77.9,
         ("p-diff", MEAN): 77.7, ("p-diff", SIMILAR): math.nan}
LOG = {("original", BEST): 77.15, ("original", MEAN): 76.725, ("ensemble", BEST): math.nan, ("p-diff", BEST): 77.55,
       ("p-diff", MEAN): 77.244, ("p-diff", SIMILAR): 0.84791}


def rows(name):
    with open(paper.FOLDER / name, newline="") as f:
        return list(csv.DictReader(f))


def test_a_run_stands_beside_the_papers_and_the_logged_numbers():
    table = paper.beside(SUMMARY, "ResNet-18 / CIFAR-100", "cifar100_resnet18")
    assert list(table.columns) == ["paper", "authors' log", "this run"] and set(table.index) == set(RUN)
    for column, numbers in zip(table.columns, (PAPER, LOG, RUN)):
        assert table[column].to_dict() == pytest.approx(numbers, nan_ok=True)


def test_without_a_log_that_column_is_empty():
    table = paper.beside(SUMMARY, "ResNet-18 / CIFAR-100")
    assert table["authors' log"].isna().all() and table["paper"].to_dict() == pytest.approx(PAPER, nan_ok=True)


@pytest.mark.parametrize("row", [r for r in rows("paper_tables.csv") if r["table"] == "1"],
                         ids=lambda r: f"{r['setting']} {r['method']}")
def test_every_number_of_table_1_is_found(row):
    table = paper.beside(SUMMARY, row["setting"])
    assert table.loc[(row["method"], row["metric"]), "paper"] == float(row["value"])


@pytest.mark.parametrize("row", [r for r in rows("authors_logs.csv") if r["group"] == "main"],
                         ids=lambda r: r["experiment"])
def test_every_main_log_is_found(row):
    table = paper.beside(SUMMARY, "ResNet-18 / CIFAR-100", row["experiment"])["authors' log"]
    for key, column in ((("original", BEST), "original_acc_max"), (("p-diff", MEAN), "generated_acc_mean")):
        assert table[key] == pytest.approx(100 * float(row[column]))


@pytest.mark.parametrize("setting, experiment, message", [
    ("ResNet-19 / CIFAR-100", None, "no setting 'ResNet-19 / CIFAR-100'.*'ResNet-18 / CIFAR-100'"),
    ("ResNet-18 / CIFAR-100", "cifar", "no experiment 'cifar'.*'cifar100_resnet18'")])
def test_what_does_not_exist_is_refused_with_what_does(setting, experiment, message):
    with pytest.raises(ValueError, match=message):
        paper.beside(SUMMARY, setting, experiment)
