"""population.py: networks trained together against the same networks trained one by one; kills; refusals."""

import dataclasses

import pytest
import torch
from torch import nn

from device import DEVICE
from pdiff_lib import networks, zoo
from pdiff_lib.base import recipe, runs, training
from pdiff_lib.networks import subset
from pdiff_lib.tasks import classification, data
from pdiff_lib.zoos import population

SETTINGS = {"base_epochs": 2, "base_lr": 0.02, "base_batch": 10, "crop_scale": 0.5, "network": "hyperrep-cnn",
            "pretrained": False}
STEPS = 2 * 4  # 48 images in batches of 10, the incomplete fifth left out


@pytest.fixture(scope="module")
def images() -> data.Images:
    """24 bright and 24 dark noisy pictures, and as many to test."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 2
    x = (torch.randint(0, 156, (2, 48, 3, 8, 8), generator=g) + 100 * y.view(48, 1, 1, 1)).byte()
    return data.Images("two", "made here", x[0], y, x[1], y, ("dark", "bright"), 32)


def perceptron(seed: int) -> nn.Module:
    """Small, with a layer norm: no convolution, so that a CPU takes the vmap."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 6), nn.LayerNorm(6), nn.LeakyReLU(), nn.Linear(6, 2))
    net.input_shape = (3, 32, 32)
    return net


def convolutional(seed: int) -> nn.Module:
    return networks.create("hyperrep-cnn", 2, 3, seed=seed)


def together(make, images, k=3, **how):
    nets = [make(i) for i in range(k)]
    losses = population.train(nets, images, range(100, 100 + k), device=DEVICE, progress=False, **{**SETTINGS, **how})
    return torch.stack([subset.select(net, "all").flatten(net) for net in nets]), losses


def one_by_one(make, images, k=3, **how):
    nets = [make(i) for i in range(k)]
    losses = [zoo.train(net, images, device=DEVICE, progress=False, **{**SETTINGS, **how, "seed": 100 + i})
              for i, net in enumerate(nets)]
    return torch.stack([subset.select(net, "all").flatten(net) for net in nets]).cpu(), torch.stack(losses)


@pytest.mark.parametrize("optimizer, lr", [("adamw", 0.02), ("adam", 0.02), ("sgd", 0.05)])
@pytest.mark.parametrize("make, at_once", [(perceptron, None), (perceptron, 2), (perceptron, 1), (convolutional, None),
                                           (convolutional, 3)])
def test_each_network_ends_where_training_it_alone_ends(images, make, at_once, optimizer, lr):
    how = {"base_optimizer": optimizer, "base_lr": lr, "base_weight_decay": 0.1}
    theta, losses = together(make, images, at_once=at_once, **how)
    expected, curves = one_by_one(make, images, **how)
    assert losses.shape == (3, STEPS) and torch.pdist(curves).min() > 1e-3  # three different trainings
    torch.testing.assert_close(losses, curves, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(theta, expected, rtol=0, atol=2e-3)
    start = torch.stack([subset.select(net, "all").flatten(net) for net in map(make, range(3))])
    assert ((theta - expected).norm(dim=1) < 5e-3 * (expected - start).norm(dim=1)).all()


def collect(images, folder=None, k=3, **how) -> zoo.Zoo:
    return population.collect(images, k, store=runs.Store(folder), device=DEVICE, progress=False, **{**SETTINGS, **how})


def test_a_population_is_the_networks_of_its_seeds(images):
    z, base = collect(images), recipe.Base(**SETTINGS)
    for i in range(3):
        net = networks.create("hyperrep-cnn", 2, 3, seed=population.member_seed(0, i))
        losses = zoo.train(net, images, device=DEVICE, progress=False, **{**SETTINGS, "seed": population.member_seed(0, i)})
        sub = subset.select(net, "all")
        assert (z.names, z.shapes) == (sub.names, sub.shapes)
        torch.testing.assert_close(z.theta[i], sub.flatten(net).cpu(), rtol=0, atol=2e-3)
        assert z.losses[i].item() == pytest.approx(losses[-STEPS // 2:].mean().item(), rel=1e-3)  # of the last epoch
    untrained = torch.stack([sub.flatten(population.create(images, base, i)) for i in range(3)])
    assert torch.pdist(untrained).min() > 1  # nothing in common to begin with
    assert (z.theta - untrained).norm(dim=1).min() > 0.1


def test_chunks_and_size_do_not_change_a_network(images, tmp_path):
    four = collect(images, tmp_path, k=4, chunk=2)
    rounding = 1e-6 if DEVICE == "cpu" else 1e-3  # elsewhere a vmap holds the whole chunk
    torch.testing.assert_close(collect(images, chunk=3).theta, four.theta[:3], rtol=0, atol=rounding)
    assert len(list((tmp_path / "population").glob("*.safetensors"))) == 2
    assert not torch.equal(collect(images, k=2, seed=1).theta, four.theta[:2])


def test_what_is_kept_is_not_computed_again(images, tmp_path, monkeypatch):
    first = collect(images, tmp_path)
    with monkeypatch.context() as m:
        m.setattr(training, "loop", None)
        second = collect(images, tmp_path)
    assert torch.equal(first.theta, second.theta) and torch.equal(first.losses, second.losses)


class Stop(Exception):
    """The end of a process, as far as the loop can tell."""


@pytest.mark.parametrize("stop", [1, 6])
def test_a_killed_population_resumes_bitwise(images, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)  # after every step
    whole = collect(images, tmp_path / "whole", k=4, chunk=2)
    steps, plain = [], training.loop

    def stopping(loss_at, *args, **kwargs):
        def counted(i):
            steps.append(i)
            if len(steps) == STEPS + stop + 1:  # within the second chunk
                raise Stop
            return loss_at(i)

        return plain(counted, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(training, "loop", stopping)
        with pytest.raises(Stop):
            collect(images, tmp_path / "killed", k=4, chunk=2)
        steps.clear()
        resumed = collect(images, tmp_path / "killed", k=4, chunk=2)
    assert steps == list(range(stop, STEPS))
    assert torch.equal(resumed.theta, whole.theta) and torch.equal(resumed.losses, whole.losses)


@pytest.mark.parametrize("changes, message", [
    ({"k": 1}, "k = 1 networks"), ({"chunk": 0}, "chunks of 0"), ({"pretrained": True}, "pretrained = True"),
    ({"weights": "a.safetensors"}, "weights = 'a.safetensors'"), ({"at_once": 0}, "at_once = 0"),
    ({"network": "test_resnet"}, r"test_resnet keeps running statistics \(conv1.1, conv1.4, bn1, \.\.\.\)"),
    ({"k_checkpoints": 3}, "unknown setting 'k_checkpoints'")])
def test_what_cannot_be_a_population_is_refused(images, changes, message):
    with pytest.raises(ValueError, match=message):
        collect(images, **changes)


def test_small_networks_are_many_to_a_vmap_and_to_a_stage(tmp_path):
    task = classification.Classification(recipe.Data(dataset="digits", image_size=8, train_images=100))
    how = {"network": "mlp-3", "base_epochs": 1, "base_batch": 50, "crop_scale": 1.0, "flip": False, "pretrained": False}
    population.collect(task, 130, store=runs.Store(tmp_path), device=DEVICE, progress=False, **how)
    assert len(list((tmp_path / "population").glob("*.safetensors"))) == 1  # 50 of networks that do not share a vmap


def test_networks_of_several_kinds_and_missing_seeds_are_refused(images):
    for nets, seeds in (([perceptron(0), convolutional(0)], [0, 1]), ([perceptron(0)], [0, 1])):
        with pytest.raises(ValueError, match="expected networks of one kind, a seed for each"):
            population.train(nets, images, seeds, device=DEVICE, progress=False, **SETTINGS)


def test_a_training_that_diverges_is_named(images):
    with pytest.raises(FloatingPointError, match="networks 1 to 3 of 3: the loss is"):
        collect(images, base_optimizer="sgd", base_lr=1e30)


def test_all_settings_of_the_training_are_in_the_key(images, tmp_path):
    """A population with other settings is another one."""
    collect(images, tmp_path, k=2)
    for name, value in {"base_epochs": 1, "base_lr": 0.01, "base_batch": 12, "flip": False, "crop_scale": 0.6,
                        "base_optimizer": "sgd", "base_weight_decay": 0.0, "seed": 1}.items():
        before = len(list((tmp_path / "population").glob("*.safetensors")))
        collect(images, tmp_path, k=2, **{name: value})
        assert len(list((tmp_path / "population").glob("*.safetensors"))) == before + 1
    assert {"base_epochs", "flip", "seed"} <= {f.name for f in dataclasses.fields(recipe.Base)}
