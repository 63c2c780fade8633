"""paths.py: moments of training against training that was stopped there, and their losses."""

import pytest
import torch
import torch.nn.functional as F

from device import DEVICE
from pdiff_lib.base import recipe, runs, training
from pdiff_lib.networks import subset
from pdiff_lib.tasks import task as tasks
from pdiff_lib.tasks.classification import Classification
from pdiff_lib.zoos import paths, population

SETTINGS = {"network": "mlp-4", "pretrained": False, "base_epochs": 3, "base_batch": 20, "base_lr": 1e-2, "flip": False, "crop_scale": 1.0}
STEPS = 3 * 3


@pytest.fixture(scope="module")
def digits() -> Classification:
    return Classification(recipe.Data(dataset="digits", image_size=8, train_images=60, test_images=100))


def collect(task, r=3, moments=5, folder=None, **how):
    return paths.collect(task, r, moments, store=runs.Store(folder), device=DEVICE, progress=False, **{**SETTINGS, **how})


def test_a_moment_is_the_network_after_so_many_steps(digits):
    found, base = collect(digits), recipe.Base(**SETTINGS)
    assert found.theta.shape == (3, 5, 4 * 64 + 4 + 4 * 10 + 10) and found.loss.shape == found.moments.shape == (3, 5)
    assert (found.moments[:, 0] == 0).all() and (found.moments[:, -1] == STEPS).all() and (found.moments.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in found.moments.tolist()}) > 1
    for i in range(3):
        net = population.create(digits, base, i)
        sub = subset.select(net, "all")
        torch.testing.assert_close(found.theta[i, 0], sub.flatten(net))
        loss_at, _ = digits.loss(net, base.base_batch, recipe.Base(**{**SETTINGS, "seed": population.member_seed(0, i)}), torch.device("cpu"), "train")
        optimizer, seen = torch.optim.AdamW(net.parameters(), base.base_lr, weight_decay=base.base_weight_decay), []
        training.loop(loss_at, STEPS, {"net": net.train()}, optimizer, after=lambda step: seen.append(sub.flatten(net).clone()), progress=False)
        for moment, theta in zip(found.moments[i, 1:], found.theta[i, 1:]):
            torch.testing.assert_close(theta, seen[int(moment) - 1], rtol=0, atol=2e-3)


def test_losses_are_those_of_the_first_half_of_the_test_items(digits):
    found, net = collect(digits), population.create(digits, recipe.Base(**SETTINGS), 0)
    items = tasks.halves(100)[0]
    x, y, sub = digits.images.prepare(digits.x_test[items]), digits.y_test[items], subset.select(net, "all")
    for i, s in ((0, 0), (1, 2), (2, 4)):
        own = F.cross_entropy(sub.load(net, found.theta[i, s]).eval()(x), y)
        assert found.loss[i, s].item() == pytest.approx(own.item(), rel=1e-4)
    assert (found.loss[:, -1] < found.loss[:, 0]).all()


def test_paths_end_at_the_networks_of_the_population(digits):
    z = population.collect(digits, 3, device=DEVICE, progress=False, **SETTINGS)
    torch.testing.assert_close(collect(digits).theta[:, -1], z.theta, rtol=0, atol=1e-6)
    torch.testing.assert_close(collect(digits, r=2, first=1).theta[:, -1], z.theta[1:], rtol=0, atol=1e-6)


class Stop(Exception):
    """The end of a process, as far as the loop can tell."""


def test_a_killed_collection_resumes_to_the_same_bits(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)
    whole, plain = collect(digits, folder=tmp_path / "whole"), training.loop

    def stopping(loss_at, *args, **kwargs):
        def counted(i):
            if i == 5:
                raise Stop
            return loss_at(i)

        return plain(counted, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(training, "loop", stopping)
        with pytest.raises(Stop):
            collect(digits, folder=tmp_path / "killed")
    resumed = collect(digits, folder=tmp_path / "killed")
    assert torch.equal(resumed.theta, whole.theta) and torch.equal(resumed.loss, whole.loss)
    with monkeypatch.context() as m:
        m.setattr(training, "loop", None)
        assert torch.equal(collect(digits, folder=tmp_path / "killed").theta, whole.theta)


@pytest.mark.parametrize("how, message", [
    ({"r": 0}, "0 runs at 5 moments"), ({"moments": 1}, "3 runs at 1 moments of 9 steps"), ({"moments": 11}, "from 2 to 10 moments"),
    ({"pretrained": True}, "pretrained = True"), ({"base_epoch": 3}, "did you mean 'base_epochs'")])
def test_what_cannot_be_collected_is_refused(digits, how, message):
    with pytest.raises(ValueError, match=message):
        collect(digits, **how)
