"""The explorer of the arena: what it shows is what the frame says."""

import numpy as np
import pytest
import torch

from device import DEVICE
from pdiff_lib import explore
from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store

SETTINGS = {"dataset": "digits", "image_size": 8, "train_images": 100, "test_images": 100, "network": "mlp-4", "pretrained": False, "subset": "all",
            "zoo_mode": "independent", "k_checkpoints": 8, "base_epochs": 3, "base_batch": 20, "crop_scale": 1.0, "flip": False, "zoo_batch": 20,
            "ae_kind": "pca", "latent_dim": 5, "denoiser_kind": "mlp", "mlp_width": 8, "diffusion_steps": 3, "T": 10, "samples": 4}
TINY = {**{name: {"steps": 2, "width": 8} for name in ("flow", "unit flow", "hyper-rep")}, "SANE": {"steps": 2, "width": 8, "candidates": 2, "rounds": 1},
        "RPG": {"steps": 2, "width": 8, "denoiser_channels": [2, 2, 2], "sampling_steps": 2}, "HyperDiffusion": {"steps": 2, "width": 16, "sampling_steps": 2}}


@pytest.fixture(scope="module")
def arenas(tmp_path_factory) -> dict[str, Arena]:
    store = Store(tmp_path_factory.mktemp("stages"))
    return {name: Arena(Recipe.of(**{**SETTINGS, "zoo_mode": mode}), 4, settings=TINY, store=store, device=DEVICE, progress=False)
            for name, mode in (("many", "independent"), ("one", "trajectory"))}


@pytest.fixture
def contest(arenas) -> explore.Contest:
    return explore.Contest(arenas)


def coloured(contest) -> str:
    return next(t.name for t in contest.points.data if t.marker.size == 8)


def test_every_network_is_a_point(contest, arenas):
    frame = arenas["many"].frame(orders=["canonical"])
    points = {t.name: (np.asarray(t.x), np.asarray(t.y)) for t in contest.points.data if t.name != "chosen"}
    assert points.keys() == set(frame.method)
    for method, part in frame.groupby("method"):
        np.testing.assert_allclose(points[method], (part.distance, 100 * part.accuracy))
    assert coloured(contest) == contest.method == "flow"


def test_zoo_order_generator_and_strength(contest, arenas):
    contest.generator.value = "interpolation"
    assert contest.strength.options == ("0.1", "0.2", "0.3", "0.4", "0.5") and coloured(contest) == "interpolation 0.1"
    contest.strength.value = "0.3"
    assert coloured(contest) == "interpolation 0.3" and "interpolation 0.3 0" in contest.facts.value
    contest.order.value = "raw"
    assert contest.frame.order.isin(["raw", ""]).all() and coloured(contest).startswith("interpolation")
    contest.zoo.value = "one"
    assert contest.order.options == ("raw",) and contest.arena is arenas["one"] and "checkpoints of one training" in contest.points.layout.title.text
    contest.zoo.value = "many"
    contest.generator.value = HELD_OUT
    assert coloured(contest) == HELD_OUT and contest.strength.options == ("as it is",)


def test_a_click_shows_the_network_beside_its_nearest_original_with_units_matched(contest, arenas):
    contest.generator.value = "copy"
    arena, trace = arenas["many"], next(t for t in contest.points.data if t.name == "copy")

    class Points:
        point_inds = [2]

    contest._clicked(trace, Points, None)
    row = contest.frame[(contest.frame.method == "copy") & (contest.frame["index"] == 2)].iloc[0]
    assert contest.chosen == row.name and contest.index.value == 2 and f"copy 2</b>: accuracy {100 * row.accuracy:.2f} %" in contest.facts.value
    name, other, difference = contest._panels.values()
    assert torch.equal(other, arena.reference.originals[row.nearest]) and difference.abs().max() < 1e-6 and torch.equal(name - other, difference)
    assert "0 of 100 images differ" in contest.confusion.layout.title.text
    contest.index.value = 1
    assert "copy 1" in contest.facts.value and contest.points.data[-1].y[0] == pytest.approx(
        100 * contest.frame[(contest.frame.method == "copy") & (contest.frame["index"] == 1)].accuracy.iloc[0])


def test_without_an_arena():
    with pytest.raises(ValueError, match="no arenas"):
        explore.Contest({})
