"""arena.py, entrants.py: every generator on one zoo; what is measured against the same by hand."""

import itertools
import math

import pandas as pd
import pytest
import torch

from device import DEVICE
from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.base import training
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.measures import novelty
from pdiff_lib.networks import symmetry
from pdiff_lib.tasks import task as tasks

K, HELD, SAMPLES = 12, 6, 5
SETTINGS = {"dataset": "digits", "image_size": 8, "train_images": 100, "test_images": 200, "network": "mlp-4", "pretrained": False, "subset": "all",
            "zoo_mode": "independent", "k_checkpoints": K, "base_epochs": 8, "base_batch": 20, "base_lr": 2e-2, "crop_scale": 1.0, "flip": False,
            "zoo_batch": 20, "zoo_lr": 1e-3, "ae_kind": "pca", "latent_dim": 5, "denoiser_kind": "mlp", "mlp_width": 8, "diffusion_steps": 3, "T": 10,
            "sampler": "ddim", "sampling_steps": 5, "samples": SAMPLES}
TINY = {**{name: {"steps": 3, "width": 8, "blocks": 1, "solver_steps": 3} for name in ("flow", "unit flow")},
        "SANE": {"steps": 3, "width": 8, "heads": 2, "candidates": 2, "rounds": 1},
        "hyper-rep": {"steps": 3, "width": 8, "heads": 2}, "RPG": {"steps": 3, "width": 8, "denoiser_channels": [2, 2, 2], "sampling_steps": 3},
        "HyperDiffusion": {"steps": 3, "width": 16, "sampling_steps": 3}, "G.pt": {"steps": 3, "width": 16, "layers": 1, "heads": 2, "sampling_steps": 3}}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("stages"))


def made(store, held_out=HELD, pool=0, moments=4, settings=TINY, **how) -> Arena:
    return Arena(Recipe.of(**{**SETTINGS, **how}), held_out, pool, settings, moments, store=store, device=DEVICE, progress=False)


@pytest.fixture(scope="module")
def arena(store) -> Arena:
    return made(store)


class Twins:
    """Copies with their hidden units in another order."""

    def __init__(self, groups):
        self.groups = groups

    def fit(self, theta):
        self.theta = theta

    def sample(self, n, generator=None):
        orders = symmetry.random(self.groups, n, generator)
        return symmetry.permute(self.theta[:n], self.groups, orders)


def test_originals_are_split_and_in_two_orders_of_the_same_functions(arena):
    assert arena.originals.keys() == {"canonical", "raw"} and len(arena.held) == HELD
    assert not (arena.originals["raw"][:, None] == arena.held[None]).all(dim=2).any()
    raw, canonical = (arena.experiment.predictor(arena.originals[order]) for order in ("raw", "canonical"))
    assert (raw != canonical).float().mean() < 1e-3 and not torch.equal(arena.originals["raw"], arena.originals["canonical"])
    torch.testing.assert_close(arena.canonical(arena.originals["raw"]), arena.originals["canonical"], rtol=1e-5, atol=1e-6)


def test_a_pool_is_the_same_networks_for_every_k(store, arena):
    shared = {}
    small, large = (Arena(Recipe.of(**{**SETTINGS, "k_checkpoints": k}), HELD, K + HELD, TINY, store=store, device=DEVICE, progress=False, shared=shared)
                    for k in (4, K))
    assert torch.equal(small.originals["raw"], large.originals["raw"][:4]) and torch.equal(small.held, large.held)
    torch.testing.assert_close(large.originals["raw"], arena.originals["raw"])


def test_of_one_training_those_held_out_are_spread_and_order_says_nothing(store):
    one = made(store, zoo_mode="trajectory")
    assert one.orders == ("raw",) and one.units is not None
    assert [tuple(part.tolist()) for part in one._split] == [tuple(i for i in range(18) if i not in (0, 3, 7, 10, 14, 17)), (0, 3, 7, 10, 14, 17)]
    assert torch.equal(one.canonical(one.held), one.held) and "G.pt" not in one.entrants("raw", 0).methods
    with pytest.raises(ValueError, match="order is 'canonical': expected 'raw'"):
        one.frame(["copy"], ["canonical"])


def test_scores_are_on_the_half_that_is_named(arena):
    theta = arena.originals["raw"][:3]
    outputs, y, halves = arena.experiment.predictor(theta), arena.experiment.task.y_test, tasks.halves(200)
    for found, items in zip(arena.scores(theta), halves):
        torch.testing.assert_close(found, (outputs[:, items] == y[items]).double().mean(dim=1))
    torch.testing.assert_close(arena.judge(theta), arena.scores(theta)[0])
    assert not set(halves[0].tolist()) & set(halves[1].tolist())


def test_distances_are_those_of_the_best_of_all_orders(arena):
    frame, groups = arena.frame(["gaussian 1"], ["raw"]), arena.units
    theta, originals = arena.canonical(arena.entrants("raw", 0).theta("gaussian 1")), arena.originals["canonical"]
    every = torch.tensor(list(itertools.permutations(range(4))))
    for row, vector in zip(frame[frame.method == "gaussian 1"].itertuples(), theta):
        moved = symmetry.permute(vector.expand(24, -1), groups, [every])
        pairs = torch.cdist(moved.double(), originals.double())
        assert row.distance * arena.reference.unit == pytest.approx(float(pairs.min()), rel=1e-4)
        assert row.nearest == int(pairs.min(dim=0).values.argmin())
        assert row.nearest_score == pytest.approx(float(arena.scores(originals)[1][row.nearest]))


def test_copies_are_seen_in_any_order_of_their_units(store):
    arena = made(store, moments=0)
    arena.add("twins", lambda seed: Twins(arena.units))
    table = arena.table(["copy", "twins"], ["raw"]).set_index("method")
    assert (table.loc[["copy", "twins"], "distance_mean"] < 1e-5).all() and (table.loc[["copy", "twins"], "z_u"] < -2).all()
    assert (table.loc[["copy", "twins"], ["np_0.5", "np_1"]] == 0).all(axis=None)
    assert table.loc["copy", "max_similarity"] == 1 and table.loc["copy", "nearest_score"] == pytest.approx(table.loc["copy", "score"])
    assert table.loc[HELD_OUT, "distance"] > 0.3 and table.loc[HELD_OUT, "z_u"] == 0


def test_a_table_is_the_yardstick_on_the_frame(arena):
    frame, table = arena.frame(), arena.table().set_index(["order", "method"])
    assert set(frame.method) == {HELD_OUT, *arena.entrants("raw", 0).methods} == set(table.index.get_level_values("method"))
    assert frame.accuracy.between(0, 1).all() and (frame.distance >= 0).all() and (frame[frame.method != HELD_OUT].groupby(["order", "method"]).size() <= SAMPLES).all()
    for (order, method), row in table.iterrows():
        part = frame[(frame.method == method) & (frame.order == order)]
        assert row.score == pytest.approx(part.accuracy.mean()) and row.distance_mean == pytest.approx(part.distance.mean(), rel=1e-5)
        good = (part.accuracy >= arena.reference.bar) & (part.distance >= 0.75)
        assert row["np_0.75"] == pytest.approx(good.mean())
    assert table.spread[("raw", "average")] == 0
    points = frame[(frame.order == "canonical") & frame.method.isin(arena.baselines)].groupby("method", sort=False)
    edge = [(torch.tensor(p.distance.to_numpy()), torch.tensor(p.accuracy.to_numpy())) for _, p in points]
    own = frame[(frame.method == "flow") & (frame.order == "raw")]
    want = novelty.above_frontier(torch.tensor(own.accuracy.to_numpy()), torch.tensor(own.distance.to_numpy()), edge)
    for name, value in zip(("above", "above_low", "above_high"), want):
        assert table.loc[("raw", "flow"), name] == pytest.approx(value, nan_ok=True)


def test_seeds_make_other_networks_and_the_same_again(store, arena):
    for name in ("flow", "SANE KDE30", "RPG", "HyperDiffusion", "G.pt", "p-diff"):
        first, second = (arena.entrants("canonical", seed).theta(name) for seed in (0, 1))
        assert not torch.equal(first, second)
        torch.testing.assert_close(made(Store(None)).entrants("canonical", 0).theta(name), first, rtol=1e-3, atol=1e-4)


def test_what_is_kept_is_not_computed_again(store, arena, monkeypatch):
    before = arena.frame(seeds=(0,))
    monkeypatch.setattr(training, "loop", None)
    pd.testing.assert_frame_equal(made(store).frame(seeds=(0,)), before)


def test_a_generator_of_ones_own_joins_by_one_line(store):
    arena = made(store, moments=0)
    arena.add("mine", lambda seed: Twins(arena.units))
    assert (arena.frame(["mine"], ["canonical"], (3,)).method == "mine").sum() == SAMPLES
    for name, make, message in (("copy", lambda seed: Twins(arena.units), "there is a method 'copy' already"), ("x", lambda seed: object(), "method 'x' is a object")):
        with pytest.raises(ValueError, match=message):
            arena.add(name, make)
    assert "x" not in arena.entrants("raw", 9).methods
    with pytest.raises(ValueError, match="there is a method 'G.pt' already"):
        (with_paths := made(store)).add("G.pt", lambda seed: Twins(arena.units))
    assert "G.pt" in with_paths.entrants("raw", 9).methods  # what was refused takes nothing away


def test_distances_are_measured_once_and_kept(tmp_path, monkeypatch):
    arena, calls, plain = made(Store(tmp_path), moments=0), [], novelty.matched_distances
    arena.reference
    monkeypatch.setattr(novelty, "matched_distances", lambda theta, *rest: (calls.append(len(theta)), plain(theta, *rest))[1])
    table = arena.table(["copy", "gaussian 1"], ["canonical"])
    assert calls.count(HELD) == 1 and table.n.tolist() == [HELD, SAMPLES, SAMPLES]
    again = made(Store(tmp_path), moments=0)
    again.reference
    calls.clear()
    assert again.table(["copy", "gaussian 1"], ["canonical"]).equals(table) and calls == []


def test_a_task_that_is_no_classification(store):
    arena = Arena(Recipe.of(task="regression", dataset="diabetes", network="mlp-4", pretrained=False, subset="all", zoo_mode="independent", k_checkpoints=6,
                            base_epochs=5, samples=4, ae_kind="pca"), 4, settings=TINY, store=store, device=DEVICE, progress=False)
    frame = arena.frame(["copy", "interpolation 0.5"], ["canonical"])
    assert "score" in frame and (frame[frame.method == "copy"].distance < 1e-6).all() and not frame.score.isna().any()


@pytest.mark.parametrize("how, message", [
    ({"held_out": 1}, "held_out = 1: expected at least 2"), ({"pool": 17}, "pool = 17 with k_checkpoints = 12 and held_out = 6"),
    ({"settings": {"flows": {}}}, "unknown family of generators 'flows': did you mean 'flow'"),
    ({"settings": {"flow": {"widht": 3}}}, "unknown setting 'widht': did you mean 'width'"),
    ({"settings": {"G.pt": {"heads": 3}}}, "width is 128 with 3 heads")])
def test_what_cannot_be_an_arena_is_refused_at_once(store, how, message):
    with pytest.raises(ValueError, match=message):
        made(store, **how)


def test_methods_and_orders_that_there_are_not(arena):
    with pytest.raises(ValueError, match="no method 'flo': expected one of copy, average"):
        arena.frame(["flo"])
    with pytest.raises(ValueError, match="order is 'sorted': expected 'canonical' or 'raw'"):
        arena.table(["copy"], ["sorted"])
    assert math.isclose(arena.reference.bar, float(arena.scores(arena.originals["raw"])[1].quantile(0.1)))
