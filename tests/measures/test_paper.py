"""paper.py: the numbers that stand beside a run's are those of the paper and of its authors' logs."""

import csv
import math

import pandas as pd
import pytest

from pdiff_lib.measures import paper

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


def line(best, mean, low, high, n=3):
    columns = {("best", "mean"): best, ("best", "std"): 0.01, ("mean", "mean"): mean, ("mean", "std"): 0.02, ("low", "mean"): low,
               ("low", "std"): 0.1, ("high", "mean"): high, ("high", "std"): 0.2, ("seeds", "n"): n}
    return pd.Series(columns)


def over_seeds(**lines):
    index = pd.MultiIndex.from_tuples([tuple(k.split("|")) for k in lines], names=["row", "method"])
    return pd.DataFrame(list(lines.values()), index=index)


def test_entries_are_those_that_the_papers_table_has():
    table = over_seeds(**{"x10|p-diff": line(0.5, 0.4, 0.7, 0.8), "x10|original": line(1, 1, 1, 1), "x7|p-diff": line(1, 1, 1, 1)})
    found = {(e["setting"], e["metric"]): (e["value"], e["std"], e["n"]) for e in paper.entries("4", table)}
    assert found.keys() == {("x10", paper.BEST), ("x10", paper.LOW), ("x10", paper.HIGH)}  # Table 4 has no means
    assert found["x10", paper.BEST] == pytest.approx((50, 1, 3)) and found["x10", paper.LOW] == pytest.approx((0.7, 0.1, 3))
    vae = paper.entries("8", over_seeds(**{"kl 1|VAE": line(0.5, 0.4, 0.7, 0.8)}), setting="ResNet-18 / CIFAR-100")
    assert {(e["setting"], e["method"]) for e in vae} == {("ResNet-18 / CIFAR-100", "vae")} and len(vae) == 4


@pytest.mark.parametrize("where, want", [
    (("1", "ResNet-18 / CIFAR-100", "p-diff", BEST), 77.55), (("2", "ViT-mini / STL-10", "original", BEST), 52.65),
    (("3a", "no noise augmentation", "p-diff", MEAN), 76.538), (("3d", "Adam", "original", BEST), 79.65),
    (("8", "ResNet-18 / CIFAR-100", "vae", BEST), 77.06), (("9", "T=1000", "p-diff", BEST), 77.55)])
def test_logged_numbers(where, want):
    assert paper.logged(*where) == pytest.approx(want)


@pytest.mark.parametrize("where", [("1", "ResNet-18 / CIFAR-100", "ensemble", BEST), ("9", "T=10", "p-diff", BEST),
                                   ("4", "x10", "p-diff", paper.LOW), ("1", "ResNet-18 / digits", "p-diff", BEST)])
def test_what_was_not_logged_is_nan(where):
    assert math.isnan(paper.logged(*where))


def record(created, value, scale="resnet18, cifar10", **more):
    entry = paper.entry("3c", "x10", "p-diff", BEST, value, std=0.1, n=3)
    return {"notebook": "33_ablations", "device": "CPU", "created": created, "scale": scale, "settings": {},
            "numbers": {"scorecard": [entry | more]}}


def test_scorecard_has_every_number_of_the_paper_and_the_newest_of_ours_per_scale():
    card = paper.scorecard([record("2026-02", 61.0), record("2026-01", 60.0), record("2026-01", 70.0, scale="resnet18, digits"),
                            record("2026-01", 5.0, setting="x7")])
    key = ["table", "setting", "method", "metric"]
    theirs = [r for r in rows("paper_tables.csv") if r["table"] in paper.SCORED]
    assert len(card.drop_duplicates(key).dropna(subset="paper")) == len(theirs)
    ours = card[(card.setting == "x10") & (card.table == "3c") & (card.metric == BEST)].set_index("scale")
    assert ours.ours.to_dict() == {"resnet18, cifar10": 61.0, "resnet18, digits": 70.0} and set(ours.paper) == {77.9}
    assert (card[card.ours.isna()].scale == "not run").all() and (card.scale == "not run").sum() == len(theirs) - 1
    assert card[card.setting == "x7"].paper.isna().all() and len(card[card.setting == "x7"]) == 1
    assert list(dict.fromkeys(card.table)) == list(paper.SCORED)


def test_the_quickstarts_runs_count_as_cells_of_tables_1_and_2():
    methods = {m: {"best": b} for m, b in (("original", 0.5), ("average", 0.6), ("p-diff", 0.7))}
    runs = [{"notebook": "00_quickstart", "device": "", "created": "", "scale": "s", "numbers": {"methods": methods},
             "settings": {"network": n, "dataset": d, "subset": s}}
            for n, d, s in (("resnet50", "pets", "last_norms:2"), ("vit-mini", "cifar10", "all"))]
    found = paper.scorecard(runs).dropna(subset="ours")
    assert {(r.table, r.setting, r.method): r.ours for r in found.itertuples()} == pytest.approx({
        ("1", "ResNet-50 / Pets", "original"): 50, ("1", "ResNet-50 / Pets", "ensemble"): 60, ("1", "ResNet-50 / Pets", "p-diff"): 70,
        ("2", "ViT-mini / CIFAR-10", "original"): 50, ("2", "ViT-mini / CIFAR-10", "ensemble"): 60, ("2", "ViT-mini / CIFAR-10", "p-diff"): 70})


def test_markdown_has_a_line_per_number_found_and_counts_the_rest():
    text = paper.markdown(paper.scorecard([record("2026-01", 61.0)]))
    assert "| 3c | x10 | p-diff | best accuracy (%) | 77.9 |  | 61.00 +- 0.10 | 3 | resnet18, cifar10 |" in text
    assert text.count("\n| ") == 1 and "Table 3c: 9 of 10 numbers" in text and "Table 4: 15 of 15" in text


def test_a_method_that_the_paper_does_not_have_stands_beside_no_number_of_theirs():
    own = paper.entry("2", "MLP-mini / CIFAR-10", "p-diff, centred", BEST, 40.1)
    record = {"notebook": "n", "numbers": {"scorecard": [own]}, "settings": {"network": "mlp-mini"}, "scale": "s",
              "device": "CPU", "created": "2026"}
    card = paper.scorecard([record])
    row = card[card.method == "p-diff, centred"].iloc[0]
    assert row.ours == 40.1 and math.isnan(row.paper) and math.isnan(row.log)
    assert "| 2 | MLP-mini / CIFAR-10 | p-diff, centred | best accuracy (%) |  |  | 40.10 |" in paper.markdown(card)
