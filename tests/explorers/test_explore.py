"""explore.py: what the widgets hold after each change of state, computed again from the experiment."""

import asyncio

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from test_experiment import SMALL as UNTRAINED

from device import DEVICE
from pdiff_lib import explore
from pdiff_lib.base import runs
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.explorers.scatter import GENERATED
from pdiff_lib.measures import similarity
from pdiff_lib.tasks import evaluate

SMALL = {**UNTRAINED, "base_epochs": 15, "base_lr": 0.01}  # networks that know something, and so differ in what they get wrong


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """Two runs that differ in K."""
    store = runs.Store(tmp_path_factory.mktemp("stages"))
    return [Experiment(Recipe.of(**{**SMALL, "k_checkpoints": k}), store, device=DEVICE, progress=False) for k in (6, 9)]


@pytest.fixture
def scatter(experiments):
    return explore.Scatter(*experiments)


def visible(figure) -> set[str]:
    return {t.name for t in figure.data if t.opacity != 0 and t.hoverinfo != "skip" and t.name not in ("chosen", "nearest original")}


def test_every_network_is_a_point_in_both_figures(scatter, experiments):
    e = experiments[0]
    assert len(scatter.frame) == sum(len(x.frame()) for x in experiments)
    for figure, x, y in ((scatter.points, "max_similarity", "accuracy"), (scatter.map, "PC1", "PC2")):
        for method, rows in scatter.frame.groupby("method", observed=True):
            trace = next(t for t in figure.data if t.name == method)
            np.testing.assert_allclose(trace.x, rows[x])
            np.testing.assert_allclose(trace.y, rows[y] * (100 if y == "accuracy" else 1))
    plane = PCA(2).fit(e.zoo.theta).transform(experiments[1].theta("gaussian"))
    rows = scatter.frame[(scatter.frame.method == "gaussian") & (scatter.frame.run == 1)]
    np.testing.assert_allclose(rows[["PC1", "PC2"]], plane, atol=1e-5)
    assert set(rows.k_checkpoints) == {9} and e.title in scatter.points.layout.title.text


def test_a_chosen_network_stands_beside_its_nearest_original(scatter, experiments):
    e = experiments[1]
    scatter.run.value, scatter.method.value, scatter.index.value = 1, PDIFF, 2
    theta, nearest = e.theta(PDIFF)[2], int(e.frame([PDIFF])["nearest"][2])
    original = e.zoo.theta[nearest]
    row = scatter.frame.loc[scatter.chosen]
    assert (row.method, row.run, row["index"], row.nearest) == (PDIFF, 1, 2, nearest)
    assert f"{PDIFF} 2" in scatter.facts.value and f"original {nearest}" in scatter.facts.value
    for heat, vector in zip(scatter.heatmaps.data, (theta, original, theta - original), strict=True):
        shown = np.asarray(heat.z, dtype=float)
        np.testing.assert_allclose(np.sort(shown[~np.isnan(shown)]), np.sort(vector.numpy()), rtol=1e-6)
    pairs = np.zeros((10, 10), dtype=int)
    np.add.at(pairs, (e.predictions(ORIGINAL)[nearest].numpy(), e.predictions(PDIFF)[2].numpy()), 1)
    assert (scatter._counts.to_numpy() == pairs).all() and pairs.sum() == 100
    assert f"{100 - np.trace(pairs)} of 100 images differ" in scatter.confusion.layout.title.text
    ring = next(t for t in scatter.points.data if t.name == "chosen")
    assert (ring.x[0], ring.y[0]) == (row.max_similarity, 100 * row.accuracy)


def test_check_boxes_and_the_noise_slider_hide_in_both_figures(scatter):
    every = visible(scatter.points)
    assert {"noise 0.05", "noise 0.5", ORIGINAL, PDIFF} <= every == visible(scatter.map)
    scatter.noise.value = "0.5"
    assert visible(scatter.points) == visible(scatter.map) == every - {"noise 0.05"}
    scatter.boxes[ORIGINAL].value = False
    assert visible(scatter.map) == every - {"noise 0.05", ORIGINAL}
    assert set(scatter._rows().method) == visible(scatter.points) - {GENERATED}
    scatter.noise.value, scatter.boxes[ORIGINAL].value = "all", True
    assert visible(scatter.points) == every


@pytest.mark.parametrize("column", ["step", "k_checkpoints", "distance"])
def test_colours_are_the_numbers_of_a_column(scatter, column):
    scatter.colour.value = column
    for method in (ORIGINAL, "gaussian"):
        for figure in (scatter.points, scatter.map):
            trace = next(t for t in figure.data if t.name == method)
            np.testing.assert_allclose(trace.marker.color, scatter.frame[scatter.frame.method == method][column])
            assert figure.layout.coloraxis.showscale
    scatter.colour.value = "method"
    assert isinstance(next(t for t in scatter.map.data if t.name == "gaussian").marker.color, str)


def test_a_selection_is_counted_marked_and_exported(scatter, tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    rows = scatter.frame.index[scatter.frame.method.isin([PDIFF, ORIGINAL])][3:]
    scatter.select(rows)
    assert f"Selected: {len(rows)} networks" in scatter.selection.value
    for figure in (scatter.points, scatter.map):
        marked = sum(len(t.selectedpoints or ()) for t in figure.data)
        assert marked == len(rows)
    scatter.export.kind.value = "csv"
    scatter.export.button.click()
    table = pd.read_csv(tmp_path / "exports" / "scatter-scatter.csv")
    assert len(table) == len(rows) and set(table.method) == {PDIFF, ORIGINAL} and "<a download=" in scatter.export.link.value
    scatter.export.kind.value = "html"
    assert scatter.export.write().read_text().count("Plotly.newPlot") == 1
    scatter.select([])
    assert scatter._rows().shape[0] == len(scatter.frame)


def test_experiments_over_other_images_are_refused(experiments, tmp_path):
    other = Experiment(Recipe.of(**{**SMALL, "test_images": 50}), runs.Store(tmp_path), device=DEVICE, progress=False)
    with pytest.raises(ValueError, match="expected the data and subset of"):
        explore.Scatter(experiments[0], other)


def test_the_moment_moves_picture_path_and_accuracy_together(experiments):
    e = experiments[0]
    d = explore.Denoising(e)
    assert d.path.t[0] == 10 and d.path.t[-1] == 0 and d.moment.value == len(d.path.t) - 1
    right = evaluate.accuracy(e.wrong_of(d.path.theta[:, 0]))
    plane = PCA(2).fit(d.method.z).transform(d.path.z[:, 0])
    for i in (0, 4, 9):
        d.moment.value = i
        picture, now, level = d.figure.data[0], d.figure.data[3], d.figure.data[5]
        shown = np.asarray(picture.z, dtype=float)
        np.testing.assert_allclose(np.sort(shown[~np.isnan(shown)]), np.sort(d.path.theta[i, 0].numpy()), rtol=1e-6)
        np.testing.assert_allclose([now.x[0], now.y[0]], plane[i], atol=1e-4)
        assert (level.x[0], level.y[0]) == (d.path.t[i], pytest.approx(100 * float(right[i])))
        assert d.label.value.startswith(f"{d.path.t[i]} of 10 diffusion steps remain")
    assert list(d.table.steps_remaining) == d.path.t


def test_another_chain_is_that_of_its_seed_and_sampler(experiments):
    d = explore.Denoising(experiments[0])
    d.seed.value, d.sampler.value, d.steps.value = 7, "ddim", 5
    asyncio.run(d.follow())
    settings = {**SMALL, "sampler": "ddim", "sampling_steps": 5}
    same = Experiment(Recipe.of(**settings), experiments[0].store, device=DEVICE, progress=False)
    want = same.fitted(PDIFF).trajectory(1, 6, torch.Generator().manual_seed(7))
    assert d.path.t == want.t and torch.equal(d.path.theta, want.theta)
    assert "seed 7, DDIM with 5 steps" in d.figure.layout.title.text and not d.follow_button.disabled


def test_generated_networks_join_the_scatter_and_stop_keeps_what_is_there(experiments):
    e = experiments[0]
    scatter = explore.Scatter(e)
    d = explore.Denoising(e, scatter)
    d.count.value = 12
    asyncio.run(d.generate())
    rows = scatter.frame[scatter.frame.method == GENERATED]
    assert len(rows) == 12 == len(d.generated) and d.progress.value == 1.0 and "12 of 12 networks" in d.status.value
    want = torch.cat([e.fitted(PDIFF).sample(n, g) for g in [torch.Generator().manual_seed(0)] for n in (10, 2)])
    assert torch.equal(d.generated, want)
    wrong = e.wrong_of(want)
    np.testing.assert_allclose(rows.accuracy, evaluate.accuracy(wrong))
    np.testing.assert_allclose(rows.max_similarity, similarity.maximum(wrong, e.wrong(ORIGINAL)), rtol=1e-6)
    scatter.method.value, scatter.index.value = GENERATED, 11
    assert f"{GENERATED} 11" in scatter.facts.value

    async def stopped():
        d.count.value = 10_000
        work = asyncio.create_task(d.generate())
        while len(d.generated) < 22:
            await asyncio.sleep(0.01)
        d.stop()
        await work

    asyncio.run(stopped())
    kept = len(d.generated)
    assert 22 <= kept < 10_012 and kept % 10 == 2 and d.status.value.startswith("stopped")
    assert (scatter.frame.method == GENERATED).sum() == kept and not d.generate_button.disabled
    assert not torch.equal(d.generated[12:22], d.generated[:10]), "the stream goes on"


def table() -> pd.DataFrame:
    rows = [{"k_checkpoints": k, "seed": s, "method": m, "index": i, "accuracy": 0.5 + k / 1000 + 0.1 * i + 0.01 * s,
             "max_similarity": 0.9, "nearest": 0, "distance": k, "outside_span": 0.0, "seconds": 1.0, "run": "a"}
            for k in (10, 50) for s in (0, 1) for m in (ORIGINAL, PDIFF) for i in (0, 1)]
    frame = pd.DataFrame(rows)
    frame.attrs["title"] = "a network, some images"
    return frame


def test_sweep_shows_any_setting_against_any_measure():
    s = explore.Sweep(table())
    assert "a network, some images" in s.figure.layout.title.text
    s.x.value, s.y.value = "k_checkpoints", "accuracy"
    (line,) = (t for t in s.figure.data if t.name == PDIFF)
    assert list(line.x) == [10, 50] and list(line.y) == pytest.approx([56.5, 60.5])
    assert list(line.error_y.array) == pytest.approx([100 * np.std([0, 0.1, 0.01, 0.11])] * 2)
    assert "seed (2 values)" in s.note.value
    s.facet.value = "seed"
    assert [t.name for t in s.figure.data].count(PDIFF) == 2 and "seed = 1" in [a.text for a in s.figure.layout.annotations]
    s.y.value, s.facet.value = "distance", "(none)"
    (line,) = (t for t in s.figure.data if t.name == PDIFF)
    assert list(line.y) == [10, 50] and "distance" in s.figure.layout.title.text
    s.boxes[ORIGINAL].value = False
    assert [t.visible for t in s.figure.data if t.name == ORIGINAL] == [False]
    with pytest.raises(ValueError, match="expected a row per network"):
        explore.Sweep(table().drop(columns=["k_checkpoints", "seed"]))
