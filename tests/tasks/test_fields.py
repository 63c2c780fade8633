"""fields.py, objects.py: a network per object, fitted together as one by one; what it is worth, against the same computed plainly."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score

from device import DEVICE
from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.base.recipe import Base, Data, Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.networks import subset
from pdiff_lib.tasks import data, fields, objects
from pdiff_lib.zoos import paths, population, trajectory

K, HELD = 8, 3
DATA = {"task": "fields", "dataset": "digits", "image_size": 8, "train_images": 20, "test_images": 10, "field_points": 128,
        "field_test_points": 200}
BASE = {"network": "field-12-12", "pretrained": False, "base_epochs": 40, "base_batch": 64, "base_optimizer": "adam", "base_lr": 2e-2,
        "base_weight_decay": 0.0}
SETTINGS = {**DATA, **BASE, "subset": "all", "zoo_mode": "independent", "zoo_start": "first", "k_checkpoints": K, "ae_kind": "pca", "latent_dim": 4,
            "denoiser_kind": "mlp", "mlp_width": 8, "diffusion_steps": 3, "T": 10, "sampler": "ddim", "sampling_steps": 3, "samples": 4,
            "noise_scales": [0.05]}
TINY = {"flow": {"steps": 3, "width": 8, "blocks": 1, "solver_steps": 3}, "unit flow": {"steps": 3, "width": 8, "blocks": 1, "heads": 2, "solver_steps": 3},
        "G.pt": {"steps": 3, "width": 16, "layers": 1, "heads": 2, "sampling_steps": 3}}
base = Base(**BASE)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("stages"))


def experiment(store, **changes) -> Experiment:
    return Experiment(Recipe.of(**{**SETTINGS, **changes}), store, device=DEVICE, progress=False)


def task(**changes) -> fields.Fields:
    return fields.Fields(Data(**{**DATA, **changes}))


@pytest.fixture(scope="module")
def grey(store) -> Experiment:
    return experiment(store)


@pytest.fixture(scope="module")
def glyph(store) -> Experiment:
    return experiment(store, field_kind="glyph", image_size=16)


def test_values_are_those_between_the_pixels():
    """At centres of pixels the pixel, between two their mean, at the edge the outermost; x to the right, y down."""
    picture = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)[..., :3]
    points = torch.tensor([[-2 / 3, -2 / 3], [2 / 3, -2 / 3], [-1 / 3, 2 / 3], [1, 1]])
    torch.testing.assert_close(255 * objects.at(picture, 3, points)[0], torch.tensor([0, 2, 8.5, 10]))


def test_objects_are_all_images_training_before_test_in_a_random_order():
    t, images = task(), data.load("digits", size=8, train_images=20, test_images=10)
    assert len(t.objects) == 30 and t.objects.fitted == 20 and [name.split()[0] for name in t.objects.names] == ["training"] * 20 + ["test"] * 10
    where = [int(name.split()[-1]) for name in t.objects.names]
    assert sorted(where[:20]) == list(range(20)) != where[:20]
    assert torch.equal(t.objects.labels, torch.cat([images.y_train[where[:20]], images.y_test[where[20:]]]))
    torch.testing.assert_close(t.objects.test_values[3], objects.at(images.x_train[where[3]][None], 8, t.objects.test_points)[0])
    assert not (t.objects.points[0][:, None] == t.objects.test_points).all(dim=2).any()


@pytest.mark.parametrize("kind", ["grey", "glyph"])
def test_together_they_end_where_each_alone_would(kind):
    """Each learns its own object, from its own batches: `population.train` of three, and `zoo.train` of each."""
    t, members = task(field_kind=kind), [4, 0, 7]
    settings = {**dataclasses.asdict(base), "base_epochs": 2}
    nets, seeds = population.initial(t, base, members), [population.member_seed(0, i) for i in members]
    losses = population.train(nets, t.of_members(members), seeds, device=DEVICE, progress=False, **settings)
    for i, seed, net, loss in zip(members, seeds, nets, losses):
        alone = population.create(t, base, i)
        plain = trajectory.train(alone, t.of_members([i]), device=DEVICE, progress=False, **{**settings, "seed": seed})
        torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-4)
        for a, b in zip(net.parameters(), alone.to(next(net.parameters()).device).parameters()):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_batch_is_of_points_of_its_own_object():
    t = task(field_kind="glyph").of_members([5, 2])
    batch_of, per_epoch = t.batches([1, 2], 64, base, torch.device("cpu"), "train")
    assert per_epoch == 2
    x, y = (torch.cat([batch_of(i, slice(1, 2))[k][0] for i in range(2)]) for k in (0, 1))
    own = {tuple(p.tolist()): bool(v) for p, v in zip(t.objects.points[2], t.objects.values[2])}
    assert {tuple(p.tolist()): bool(v) for p, v in zip(x, y)} == own


@pytest.mark.parametrize("start", population.KINDS)
def test_what_networks_start_from(start, store):
    t, members = task(), [0, 1, 6]
    first, *others = population.initial(t, base, members, start, store=store, device=DEVICE, progress=False)
    sub = subset.select(first, "all")
    own = [sub.flatten(population.create(t, base, i)) for i in members]
    zoo = population.collect(t, 2, start=start, store=store, device=DEVICE, progress=False, **dataclasses.asdict(base))
    assert torch.equal(sub.flatten(first), own[0])
    wanted = {"independent": own[1:], "common": [own[0]] * 2, "first": [zoo.theta[0]] * 2}[start]
    for net, theta in zip(others, wanted):
        assert torch.equal(sub.flatten(net), theta)
    assert not torch.equal(zoo.theta[0], own[0])


def test_networks_from_the_first_one_stay_nearer_to_each_other_and_each_is_its_own_object(grey, store):
    apart = experiment(store, zoo_start="independent")
    assert "K = 8 networks from the first one" in grey.title and "K = 8 independent" in apart.title
    assert torch.pdist(grey.zoo.theta).max() < torch.pdist(apart.zoo.theta).min()
    for e in (grey, apart):
        assert torch.equal(e.task.fidelity(e.predictions(ORIGINAL)).argmax(dim=1), torch.arange(K))
        assert e.task.fidelity(e.predictions(ORIGINAL)).diagonal().mean() > 20 > e.judged(ORIGINAL).score.max()
    torch.testing.assert_close(grey.zoo.theta[0], apart.zoo.theta[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["grey", "glyph"])
def test_score_is_the_fidelity_to_the_nearest_test_object(kind, request):
    e = request.getfixturevalue(kind)
    found = e.predictions(PDIFF)[..., 0]
    y = e.task.objects.test_values[20:]
    with torch.no_grad():
        net = e.subset.load(e.task.network(e.recipe.base), e.theta(PDIFF)[1])
        torch.testing.assert_close(found[1], net(e.task.x_test)[:, 0], atol=1e-4, rtol=1e-4)
    if kind == "grey":
        plain = torch.tensor([[-10 * math.log10(F.mse_loss(f.double(), o.double())) for o in y] for f in found])
    else:
        plain = torch.tensor([[jaccard_score(o, f > 0) for o in y] for f in found])
    judged = e.judged(PDIFF)
    torch.testing.assert_close(judged.score, plain.double().amax(dim=1), rtol=1e-5, atol=1e-5)
    near = plain.argmax(dim=1)
    if kind == "glyph":
        wrong = (found > 0) != y[near]
    else:
        own = e.predictions(ORIGINAL)[..., 0]
        theirs = torch.stack([min(y, key=lambda o: F.mse_loss(f, o)) for f in own])
        wrong = (found - y[near]).abs() > (own - theirs).abs().median()
    assert torch.equal(judged.wrong, wrong)
    assert kind == "glyph" or 0.4 < e.wrong(ORIGINAL).float().mean() < 0.6


def test_objects_of_networks_do_not_count_and_items_do(glyph):
    """A perfect copy of a training object is worth what that object is worth: not 1."""
    t = glyph.task
    outputs = torch.where(t.objects.test_values, 1.0, -1.0)[..., None]  # perfect fields of all objects
    judged = t.judged(outputs)
    assert (judged.score[20:] == 1).all() and not judged.wrong[20:].any() and (judged.score[:20] < 1).all()
    half = torch.arange(100)
    judged = t.judged(outputs, items=half)
    assert judged.wrong.shape == (30, 100)
    y = t.objects.test_values[:, :100]
    torch.testing.assert_close(judged.score[0].item(), max(jaccard_score(y[0], o) for o in y[20:]))


def test_outputs_that_are_not_finite_leave_no_score_and_are_wrong(grey, glyph):
    for e in (grey, glyph):
        outputs = e.predictions(ORIGINAL)
        outputs[2, 5] = torch.nan
        judged = e.task.judged(outputs, e.predictions(ORIGINAL))
        assert judged.score.isnan().tolist() == [i == 2 for i in range(K)] and bool(judged.wrong[2, 5])


def test_empty_beside_empty_is_alike(glyph):
    nothing = torch.full((1, 200, 1), -1.0)
    assert (glyph.task.fidelity(nothing) == 0).all()
    none = (~glyph.task.objects.test_values.any(dim=0)).nonzero()[:, 0]
    assert len(none) and (glyph.task.fidelity(nothing, none) == 1).all()


def test_a_longer_zoo_is_the_same_networks_and_others(store, grey, monkeypatch):
    monkeypatch.setattr(population, "CHUNK", 4)
    monkeypatch.setattr(population, "_at_once", lambda *_: 4)
    folder = Store(store.folder / "longer")
    settings = {"start": "first", "store": folder, "device": DEVICE, "progress": False, **dataclasses.asdict(base)}
    short, long = (population.collect(grey.task, k, **settings) for k in (5, 9))
    assert torch.equal(short.theta, long.theta[:5])
    assert len(list((folder.folder / "population").glob("*.safetensors"))) == 3  # the first; 1 to 4; 5 to 8
    torch.testing.assert_close(short.theta[:5], grey.zoo.theta[:5], rtol=1e-2, atol=1e-3)


def test_losses_on_the_way_are_of_the_nearest_test_object(store):
    t = task()
    found = paths.collect(t, 3, 2, start="common", store=store, device=DEVICE, progress=False, **dataclasses.asdict(base))
    assert torch.equal(found.theta[0, 0], found.theta[2, 0]) and (found.loss[:, 1] < found.loss[:, 0]).all()
    net, items = population.create(t, base, 0), torch.randperm(200, generator=torch.Generator().manual_seed(0))[:100]
    sub = subset.select(net, "all")
    with torch.no_grad():
        given = sub.load(net, found.theta[1, 1])(t.x_test[items])[:, 0]
    plain = min(F.mse_loss(given, y[items]).item() for y in t.objects.test_values[20:])
    assert found.loss[1, 1].item() == pytest.approx(plain, rel=1e-3)


def test_every_generator_runs_on_fields_in_the_arena(store):
    arena = Arena(Recipe.of(**SETTINGS), HELD, settings=TINY, moments=3, store=store, device=DEVICE, progress=False)
    names = ["copy", "average", "interpolation 0.5", "gaussian 1", PDIFF, "flow", "unit flow", "G.pt"]
    frame = arena.frame(names)
    assert arena.orders == ("raw",) and arena.units is None and arena.entrants("raw", 0).methods["unit flow"].settings.places == "learned"
    assert set(frame.method) == {HELD_OUT, *names} and not frame.score.isna().any()
    means = frame.groupby("method").score.mean()
    assert abs(means["copy"] - means[HELD_OUT]) < 3 and means[["copy", HELD_OUT]].min() > means[["unit flow", "G.pt"]].max()
    held = arena.experiment.predictor(arena.held)
    assert torch.equal(arena.experiment.task.fidelity(held).argmax(dim=1), torch.arange(K, K + HELD))
    assert "networks from the first one" in arena.title


@pytest.mark.parametrize("changes, message", [
    ({"network": "mlp-8"}, "network 'mlp-8' of points with 2 coordinates"), ({"pretrained": True}, "expected False and '' with task 'fields'"),
    ({"image_channels": 3}, "image_channels is 3 with task 'fields'"), ({"zoo_mode": "trajectory"}, "zoo_start is 'first' with zoo_mode 'trajectory'"),
    ({"zoo_mode": "trajectory", "zoo_start": "independent"}, "zoo_mode is 'trajectory' with task 'fields'"),
    ({"k_checkpoints": 21}, "network 20 of a zoo of digits, which has 20 objects for training"), ({"zoo_start": "third"}, "zoo_start is 'third'"),
    ({"field_kind": "glyph", "field_points": 2}, "is empty: no grey value of at least 0.5"),
    ({"subset": "layers.0.*"}, "expected 'all'")])
def test_what_fields_do_not_take_is_said_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(Store(None), **changes)


def test_networks_without_objects_of_their_own_are_refused():
    t = task()
    with pytest.raises(ValueError, match="expected of_members"):
        t.batches([0], 8, base, torch.device("cpu"), "train")
    with pytest.raises(ValueError, match="start is 'third'"):
        population.initial(t, base, [0], "third")


def test_a_network_of_ones_own():
    net = task().network(dataclasses.replace(base, network="torch.nn:Linear"))
    assert net.input_shape == (2,) and net.out_features == 1
