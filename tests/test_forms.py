"""forms.py: what is measured of generated fields, against the same computed pair by pair."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from device import DEVICE
from pdiff_lib import explore, forms, plots
from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import PDIFF
from pdiff_lib.forms import TRAINING, Forms
from pdiff_lib.measures import novelty, shapes
from pdiff_lib.networks import implicit, surfaces
from pdiff_lib.tasks import task

K, HELD, M = 12, 4, 6
SETTINGS = {"task": "fields", "dataset": "digits", "field_kind": "glyph", "image_size": 12, "train_images": 20, "test_images": 15, "field_points": 300,
            "field_test_points": 200, "network": "field-10-10", "pretrained": False, "base_epochs": 30, "base_batch": 64, "base_optimizer": "adam",
            "base_lr": 2e-2, "base_weight_decay": 0.0, "subset": "all", "zoo_mode": "independent", "zoo_start": "first", "k_checkpoints": K,
            "ae_kind": "pca", "latent_dim": 6, "standardise_latents": True, "denoiser_kind": "mlp", "mlp_width": 16, "diffusion_steps": 30, "T": 20,
            "sampler": "ddim", "sampling_steps": 5, "samples": M}
TINY = {"flow": {"steps": 20, "width": 16, "blocks": 1, "solver_steps": 4},
        "HyperDiffusion": {"steps": 5, "width": 16, "blocks": 1, "heads": 2, "T": 20, "sampling_steps": 4}}


class Nothing:
    """Networks that give the same logit everywhere: empty, full and broken ones."""

    def fit(self, theta):
        self.theta = theta[:1]
        return self

    def sample(self, n, generator):
        theta = torch.zeros_like(self.theta).repeat(n, 1)
        theta[:, -1] = torch.tensor([-5.0, 5.0, 3e38, -5.0, -5.0, -5.0])
        theta[2, -2] = theta[2, -12:-1] = 3e38  # too large: infinite logits
        return theta


def max_iou(forms, others) -> float:
    return sum(max(jaccard_score(o, f) for o in others) for f in forms) / len(forms)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("stages"))


def arena(store, **changes) -> Arena:
    return Arena(Recipe.of(**{**SETTINGS, **changes}), HELD, settings=TINY, store=store, device=DEVICE, progress=False)


@pytest.fixture(scope="module")
def glyphs(store) -> Forms:
    return Forms(arena(store))


@pytest.fixture(scope="module")
def bodies(store) -> Forms:
    pytest.importorskip("skimage")
    return Forms(arena(store, field_kind="extruded", network="field-16-16", field_points=800, base_epochs=60), cells=16, points=64, references=5)


def test_the_distance_of_glyphs_is_that_of_sets_of_points(glyphs):
    found, became = glyphs.forms(PDIFF, "raw", 0)
    assert became.whole.all()
    inside = glyphs.arena.experiment.predictions_of(glyphs.arena.entrants("raw", 0).theta(PDIFF))[..., 0] > 0
    distance, near = glyphs.nearest(found)
    plain = torch.tensor([[1 - jaccard_score(o, f) for o in glyphs.objects.test_values[:K]] for f in inside])
    torch.testing.assert_close(distance.double(), plain.double().amin(dim=1))
    assert torch.equal(near, plain.argmin(dim=1))


def test_the_distance_of_grey_pictures_is_that_of_their_values(store):
    forms = Forms(arena(store, field_kind="grey"))
    found, _ = forms.forms(PDIFF, "raw", 0)
    plain = (found[3] - forms.objects.test_values[5]).square().mean().sqrt()
    torch.testing.assert_close(forms.distance(found, forms.training)[3, 5], plain, rtol=1e-5, atol=1e-6)
    assert forms.usual > 0 and "squared" in forms.measure


def test_a_row_holds_what_shapes_and_novelty_say(glyphs):
    t = glyphs.table([PDIFF, "copy", "average"]).set_index("method")
    assert t.index.tolist() == [TRAINING, HELD_OUT, PDIFF, "copy", "average"] and t.loc[TRAINING, "n"] == M
    found, real = glyphs.forms(PDIFF, "raw", 0)[0], glyphs.objects.test_values
    plain = torch.tensor([[1 - jaccard_score(r, f) for r in real[20:20 + M]] for f in found])
    row = t.loc[PDIFF]
    assert row.score == pytest.approx(max_iou(found, real[20:]), abs=1e-6)
    assert t.loc[TRAINING, "score"] == pytest.approx(max_iou(real[:M], real[20:]), abs=1e-6)
    assert row.mmd == pytest.approx(float(plain.amin(dim=0).mean()), abs=1e-6)
    assert row["cov"] == len({int(i) for i in plain.argmin(dim=1)}) / M
    held = glyphs.nearest(glyphs.forms(HELD_OUT, "raw", -1)[0])[0]
    assert row.to_training == pytest.approx(float(glyphs.nearest(found)[0].median() / held.median()), rel=1e-5)
    assert row.z_u == novelty.data_copying(glyphs.nearest(found)[0], held)
    assert t.loc["copy", "to_training"] < 0.8 < t.loc[HELD_OUT, "to_training"] == 1 and t.loc[HELD_OUT, "z_u"] == 0
    assert math.isnan(t.loc["average", "mmd"]), "one network is no set"


def test_what_has_no_form_is_counted_before_it_is_left_out(store):
    a = arena(store)
    a.add("nothing", lambda seed: Nothing())
    with pytest.warns(UserWarning, match="1 of 6 networks give NaN or infinity"):
        row = Forms(a).table(["nothing"]).set_index("method").loc["nothing"]
    assert row[["n", "empty", "full", "broken"]].tolist() == [6, 4 / 6, 1 / 6, 1 / 6] and math.isnan(row.mmd) and math.isnan(row.z_u)


def test_pictures_are_of_what_fields_and_objects_are_there(glyphs):
    theta = glyphs.arena.originals["raw"][:3]
    values, real = glyphs.values(theta, 12), glyphs.real([2, 1, 0], 12)
    assert values.shape == real.shape == (3, 12, 12) and 0 <= values.min() and values.max() <= 1
    x, y = 7, 4
    point = torch.tensor([[(x + 0.5) / 6 - 1, (y + 0.5) / 6 - 1]])
    torch.testing.assert_close(values[1, y, x], glyphs.at(theta, point)[1, 0])
    pixel = glyphs.objects.look([0], point)[0, 0]
    torch.testing.assert_close(real[2, y, x], pixel)
    own = glyphs.task.fidelity(glyphs.arena.experiment.predictions_of(glyphs.arena.originals["raw"])).diagonal()
    assert own.mean() > 0.8
    fig = plots.sheet({"real": glyphs.pictures(real), "one": glyphs.pictures(values[:1])}, "t")
    z = fig.data[0].z
    assert (z[:12, :12] == (250 * real[0]).round().numpy()).all() and (z[:12, 12:15] == 255).all() and fig.layout.yaxis.ticktext == ("real", "one")


def test_few_networks_give_what_many_give_and_little_is_computed_for_nothing(bodies, monkeypatch):
    e, theta, points = bodies.arena.experiment, bodies.arena.originals["raw"], implicit.raster(4, 3)[:50]
    theta = torch.cat([theta, theta, theta])[:11]
    told = task.predict(e._initial, e.subset, theta, points, e.device)[..., 0].sigmoid()
    monkeypatch.setattr(forms, "AT_ONCE", 20)
    asked = []
    vmap = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda f, **how: lambda a, b: asked.append((len(a), len(b))) or vmap(f, **how)(a, b))
    found = bodies.at(theta, points)
    torch.testing.assert_close(found, told)
    assert asked == [(8, 20), (8, 20), (8, 10)] * 2
    torch.testing.assert_close(found[9:], bodies.at(theta[9:], points))
    with pytest.raises(ValueError, match="NaN or infinity"):
        bodies.at(torch.full_like(theta[:1], torch.nan), points)


def test_what_is_not_finite_has_no_picture_and_nothing_beside_it(glyphs):
    theta = glyphs.arena.held[:2].clone()
    theta[1] = 3e38
    with pytest.warns(UserWarning, match="1 of 2 networks give NaN or infinity"):
        beside = glyphs.beside(theta, 12)
    near = glyphs.nearest(glyphs.form_of(theta[:1])[0])[1]
    assert torch.equal(beside[0], glyphs.real(near, 12)[0].clamp(0, 1)) and beside[1].isnan().all()
    e = explore.Fields(glyphs, ["flow"])
    assert e._shown(torch.tensor([[0.2, torch.nan]])).isnan().all()
    assert surfaces.seen(torch.ones(1, 3, 3, 3).index_fill(3, torch.tensor([2]), torch.inf), 0.5).isnan().all()


def test_a_moving_picture_has_all_moments(tmp_path):
    pictures = torch.rand(5, 2, 8, 8)
    pictures[0, 1] = torch.nan
    with Image.open(plots.moving(pictures, tmp_path / "x.webp", side=32)) as image:
        assert image.n_frames == 5 and image.size == (64, 32)
        assert np.asarray(image.convert("L"))[:, 36:60].min() > 240, "nothing is white"
    with pytest.raises(ValueError, match="x.gif: expected a name that ends in .webp"):
        plots.moving(pictures, tmp_path / "x.gif")


def test_bodies_are_on_the_surface_of_what_they_are_fitted_to(bodies, monkeypatch):
    points = bodies.real_forms([3])[0]
    within = points[:, :2].abs().amax(dim=1) < 0.9  # beyond, the glyph reaches the border of its picture
    solid = bodies.objects.look([3], points[within])[0]
    assert within.sum() > 40 and (solid - 0.5).abs().max() < 0.15 and points[:, 2].abs().max() <= 0.25 + 2 / 16
    found, became = bodies.forms(HELD_OUT, "raw", -1)
    assert became.whole.all() and found.shape == (HELD, 64, 3)
    distance = bodies.distance(found, bodies.real_forms(range(K, K + HELD)))
    others = distance[~torch.eye(HELD, dtype=torch.bool)]
    assert distance.diagonal().mean() < 0.6 * others.mean(), "each is nearer to its own object"
    t = bodies.table(["copy", "flow"]).set_index("method")
    assert t.loc["copy", "z_u"] < t.loc["flow", "z_u"] and (t.n == [5, HELD, M, M]).all()
    plain = shapes.minimum_matching_distance(bodies.distance(bodies.forms("flow", "raw", 0)[0], bodies.real_forms(bodies.references)))
    assert t.loc["flow", "mmd"] == pytest.approx(plain, rel=1e-6)
    monkeypatch.setattr(forms.Forms, "distance", None)  # the same table again measures nothing
    pd.testing.assert_frame_equal(Forms(bodies.arena, 16, 64, references=5).table(["copy", "flow"]).set_index("method"), t)


def test_what_forms_do_not_take(store, glyphs):
    with pytest.raises(ValueError, match="references = 16: expected at most the 15 test objects"):
        Forms(glyphs.arena, references=16)
    with pytest.raises(ValueError, match="up is 0: expected 1"):
        Forms(glyphs.arena, up=0)
    other = Arena(Recipe.of(dataset="digits", image_size=8, network="mlp-4", pretrained=False, subset="all", k_checkpoints=3), 2, store=store,
                  device=DEVICE, progress=False)
    with pytest.raises(ValueError, match="task 'classification': expected 'fields'"):
        Forms(other)


# ---------------------------------------------------------------- the explorer

@pytest.mark.parametrize("generator", [PDIFF, "flow", "HyperDiffusion"])
def test_a_chain_ends_at_the_sample_of_its_seed(glyphs, generator):
    e = explore.Fields(glyphs, [generator])
    e.seed.value = 3
    e.follow_button.click()
    assert e.chain.seed == 3 and "chain of seed 3" in e.status.value
    sample = glyphs.arena.entrants("raw", 0).fitted(generator).sample(1, torch.Generator().manual_seed(3))
    torch.testing.assert_close(e.chain.theta[-1:], sample.cpu(), rtol=1e-4, atol=1e-5)
    assert e.chain.t[0] in (0.0, 20) and len(e.chain.t) == len(e.chain.forms) == e.moment.max + 1
    form, near = glyphs.form_of(sample)[0], glyphs.nearest(glyphs.form_of(sample)[0])
    assert e.chain.nearest == int(near[1][0]) and float(e.chain.distance[-1]) == pytest.approx(float(near[0][0]), abs=1e-5) and len(form) == 1
    assert glyphs.objects.names[e.chain.nearest] in e.facts.value


def test_the_slider_shows_the_moment_and_generate_adds_one(glyphs):
    e = explore.Fields(glyphs)
    assert {"p-diff", "flow", "unit flow", "HyperDiffusion"} <= set(e.generator.options) and "copy" not in e.generator.options
    e.moment.value = 1
    np.testing.assert_allclose(np.array(e.figure.data[0].z, dtype=float), e.chain.forms[1])
    assert e.figure.data[-1].x == (1,) and e.label.value.startswith("moment 1 of")
    e.generate_button.click()
    assert e.seed.value == e.chain.seed == 1 and len(e.generated) == 2 and e.moment.value == e.moment.max
    assert e.table.distance.tolist() == e.chain.distance.tolist()
    e.generator.value = "flow"
    assert e.sampler.options == ("euler", "midpoint", "rk4") and e.steps.value == 4
    e.sampler.value, e.steps.value = "euler", 7
    e.follow_button.click()
    assert len(e.chain.t) == 8 and e.chain.method == "flow" and e.progress.value == 1


def test_a_body_forms_and_is_written_to_a_file(bodies, tmp_path, monkeypatch):
    trimesh = pytest.importorskip("trimesh")
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    e = explore.Fields(bodies, ["flow"])
    e.moment.value = 0
    first = e.figure.data[0].x.copy()
    e.moment.value = e.moment.max
    assert len(first) != len(e.figure.data[0].x) or (first != e.figure.data[0].x).any()
    vertices, faces = e.chain.forms[-1]
    assert len(e.figure.data[0].i) == len(faces) and e.figure.data[1].name == "nearest"
    assert (e.figure.data[0].x == (vertices[:, 0] - 1.1).numpy()).all()
    for kind in ("ply", "glb"):
        mesh = trimesh.load(e.write(kind), force="mesh")
        assert len(mesh.faces) == len(faces) and abs(mesh.volume) > 0.05
    assert surfaces.marching_cubes(bodies.real([0])[0], 0.5)[0].shape[1] == 3


def test_generators_without_a_way_are_refused(glyphs):
    with pytest.raises(ValueError, match="generators copy: expected some of p-diff, flow"):
        explore.Fields(glyphs, ["copy"])
