"""experiment.py: a very small recipe, walked to the end; its numbers computed again, the plain way."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from device import DEVICE
from pdiff_lib import zoo
from pdiff_lib.base import runs, training
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.experiment import AVERAGE, ORIGINAL, PDIFF, Experiment
from pdiff_lib.generators import autoencoder, denoiser, pdiff
from pdiff_lib.tasks import evaluate
from pdiff_lib.zoos import population

SMALL = {
    "dataset": "digits",
    "image_size": 32,
    "train_images": 100,
    "test_images": 100,
    "network": "test_resnet",
    "pretrained": False,
    "base_epochs": 1,
    "base_batch": 50,
    "k_checkpoints": 6,
    "zoo_batch": 16,
    "crop_scale": 0.6,
    "flip": False,
    "ae_channels": [2, 2],
    "latent_dim": 4,
    "ae_steps": 3,
    "denoiser_channels": [2, 2, 2],
    "diffusion_steps": 3,
    "T": 10,
    "samples": 4,
    "noise_scales": [0.05, 0.5],
}
METHODS = {ORIGINAL: 6, "noise 0.05": 4, "noise 0.5": 4, AVERAGE: 1, "interpolation": 4, "gaussian": 4, PDIFF: 4}


def experiment(folder, **changes) -> Experiment:
    return Experiment(Recipe.of(**{**SMALL, **changes}), runs.Store(folder), device=DEVICE, progress=False)


class Copies:
    """A method of a user's own: hands the zoo back."""

    def fit(self, theta):
        self.theta = theta

    def sample(self, n, generator=None):
        return self.theta[:n].clone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def done(folder) -> Experiment:
    """Everything computed once, with a user's method among it."""
    e = experiment(folder)
    e.add("copies", Copies())
    e.frame()
    return e


def wrong_plain(e: Experiment, name: str) -> np.ndarray:
    """Which test images each network of a method gets wrong: one load and one plain forward per network."""
    net, rows = copy.deepcopy(e.net), []
    x = e.task.images.prepare(e.task.images.x_test)
    for theta in e.theta(name):
        state, at = dict(net.state_dict()), 0
        for n, shape in zip(e.subset.names, e.subset.shapes):
            size = int(np.prod(shape))
            state[n] = theta[at : at + size].reshape(shape)
            at += size
        net.load_state_dict(state)
        with torch.no_grad():
            rows.append((net.eval()(x).argmax(1) != e.task.images.y_test).numpy())
    return np.array(rows)


def test_frame_has_a_row_per_network(done):
    frame = done.frame()
    assert frame.groupby("method", sort=False).size().to_dict() == {**METHODS, "copies": 4}
    assert all(part["index"].tolist() == list(range(len(part))) for _, part in frame.groupby("method"))
    kinds = {"accuracy": "f", "max_similarity": "f", "distance": "f", "outside_span": "f", "index": "i", "nearest": "i"}
    assert {c: frame[c].dtype.kind for c in kinds} == kinds and list(frame.columns)[:2] == ["method", "index"]
    assert set(frame.columns) == {"method", *kinds} and not frame.isna().any().any()
    assert frame["nearest"].between(0, 5).all() and frame["accuracy"].between(0, 1).all()
    assert done.frame([PDIFF]).equals(frame[frame.method == PDIFF].reset_index(drop=True))


def similarity_plain(a: np.ndarray, b: np.ndarray) -> float:
    """Eq. 7, of two networks."""
    either = (a | b).sum()
    return (a & b).sum() / either if either else 1.0


def test_accuracy_and_similarity_are_those_of_plain_forwards(done):
    frame, originals = done.frame(), wrong_plain(done, ORIGINAL)
    assert 0 < originals.mean() < 1
    for name, part in frame.groupby("method", sort=False):
        wrong = wrong_plain(done, name)
        np.testing.assert_allclose(part.accuracy, 1 - wrong.mean(1), atol=1e-9)
        pairs = np.array([[similarity_plain(w, o) for o in originals] for w in wrong])
        distances = np.linalg.norm(
            done.theta(name).numpy()[:, None].astype(float) - done.zoo.theta.numpy()[None], axis=2
        )
        if name == ORIGINAL:  # an original is no neighbour of itself
            np.fill_diagonal(pairs, -1)
            np.fill_diagonal(distances, np.inf)
        np.testing.assert_allclose(part.max_similarity, pairs.max(1), rtol=1e-6)
        np.testing.assert_allclose(pairs[range(len(part)), part.nearest], pairs.max(1))
        np.testing.assert_allclose(part.distance, distances.min(1), rtol=1e-4, atol=1e-6)


def test_methods_give_what_their_names_say(done):
    theta = done.zoo.theta
    torch.testing.assert_close(done.theta(AVERAGE), theta.mean(0, keepdim=True))
    assert torch.equal(done.theta(ORIGINAL), theta) and (theta.diff(dim=0) != 0).any(1).all()
    for name in METHODS:
        assert done.theta(name).shape == (METHODS[name], done.subset.numel)
    frame = done.frame([ORIGINAL, "copies"])
    copies = frame[frame.method == "copies"]
    assert (copies.max_similarity == 1).all() and (copies.distance == 0).all()
    assert (frame[frame.method == ORIGINAL].distance > 0).all()


def test_summary_is_the_mean_of_the_frame(done):
    frame, summary = done.frame(), done.summary()
    assert summary.n_models.to_dict() == {**METHODS, "copies": 4}
    by_method = frame.groupby("method", sort=False)
    for column, expected in {
        "mean": by_method.accuracy.mean(),
        "best": by_method.accuracy.max(),
        "max_similarity": by_method.max_similarity.mean(),
        "distance": by_method.distance.mean(),
    }.items():
        np.testing.assert_allclose(summary[column], expected, rtol=1e-6)


def forbidden(*args, **kwargs):
    raise AssertionError("computed although it was kept")


# Every training goes through training.loop.
COMPUTING = [(training, "loop"), (evaluate, "wrong"), (autoencoder, "fit"), (denoiser, "fit"), (pdiff.PDiff, "sample")]


def test_a_second_experiment_computes_nothing(done, folder, monkeypatch):
    for module, name in COMPUTING:
        monkeypatch.setattr(module, name, forbidden)
    again = experiment(folder)
    again.add("copies", Copies())
    pd.testing.assert_frame_equal(again.frame(), done.frame(), check_exact=True)
    assert again.store.seconds.keys() >= {"network", "zoo", "autoencoder", "denoiser", "generated", "predictions"}
    assert torch.equal(again.training_losses, done.training_losses) and len(again.training_losses) == 2


@pytest.mark.parametrize(
    "changes, stages",
    [
        ({"samples": 3}, {"generated", "predictions"}),
        ({"test_images": 50}, {"predictions"}),
        ({"sampler": "ddim"}, {"generated", "predictions"}),
        ({"diffusion_steps": 4}, {"denoiser", "generated", "predictions"}),
        ({"ae_steps": 4}, {"autoencoder", "denoiser", "generated", "predictions"}),
    ],
)
def test_a_setting_recomputes_what_depends_on_it(done, folder, changes, stages):
    before = {p for p in folder.rglob("*.safetensors")}
    experiment(folder, **changes).frame([PDIFF])
    new = {p for p in folder.rglob("*.safetensors")} - before
    assert {p.parent.name for p in new} == stages
    for p in new:
        p.unlink()


def test_a_seed_changes_the_networks(done, tmp_path):
    other, same = experiment(tmp_path / "a", seed=1), experiment(tmp_path / "b")
    assert torch.equal(same.zoo.theta, done.zoo.theta)
    assert not torch.equal(other.zoo.theta, done.zoo.theta)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "digitz"}, "data 'digitz' is unknown; did you mean digits"),
        ({"network": "resnet19"}, "network 'resnet19' is unknown"),
        ({"subset": "layer9.*"}, r"'layer9.\*' matches no parameter"),
        ({"subset": "last_norms:99"}, "last_norms:99.*normalisation layers"),
        ({"subset": "last_norms:x"}, "N at least 1"),
        ({"network": "mlp-mini"}, "image_size = 32: mlp-mini takes 64x64"),
        ({"image_size": 4, "network": "convnext_atto"}, "shape"),
        ({"train_images": 401}, "train_images = 401"),
        ({"image_channels": 2}, "image_channels is 2"),
        ({"network": "hyperrep-cnn", "pretrained": True}, "pretrained"),
        ({"weights": "absent.safetensors"}, "no such file"),
        ({"sampler": "ddim", "sampling_steps": 11}, "11"),
        ({"denoiser_channels": [2, 3, 4]}, "denoiser_channels|channels"),
        ({"beta_1": 2.0}, "beta_1 is 2.0"),
        ({"k_checkpoints": 1}, "k_checkpoints is 1"),
        ({"ae_batch": 1}, "ae_batch is 1"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_before_any_training(tmp_path, monkeypatch, changes, message):
    for module, name in COMPUTING:
        monkeypatch.setattr(module, name, forbidden)
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_images_of_another_kind_than_a_network_takes(tmp_path):
    with pytest.raises(ValueError, match="takes 64x64"):
        experiment(tmp_path, network="mlp-mini")
    e = experiment(tmp_path, network="mlp-mini", image_size=64, image_channels=3)
    assert e.task.images.channels == 3 and e.task.images.x_train.shape == (100, 3, 8, 8)


def test_methods_by_name(done):
    for ask in (done.fitted, done.theta, done.wrong, lambda name: done.frame([name])):
        with pytest.raises(ValueError, match="no method 'pdiff': expected one of .*p-diff"):
            ask("pdiff")
    for name in (PDIFF, ORIGINAL, "copies"):
        with pytest.raises(ValueError, match="already"):
            done.add(name, Copies())


def test_a_users_method_is_checked(done):
    class Broken(Copies):
        def sample(self, n, generator=None):
            return self.theta[:n] * float("nan")

    class Short(Copies):
        def sample(self, n, generator=None):
            return self.theta[:n, 1:]

    kept = len(list(done.store.folder.rglob("*.safetensors")))
    for method, message in ((Broken, "'own': .*NaN or infinity in 4 of 4"), (Short, "'own': .*expected .vectors")):
        done.methods["own"] = method()
        done._fitted.pop("own", None)
        with pytest.raises(ValueError, match=message):
            done.theta("own")
        del done.methods["own"]
    assert len(list(done.store.folder.rglob("*.safetensors"))) == kept


class Centred(Copies):
    """Works in place on what it gets, draws from what is global, gives NumPy's float64."""

    def fit(self, theta):
        theta -= theta.mean(0)
        super().fit(theta)

    def sample(self, n, generator=None):
        return np.random.randn(n, self.theta.shape[1]) + self.theta[:n].double().numpy()


def test_a_users_method_changes_nothing_that_others_see(done, folder):
    e, again = experiment(folder), experiment(folder)
    e.add("own", Centred())
    e.add("no NumPy", Copies())
    own = e.theta("own")
    np.random.rand(3)
    again.add("own", Centred())
    assert torch.equal(own, again.theta("own")) and own.dtype == torch.float32  # global draws repeat
    for name in (ORIGINAL, "no NumPy", AVERAGE):
        assert torch.equal(e.theta(name), done.theta(name) if name in done.methods or name == ORIGINAL else e.zoo.theta[:4])
    assert torch.equal(e.wrong(ORIGINAL), done.wrong(ORIGINAL))
    with pytest.raises(ValueError, match="method 'class' is a type"):
        e.add("class", Copies)


def test_a_method_that_reaches_for_the_originals_is_named(done, folder):
    class Reaches(Copies):
        def fit(self, theta):
            super().fit(theta)
            if at == "fit":
                e.zoo.theta.data -= 1

        def sample(self, n, generator=None):
            if at == "sampling":
                e.zoo.theta[0].zero_()
            return super().sample(n)

    for at in ("fit", "sampling"):
        e = experiment(folder)
        e.add("own", Reaches())
        with pytest.raises(ValueError, match=f"'original' were changed in place by the {at} of method 'own'"):
            e.theta("own")
        with pytest.raises(ValueError, match="'original' were changed in place"):  # and nothing is computed from them any more
            e.frame([AVERAGE])


def test_what_is_handed_out_and_changed_is_found(done, folder):
    e = experiment(folder)
    e.theta(AVERAGE).numpy()[0, 0] += 1
    with pytest.raises(ValueError, match="'average' were changed in place"):
        e.frame([AVERAGE])
    for ask in (e.wrong, e.predictions):
        ask(ORIGINAL).zero_()
        assert torch.equal(ask(ORIGINAL), getattr(done, ask.__name__)(ORIGINAL))
    e = experiment(folder, test_images=60)  # its predictions are not kept yet
    with torch.no_grad():
        next(e.net.parameters()).zero_()
    with pytest.raises(ValueError, match="the trained network was changed in place"):
        e.wrong(ORIGINAL)
    e = experiment(folder, permutations=0, zoo_lr=0.02)  # nor is its zoo
    e.net.get_buffer("bn1.running_var").zero_()
    with pytest.raises(ValueError, match="the trained network was changed in place"):
        e.zoo


def test_originals_that_are_all_the_same_are_said_before_any_method_is_fitted(folder, done, monkeypatch):
    e = experiment(folder, zoo_lr=0.0)
    assert len(e.wrong(ORIGINAL)) == 6  # themselves they can be looked at
    monkeypatch.setattr(training, "loop", forbidden)
    for name in (PDIFF, AVERAGE):
        with pytest.raises(ValueError, match="all 6 originals are the same vector: expected at least two different ones"):
            e.theta(name)


def test_a_tensor_that_is_the_same_in_all_originals_is_named(folder, done):
    e = experiment(folder)
    z = dataclasses.replace(e.zoo, theta=e.zoo.theta.clone())
    at, size = sum(e.subset.sizes[:1]), e.subset.sizes[1]
    z.theta[:, at:at + size] = 0.5
    e.zoo = z
    e._kept.keep(ORIGINAL, z.theta)
    with pytest.warns(UserWarning, match=f"1 of 4 tensors are the same in all 6 originals .{e.subset.names[1]}.:"):
        e.learned_from


def test_vectors_of_all_floats_are_evaluated_alike_and_others_refused(done, unchecked):
    theta = done.zoo.theta.bfloat16().float()
    want, frame = done.wrong_of(theta), done.frame_of("own", theta)
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.numpy, lambda t: t.clone().requires_grad_()):
        assert torch.equal(done.wrong_of(change(theta)), want)
        pd.testing.assert_frame_equal(done.frame_of("own", change(theta)), frame)
    wrong = {"theta.None.": theta[0], "in 6 of 6": theta / 0, "int64": theta.long(), "shape": theta[:, 1:]}
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            done.wrong_of(bad)


def test_scores_that_are_not_finite_are_no_class(done):
    theta = done.zoo.theta.clone()
    theta[1] = 3e38
    with pytest.warns(UserWarning, match="NaN or infinit"):
        predictions = done.predictions_of(theta)
    assert (predictions[1] == -1).all() and (predictions[[0, *range(2, 6)]] >= 0).all()
    assert done.wrong_of(theta)[1].all() and predictions.dtype == torch.int16


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A trained network's weights in a file; how good they are on the test images."""
    tmp_path = tmp_path_factory.mktemp("weights")
    e = experiment(tmp_path, base_epochs=25, base_lr=0.01, crop_scale=1.0)
    save_file(e.net.state_dict(), tmp_path / "w.safetensors")
    x, y = e.task.images.prepare(e.task.images.x_test), e.task.images.y_test
    with torch.no_grad():
        return tmp_path / "w.safetensors", float((e.net(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_first_accuracy_of_weights_is_printed(weights, tmp_path, capsys, recwarn, epochs):
    file, accuracy = weights
    assert accuracy > 0.5
    shared, changes = {}, {**SMALL, "weights": str(file), "base_epochs": epochs}
    for _ in range(2):  # once for all that share
        e = Experiment(Recipe.of(**changes), runs.Store(tmp_path), DEVICE, False, shared)
        assert not e.net.training
    out = capsys.readouterr().out
    assert out.count("test images are right before any training") == 1
    assert f"weights '{file}': {accuracy:.1%} of 100 test images" in out and not recwarn.list


@pytest.mark.parametrize("change", ["scale", "order", "head"])
def test_weights_near_chance_are_warned_of_before_any_work(weights, tmp_path, monkeypatch, change):
    state = load_file(weights[0])
    if change == "scale":  # as if trained on inputs 40 times as large and far from 0
        state["conv1.0.weight"] = state["conv1.0.weight"] / 400
        state["conv1.1.running_mean"] = state["conv1.1.running_mean"] + 4
    if change == "order":
        state |= {k: state[k].roll(3, 0) for k in ("fc.weight", "fc.bias")}
    if change == "head":
        state["fc.weight"] = torch.randn(state["fc.weight"].shape, generator=torch.Generator().manual_seed(0))
        state["fc.bias"] = torch.zeros(10)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "other.safetensors")
    monkeypatch.setattr(training, "loop", forbidden)
    with pytest.warns(UserWarning, match="near chance .* input scale .* another order, or with another head"):
        with pytest.raises(AssertionError, match="computed although"):
            experiment(tmp_path, weights=str(tmp_path / "other.safetensors")).net


def test_an_interrupted_training_does_not_change_the_next(done, tmp_path, monkeypatch):
    e = experiment(tmp_path)

    def interrupted(net, *args, train=zoo.train, **kwargs):
        train(net, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(zoo, "train", interrupted)
        e.net
    assert torch.equal(e.subset.flatten(e.net), done.subset.flatten(done.net))


def test_training_path_ends_at_the_trained_network_and_starts_at_the_untrained(done):
    path = done.training_path(3)
    assert path.epochs[0] == 0 and path.epochs[-1] == 1 and path.theta.shape == (len(path.epochs), done.subset.numel)
    trained = done.subset.flatten(done.net)
    assert torch.equal(path.theta[-1], trained) and not torch.equal(path.theta[0], trained)
    x, y = done.task.images.prepare(done.task.images.x_test), done.task.images.y_test
    with torch.no_grad():
        right = (done.net(x).argmax(1) == y).double().mean()
    assert float(path.accuracy[-1]) == pytest.approx(float(right), abs=1e-6)
    with pytest.raises(ValueError, match="moments is 1"):
        done.training_path(1)


def test_methods_with_other_settings_stand_beside_the_recipes(done, folder):
    e = experiment(folder)
    e.add("p-diff, PCA", e.pdiff(ae_kind="pca"))
    e.add("VAE", e.vae(vae_steps=2))
    with pytest.raises(ValueError, match="unknown setting 'k_checkpoints'"):
        e.pdiff(k_checkpoints=3)
    frame = e.frame([PDIFF, "p-diff, PCA", "VAE"])
    assert frame.groupby("method").size().to_dict() == {PDIFF: 4, "p-diff, PCA": 4, "VAE": 4}
    assert (frame[frame.method == "p-diff, PCA"].outside_span < 1e-3).all()
    assert (frame[frame.method == "VAE"].outside_span > 0.1).all()
    assert torch.equal(e.theta(PDIFF), done.theta(PDIFF)) and not torch.equal(e.theta("p-diff, PCA"), e.theta("VAE"))
    assert e.fitted("p-diff, PCA").sampling == e.fitted(PDIFF).sampling and e.fitted("VAE").settings.kl_weight == 1.0


def test_seconds_are_those_of_the_computing_also_when_read_back(tmp_path):
    first, again = experiment(tmp_path), experiment(tmp_path)
    for e in (first, again):
        e.frame([ORIGINAL, AVERAGE, PDIFF])
    kept = {p.parent.name: runs.read(p)[1]["seconds"] for p in tmp_path.rglob("*.safetensors")}
    want = {"fit": kept["autoencoder"] + kept["denoiser"], "sample": kept["generated"]}
    assert first.seconds[PDIFF] == again.seconds[PDIFF] == pytest.approx(want, abs=1e-9)
    assert first.seconds.keys() == {AVERAGE, PDIFF}
    assert 0 < min(again.seconds[AVERAGE].values()) < 1  # by the clock: it has no stage


def test_experiments_that_share_do_not_load_or_capture_twice(folder, done):
    shared = {}
    a, b, other = (Experiment(Recipe.of(**{**SMALL, **c}), runs.Store(folder), DEVICE, False, shared)
                   for c in ({}, {"T": 4}, {"test_images": 50}))
    assert a.task.images is b.task.images is not other.task.images and a.predictor is b.predictor is not other.predictor
    assert torch.equal(a.wrong(ORIGINAL), done.wrong(ORIGINAL)) and other.wrong(ORIGINAL).shape == (6, 50)


INDEPENDENT = {"network": "hyperrep-cnn", "image_channels": 3, "subset": "all", "zoo_mode": "independent", "base_epochs": 2}


@pytest.fixture(scope="module")
def independent(folder) -> Experiment:
    return experiment(folder, **INDEPENDENT)


def test_independent_originals_are_a_population(independent, folder):
    e = independent
    collected = population.collect(e.task.images, 6, device=DEVICE, progress=False, **dataclasses.asdict(e.recipe.base))
    torch.testing.assert_close(e.zoo.theta, collected.theta)
    assert e.zoo.names == e.subset.names and e.zoo.losses.shape == (6,) and torch.pdist(e.zoo.theta).min() > 1
    np.testing.assert_array_equal(e.wrong(ORIGINAL).numpy(), wrong_plain(e, ORIGINAL))
    assert set(e.store.seconds) == {"population", "predictions"}  # no network is trained beside them
    assert e.frame([ORIGINAL, PDIFF]).groupby("method").size().to_dict() == {ORIGINAL: 6, PDIFF: 4}


def test_aligned_originals_are_the_same_networks_nearer_to_each_other(independent, folder, monkeypatch):
    e = experiment(folder, **INDEPENDENT, alignment="reference")
    with monkeypatch.context() as m:
        m.setattr(training, "loop", forbidden)  # the population is kept
        aligned = e.zoo.theta
    assert torch.equal(aligned[0], independent.zoo.theta[0]) and torch.equal(e.learned_from, aligned)
    assert torch.pdist(aligned).mean() < torch.pdist(independent.zoo.theta).mean()
    errors = [one.wrong(ORIGINAL).float().mean(1) for one in (e, independent)]
    torch.testing.assert_close(*errors, atol=0.011, rtol=0)  # up to rounding
    assert "6 independent, aligned" in e.title


def test_methods_learn_from_permuted_copies_and_are_compared_with_the_originals(independent, folder):
    e = experiment(folder, **INDEPENDENT, permutations=2)
    assert e.learned_from.shape == (18, e.subset.numel) and torch.equal(e.learned_from[:6], e.zoo.theta)
    assert torch.equal(e.zoo.theta, independent.zoo.theta) and torch.equal(independent.learned_from, independent.zoo.theta)
    torch.testing.assert_close(e.theta(AVERAGE)[0], e.learned_from.mean(0))
    assert len(e.theta(ORIGINAL)) == 6 and not torch.equal(e.theta(AVERAGE), independent.theta(AVERAGE))


@pytest.mark.parametrize("changes, message", [
    ({"subset": "last_norms:2"}, "normalisation layers"),
    ({"subset": "10.*"}, r"subset is '10.\*' with zoo_mode 'independent'"),
    ({"network": "test_resnet", "image_channels": 0}, "test_resnet keeps running statistics"),
    ({"network": "test_resnet", "image_channels": 0, "zoo_mode": "trajectory", "alignment": "reference"},
     "no permutations are known"),
    ({"zoo_mode": "trajectory", "subset": "10.*", "permutations": 1}, "a subset of 2 tensors: expected all"),
    ({"zoo_mode": "several"}, "zoo_mode is 'several'"), ({"alignment": "mean"}, "alignment is 'mean'"),
    ({"permutations": -1}, "permutations is -1")])
def test_populations_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path, **{**INDEPENDENT, **changes})


def test_the_keys_of_other_experiments_do_not_depend_on_these_settings(done, folder):
    before = set(folder.rglob("*.safetensors"))
    trajectory = experiment(folder, zoo_mode="trajectory", alignment="none", permutations=0)
    assert torch.equal(trajectory.zoo.theta, done.zoo.theta) and set(folder.rglob("*.safetensors")) == before
