"""Image generation: images by diffusers' own sampler, distances by definition, likeness by correlation; what is not finite has no score."""

import sys
import types

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.linalg import sqrtm
from torch import nn

from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.networks import subset
from pdiff_lib.tasks import features, task

SETTINGS = dict(task="image_generation", dataset="digits", image_size=8, test_images=24, image_steps=3, network="unet-8-16", pretrained=False,
                crop_scale=1.0, flip=True, base_epochs=1, base_lr=2e-3, base_batch=32, subset="unet.conv_out.*", k_checkpoints=4, zoo_batch=8,
                zoo_lr=3e-3, samples=3, ae_channels=[4, 4], latent_dim=2, ae_steps=2, ae_batch=2, denoiser_channels=[4, 4], diffusion_steps=2)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return Experiment(Recipe.of(**SETTINGS), Store(tmp_path_factory.mktemp("stages")), device="cpu", progress=False)


@torch.no_grad()
def plainly(net, params, noises, steps):
    """One network after the other, by diffusers' loop."""
    ddim = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    x = noises
    for t in ddim.timesteps:
        x = ddim.step(torch.func.functional_call(net, params, (x, t)), t, x).prev_sample
    return x


@pytest.mark.parametrize("choice", ["unet.conv_out.*", "unet.conv_norm_out.*"])
@pytest.mark.parametrize("n", [3, 300])  # more than are denoised at once
def test_images_are_those_of_each_network_by_itself(walked, choice, n):
    net = walked.net
    sub = subset.select(net, choice)
    theta = sub.flatten(net) + 0.02 * torch.randn(3, sub.numel, generator=torch.Generator().manual_seed(1))
    noises = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = walked.task.made(net, sub, theta, noises, torch.device("cpu"), steps=4)
    wanted = torch.stack([plainly(net, sub.unflatten(v), noises, 4) for v in theta])
    assert made.shape == (3, n, 1, 8, 8) and torch.allclose(made, wanted, atol=1e-4)
    assert not torch.allclose(made[0], made[1], atol=1e-2)


def test_the_first_step_runs_the_network_once_for_all_vectors(walked, monkeypatch):
    calls = []
    kind = type(walked.net.unet)
    monkeypatch.setattr(kind, "forward", lambda self, x, t, _plain=kind.forward: calls.append(len(x)) or _plain(self, x, t))
    theta = walked.subset.flatten(walked.net).expand(5, -1)
    walked.task.made(walked.net, walked.subset, theta, walked.task.x_test, torch.device("cpu"), steps=2)
    assert calls == [1, 24, 5 * 24]  # the trial of what is last, the first step, the second


def test_training_learns_the_noise(walked):
    losses = walked.training_losses if walked.net else None
    assert losses[-4:].mean() < 0.9 * losses[:2].mean()
    x = walked.task.prepared(walked.task.x_train[:64])
    assert x.min() == -1 and x.max() == 1
    diffusion = DDIMScheduler(1000)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = walked.net(diffusion.add_noise(x, eps, torch.full((64,), 900)), torch.full((64,), 900))
    assert (found - eps).square().mean() < 0.8 * eps.square().mean()


def test_scores_are_frechet_distances_to_the_real_images(walked):
    judge, outputs = walked.task, walked.predictions(ORIGINAL)
    assert outputs.shape == (4, 24, features.FEATURES + 64) and judge.pictures(outputs).shape == (4, 24, 1, 8, 8)
    real = judge.classifier.seen(judge.prepared(judge.y_test)).double().numpy()
    for items in (None, torch.tensor([1, 5, 7, 8])):
        scores = judge.judged(outputs, items=items).score
        for m in range(4):
            own = outputs[m, slice(None) if items is None else items, :features.FEATURES].double().numpy()
            s, r = np.cov(own.T), np.cov(real.T)
            wanted = ((own.mean(0) - real.mean(0)) ** 2).sum() + np.trace(s + r - 2 * sqrtm(s @ r).real)
            assert scores[m].item() == pytest.approx(wanted, rel=1e-3)
    assert torch.allclose(outputs[..., :features.FEATURES], torch.stack([judge.classifier.seen(x) for x in judge.pictures(outputs)]))


def test_frechet_is_what_gaussians_say_and_kid_its_definition():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 3, generator=g) * torch.tensor([1.0, 2.0, 3.0])
    sets = torch.stack([real, real + torch.tensor([3.0, 0, 4.0]), 2 * real])
    assert torch.allclose(features.frechet(sets, real), torch.tensor([0.0, 25.0, 14.0]).double(), atol=0.5)
    a, b = torch.randn(1, 5, 3, generator=g), torch.randn(6, 3, generator=g)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    wanted = (sum(kernel(a[0, i], a[0, j]) for i in range(5) for j in range(5) if i != j) / 20
              + sum(kernel(b[i], b[j]) for i in range(6) for j in range(6) if i != j) / 30 - 2 * sum(kernel(x, y) for x in a[0] for y in b) / 30)
    assert features.kid(a, b).item() == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="features of 1 images and of 6 real ones: expected at least 2"):
        features.frechet(a[:, :1], b)


def test_real_images_are_near_and_the_classifier_is_good(walked):
    judge = walked.task
    distance, kid = judge.real
    assert judge.accuracy > 0.9 and abs(kid) < 0.5
    assert distance < 0.3 * judge.judged(walked.predictions(ORIGINAL)).score.min()


def test_likeness_is_the_correlation_of_images_from_the_same_noise(walked):
    judge, outputs = walked.task, walked.predictions(ORIGINAL).clone()
    x = judge.pictures(outputs).flatten(2)
    pairs = judge.alike(outputs, outputs)
    wanted = np.array([[np.mean([np.corrcoef(a[i], b[i])[0, 1] for i in range(24)]) for b in x.numpy()] for a in x.numpy()])
    assert np.allclose(pairs.numpy(), wanted, atol=1e-4)
    frame = walked.frame([ORIGINAL, "p-diff"])
    np.fill_diagonal(wanted, -1)
    assert np.allclose(frame.max_similarity[:4], wanted.max(axis=1), atol=1e-4)
    assert (frame.nearest[:4] == wanted.argmax(axis=1)).all() and frame.nearest.between(0, 3).all()
    assert frame.attrs["score"]["similarity"].startswith("correlation") and frame.attrs["score"]["better"] == "lower"


def test_what_is_not_finite_has_no_score_and_no_likeness(walked):
    judge, outputs = walked.task, walked.predictions(ORIGINAL).clone()
    outputs[1, 3] = torch.nan
    score, kid, pairs = judge.judged(outputs).score, judge.kid(outputs), judge.alike(outputs, outputs)
    for values in (score, kid, pairs.diagonal()):
        assert values.isnan().tolist() == [False, True, False, False]
    with pytest.warns(UserWarning, match="1 of 4 networks give NaN"):
        judge.warned(outputs)
    huge = walked.theta(ORIGINAL)[:1] * 1e30
    with pytest.warns(UserWarning, match="NaN or infinity"):
        found = walked.frame_of("huge", huge)
    assert found.score.isna().all() and found.max_similarity.isna().all() and (found.nearest == -1).all()


def test_the_classifier_is_kept_and_the_same_without_a_store(walked):
    again = task.of(Recipe.of(**SETTINGS).data)
    assert torch.equal(again.classifier.seen(again.x_test[:2]), walked.task.classifier.seen(again.x_test[:2]))
    assert list(walked.store.folder.glob("image classifier/*.safetensors"))


def test_steps_and_images_count_in_what_predictions_are_kept_by():
    one, other = (task.of(Recipe.of(**SETTINGS | {"image_steps": s}).data) for s in (3, 4))
    assert one.digest != other.digest and one.training_digest == other.training_digest
    assert torch.equal(one.x_test, other.x_test) and one.x_test.shape == (24, 1, 8, 8)
    assert task.of(Recipe.of(**SETTINGS | {"image_size": 16}).data).y_test.shape == (24, 1, 16, 16)


@pytest.mark.parametrize("settings, told", [
    ({"dataset": "scenes", "image_size": 16, "train_images": 4}, "several objects in an image"),
    ({"test_images": 1}, "test_images is 1: expected at least 2"),
    ({"crop_scale": 0.5}, "crop_scale is 0.5: expected 1.0 with ImageGeneration"),
    ({"network": "resnet18"}, "network 'resnet18': expected 'unet-32-64'"),
    ({"image_size": 10, "network": "unet-8-16-32"}, "10 pixels a side"),
    ({"image_steps": 0}, "image_steps is 0"),
])
def test_bad_settings_are_refused_before_anything_is_trained(settings, told):
    with pytest.raises(ValueError, match=told):
        Experiment(Recipe.of(**SETTINGS | settings), Store(None), device="cpu", progress=False)


def test_a_network_for_other_images_is_refused(monkeypatch, unchecked):
    module = types.ModuleType("odd_unets")
    module.wide = lambda in_channels, image_size: nn.Conv2d(3, 3, 1)
    module.short = lambda in_channels, image_size: Short()
    monkeypatch.setitem(sys.modules, "odd_unets", module)
    for name, told in (("wide", "does not take images of"), ("short", "expected the noise in them, of the same shape")):
        with pytest.raises(ValueError, match=told):
            Experiment(Recipe.of(**SETTINGS | {"network": f"odd_unets:{name}", "subset": "all"}), Store(None), device="cpu", progress=False)


class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.c(x)[..., :4]
