"""vae.py: the loss against torch.distributions, what it learns, and that a killed training resumes to the bit."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from device import DEVICE
from pdiff_lib.base import runs, training
from pdiff_lib.base.runs import Store
from pdiff_lib.generators.vae import VAE, VariationalAutoencoder, negative_elbo

SMALL = {"ae_channels": (8, 4), "latent_dim": 5, "ae_batch": 16, "vae_steps": 4, "vae_lr": 5e-3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zoo(k=40, d=96, seed=0):
    """Raw vectors along one direction, away from zero, each tensor at its own scale; a little noise."""
    g = seeded(seed)
    scale = torch.cat([torch.full((d // 2,), 0.1), torch.full((d - d // 2,), 4.0)])
    direction, along = torch.randn(d, generator=g), torch.randn(k, 1, generator=g)
    return scale * (1 + along * direction + 0.05 * torch.randn(k, d, generator=g))


def made(**changes):
    return VAE((48, 48), progress=False, **{**SMALL, **changes})


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_negative_elbo_of_torch_distributions(kl_weight):
    net, v = VariationalAutoencoder(70, 4, (4, 4)).eval(), torch.randn(6, 70, generator=seeded())
    with torch.no_grad():
        mean, log_var = net.distribution(v)
    q = Independent(Normal(mean, (log_var / 2).exp()), 1)
    z = mean + q.base_dist.stddev * torch.randn(mean.shape, generator=seeded(1))
    kl = kl_divergence(q, Independent(Normal(torch.zeros(4), torch.ones(4)), 1))
    # log N(v; decoded, I) is minus half the squared error, a constant apart.
    with torch.no_grad():
        likelihood = Independent(Normal(net.decode(z), 1.0), 1).log_prob(v) + 70 / 2 * math.log(2 * math.pi)
        found = negative_elbo(net, v, kl_weight, seeded(1))
    want = (-2 * likelihood + kl_weight * kl).mean() / 70
    assert kl.min() > 0 and float(found) == pytest.approx(float(want), rel=1e-4)


def test_the_mean_is_what_the_autoencoder_encodes():
    net, v = VariationalAutoencoder(70, 4, (4, 4)).eval(), torch.randn(6, 70, generator=seeded())
    mean, log_var = net.distribution(v)
    torch.testing.assert_close(mean, net.encode(v))
    assert log_var.shape == (6, 4) and not torch.equal(mean, log_var)


def test_the_diagnosis_is_of_the_posterior():
    vae, theta = made(vae_steps=30).fit(zoo(k=70)), zoo(k=70)  # more than one pass
    found, v = vae.diagnose(theta), vae.standardise(theta)
    with torch.no_grad():
        mean, log_var = (x.double() for x in vae.net.distribution(v))
        rebuilt = vae.net.decode(mean.float())
    q = Normal(mean, log_var.exp().sqrt())
    drawn = q.sample((4000,)).flatten(0, 1)
    kl = kl_divergence(q, Normal(torch.zeros(5).double().to(DEVICE), torch.ones(5).double().to(DEVICE))).sum(1)
    assert found == pytest.approx({
        "reconstruction_mse": float((rebuilt - v).square().sum() / (v - v.mean(0)).square().sum()), "kl": float(kl.mean()),
        "active": sum(float(m.var(correction=0)) > 0.01 for m in mean.T), "posterior_std": float(q.stddev.mean()),
        "means_std": float((mean - mean.mean(0)).square().mean().sqrt()),
        "aggregate_std": float((drawn - drawn.mean(0)).square().mean().sqrt())}, rel=5e-3)


def test_it_learns_the_checkpoints_and_a_heavy_kl_weight_empties_the_latent():
    theta, found = zoo(), {}
    for weight in (1.0, 1000.0):
        vae = made(vae_steps=120, kl_weight=weight).fit(theta)
        v = vae.standardise(theta)
        with torch.no_grad():
            mean, _ = vae.net.distribution(v)
            error = float((vae.net.decode(mean) - v).square().sum() / (v - v.mean(0)).square().sum())
        spread = vae.standardise(vae.sample(200, seeded())).var(dim=0).sum() / v.var(dim=0).sum()
        found[weight] = error, float(mean.var(dim=0).max()), float(spread)
        assert len(vae.losses) == 120 and vae.losses[-20:].mean() < vae.losses[:20].mean()
    (error, active, spread), (collapsed, inactive, narrow) = found.values()
    assert error < 0.2 and active > 0.1 and 0.15 < spread < 3
    assert collapsed > 0.8 and inactive < 0.01 and narrow < 0.05


def test_samples_are_decided_by_the_generator_and_training_by_its_seed():
    state = torch.get_rng_state()
    fitted, again, other = (made(pdiff_seed=s).fit(zoo()) for s in (0, 0, 1))
    a, b, c = (fitted.sample(40, seeded(s)) for s in (1, 1, 2))  # more than one pass of the decoder
    assert a.shape == (40, 96) and a.dtype == torch.float32 and not a.requires_grad and not fitted.net.training
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.cdist(a, a).fill_diagonal_(9).min() > 0
    assert torch.equal(again.sample(40, seeded(1)), a) and not torch.equal(other.sample(40, seeded(1)), a)
    assert again.fingerprint == fitted.fingerprint != other.fingerprint
    assert torch.equal(state, torch.get_rng_state())


def test_a_killed_training_resumes_to_the_bit(tmp_path, monkeypatch):
    want = made(vae_steps=9).fit(zoo())
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
    saved = []

    def save_and_die(self, state, save=runs.Checkpoint.save):
        save(self, state)
        saved.append(int(state["step"]))
        if len(saved) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs.Checkpoint, "save", save_and_die)
        made(vae_steps=9).fit(zoo(), Store(tmp_path))
    steps, loop = [], training.loop
    monkeypatch.setattr(training, "loop", lambda loss_at, *args, **kwargs: loop(
        lambda i: (steps.append(i), loss_at(i))[1], *args, **kwargs))
    resumed = made(vae_steps=9).fit(zoo(), Store(tmp_path))
    assert steps == [4, 5, 6, 7, 8] and torch.equal(resumed.losses, want.losses)
    for name, tensor in want.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], tensor), name
    made(vae_steps=9).fit(zoo(), Store(tmp_path))
    assert len(steps) == 5  # and is not trained again


@pytest.mark.parametrize("change", [{"kl_weight": 0.5}, {"vae_lr": 1e-3}, {"latent_dim": 3}, {"pdiff_seed": 1}, {"centre": "vector"}], ids=str)
def test_a_setting_trains_anew(tmp_path, change):
    made().fit(zoo(), Store(tmp_path))
    made(**change).fit(zoo(), Store(tmp_path))
    assert len(list((tmp_path / "VAE").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("settings, message", [
    ({"kl": 1.0}, "unknown setting 'kl'"), ({"kl_weight": -1.0}, "kl_weight is -1.0: expected at least 0"),
    ({"T": 10}, "unknown setting 'T'"), ({"vae_steps": 0}, "vae_steps is 0: expected at least 1")])
def test_impossible_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_what_is_no_zoo_is_refused_and_sampling_needs_a_fit(unchecked):
    with pytest.raises(ValueError, match="theta holds 1 vectors: expected at least 2"):
        made().fit(zoo(k=1))
    with pytest.raises(ValueError, match="call fit"):
        made().sample(3)
