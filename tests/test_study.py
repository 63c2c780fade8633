"""study.py: rows share what they have in common, a wrong one is named at once, and the tables are plain pandas."""

import numpy as np
import pandas as pd
import pytest
from test_experiment import SMALL, Copies, experiment, forbidden

from device import DEVICE
from pdiff_lib.base import runs, training
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.experiment import ORIGINAL, PDIFF
from pdiff_lib.study import Study, by_seed, over_seeds

ROWS = {"T=10": {}, "T=4": {"T": 4}, "PCA": {"ae_kind": "pca"}, "K=4": {"k_checkpoints": 4}}


def study(folder, rows=ROWS, seeds=(0, 1), **changes) -> Study:
    return Study(Recipe.of(**{**SMALL, **changes}), rows, seeds, store=runs.Store(folder), device=DEVICE, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def done(folder) -> Study:
    s = study(folder)
    s.frame()
    return s


def stages(folder) -> dict[str, int]:
    return {p.name: len(list(p.glob("*.safetensors"))) for p in sorted(folder.iterdir()) if p.is_dir()}


def test_rows_share_what_their_settings_leave_alone(done, folder):
    assert stages(folder) == {
        "network": 2,  # one per seed
        "zoo": 4,  # and of K=4
        "autoencoder": 6,  # both T share one
        "denoiser": 8,
        "generated": 8,
        "predictions": 12,  # of 4 zoos and 8 generated
    }
    found = {id(e.task.images) for _, _, e in done}, {id(e.predictor) for _, _, e in done}
    assert [len(ids) for ids in found] == [1, 2]


def test_a_row_is_the_experiment_of_its_settings(done, tmp_path):
    frame = done.frame()
    assert list(frame.columns[:3]) == ["row", "seed", "method"]
    assert frame.groupby(["row", "seed", "method"], sort=False).size().tolist() == [6, 4] * 6 + [4, 4] * 2
    assert list(frame.row.unique()) == list(ROWS) and [(r, s) for r, s, _ in done] == [(r, s) for r in ROWS for s in (0, 1)]
    alone = experiment(tmp_path, T=4, seed=1, pdiff_seed=1).frame([ORIGINAL, PDIFF])
    mine = frame[(frame.row == "T=4") & (frame.seed == 1)].drop(columns=["row", "seed"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone)
    assert done.first is done.experiments["T=10", 0]


def test_a_title_names_what_all_rows_share(done, tmp_path):
    assert "K = 6" in done.first.title and done.title == done.first.title.replace(", K = 6", "")
    same = study(tmp_path, {"T=10": {}, "T=4": {"T": 4}})
    assert same.title == same.first.title


def test_a_method_of_ones_own_stands_in_the_frame(folder, done):
    s = study(folder, {"T=10": {}}, [0])
    for _, _, e in s:
        e.add("copies", Copies())
    frame = s.frame([ORIGINAL, "copies"])
    assert list(frame.method.unique()) == [ORIGINAL, "copies"] and (frame[frame.method == "copies"].distance == 0).all()


@pytest.mark.parametrize("rows, seeds, message", [
    ({"good": {}, "T=0": {"T": 0}}, [0], "row 'T=0': T is 0: expected at least 1"),
    ({"good": {}, "typo": {"latent": 3}}, [0], "row 'typo': unknown setting 'latent': did you mean 'latent_dim'"),
    ({"good": {}, "few": {"T": 5, "sampling_steps": 6}}, [0], "row 'few': 6 sampling steps: expected at most T=5"),
    ({"good": {}, "net": {"network": "resnet19"}}, [0], "row 'net': network 'resnet19' is unknown"),
    ({}, [0], "expected at least one of each"), ({"good": {}}, [], "expected at least one of each"),
    ({"good": {}}, [0, 1, 0], r"seeds \[0, 1, 0\]: expected at least one of each, and no seed twice"),
    ({"good": {}}, [-1], "row 'good': .*seed is -1: expected at least 0")])
def test_a_wrong_row_is_named_before_any_training(tmp_path, monkeypatch, rows, seeds, message):
    monkeypatch.setattr(training, "loop", forbidden)
    with pytest.raises(ValueError, match=message):
        study(tmp_path, rows, seeds)
    assert not list(tmp_path.iterdir())


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """`by_seed`, a group at a time."""
    lines = []
    for row, method, seed in frame[["row", "method", "seed"]].drop_duplicates().itertuples(index=False):
        part = frame[(frame.row == row) & (frame.method == method) & (frame.seed == seed)]
        own = frame[(frame.row == row) & (frame.method == ORIGINAL) & (frame.seed == seed)]
        lines.append({
            "row": row, "method": method, "seed": seed, "n": len(part), "mean": np.mean(part.accuracy),
            "std": np.std(part.accuracy), "best": max(part.accuracy), "max_similarity": np.mean(part.max_similarity),
            "low": np.percentile(part.max_similarity, 5), "high": np.percentile(part.max_similarity, 95),
            "distance": np.mean(part.distance), "outside_span": np.mean(part.outside_span),
            "gain": np.mean(part.accuracy) - np.mean(own.accuracy) if len(own) else np.nan})
    return pd.DataFrame(lines)


@pytest.fixture
def made_up() -> pd.DataFrame:
    """Three rows, two methods, three seeds, of different numbers of networks; the last row lacks its originals."""
    draw, parts = np.random.default_rng(0), []
    for row in ("b", "a", "c"):
        for method in (ORIGINAL, PDIFF) if row != "c" else (PDIFF,):
            for seed in (2, 0, 1):
                n = int(draw.integers(2, 9))
                parts.append(pd.DataFrame({"row": row, "seed": seed, "method": method, **{
                    c: draw.random(n) for c in ("accuracy", "max_similarity", "distance", "outside_span")}}))
    return pd.concat(parts, ignore_index=True)


def test_by_seed_is_plain_pandas(made_up):
    pd.testing.assert_frame_equal(by_seed(made_up), plain(made_up))


def test_over_seeds_is_mean_and_deviation_of_by_seed(made_up):
    found, lines = over_seeds(made_up), plain(made_up)
    assert list(found.index) == [("b", ORIGINAL), ("b", PDIFF), ("a", ORIGINAL), ("a", PDIFF), ("c", PDIFF)]
    for (row, method), line in found.iterrows():
        part = lines[(lines.row == row) & (lines.method == method)]
        for measure in ("n", "mean", "std", "best", "max_similarity", "low", "high", "distance", "outside_span", "gain"):
            want = part[measure].to_numpy(float)
            np.testing.assert_allclose(line[measure, "mean"], want.mean(), rtol=1e-12)
            np.testing.assert_allclose(line[measure, "std"], want.std(ddof=1), rtol=1e-12, atol=1e-15)
        assert line["seeds", "n"] == 3
    assert found["gain", "std"][("b", PDIFF)] > 0 and found["mean"]["mean"].notna().all()


def test_one_seed_has_no_deviation(made_up):
    found = over_seeds(made_up[made_up.seed == 0])
    assert found["mean", "std"].isna().all() and (found["seeds", "n"] == 1).all() and found["mean", "mean"].notna().all()
