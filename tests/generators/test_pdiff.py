"""pdiff.py, autoencoder.py, denoiser.py: Eq. 5 and 6 by hand, the authors' layers, the paper's defaults."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn import decomposition
from torch import nn

from device import DEVICE
from pdiff_lib.base import recipe, runs
from pdiff_lib.base.runs import Store
from pdiff_lib.generators import autoencoder, denoiser, pdiff, prediction
from pdiff_lib.generators.autoencoder import PCA, Autoencoder, noisy_reconstruction_loss
from pdiff_lib.generators.denoiser import Denoiser, ResidualMLP, noise_loss, sinusoidal
from pdiff_lib.generators.diffusion import GaussianDenoiser, Schedule
from pdiff_lib.generators.pdiff import PDiff
from pdiff_lib.generators.prediction import Predictor
from pdiff_lib.measures import similarity
from pdiff_lib.networks import subset
from test_flow import digits

SMALL = dict(ae_channels=(8, 8, 4), latent_dim=6, ae_steps=3, denoiser_channels=(8, 16, 8), T=20, diffusion_steps=3,
             progress=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zoo(k=40, d=96, seed=0):
    """Raw vectors along one direction, away from zero, each tensor at its own scale; a little noise."""
    g = seeded(seed)
    scale = torch.cat([torch.full((d // 2,), 0.1), torch.full((d - d // 2,), 4.0)])
    direction, along = torch.randn(d, generator=g), torch.randn(k, 1, generator=g)
    return scale * (1 + along * direction + 0.05 * torch.randn(k, d, generator=g))


@pytest.fixture(scope="module")
def fitted():
    return PDiff((48, 48), **SMALL).fit(zoo())


def channels(module, kind):
    return [(m.in_channels, m.out_channels) for m in module.modules() if isinstance(m, kind)]


# ---------------------------------------------------------------- the autoencoder (Eq. 5)

def test_autoencoder_has_the_authors_layers():
    ae = Autoencoder(2048)
    down, up = (64, 128, 256, 256, 32), (32, 256, 256, 128, 64, 64)
    assert channels(ae.encoder, nn.Conv1d) == [(1, 64), *zip(down, down[1:])]
    assert channels(ae.decoder, nn.ConvTranspose1d) == [*zip(up, up[1:])]
    assert channels(ae.decoder, nn.Conv1d) == [(64, 1)]
    convs = [m for m in ae.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))]
    assert {m.kernel_size for m in convs} == {(7,)} and [m.stride for m in convs] == [(2,)] * 10 + [(1,)]
    linear = [(m.in_features, m.out_features) for m in ae.modules() if isinstance(m, nn.Linear)]
    assert sorted(linear) == sorted([(32 * 2048 // 32, 128), (128, 128), (128, 32 * 2048 // 32)])
    kinds = [sum(isinstance(m, kind) for m in part.modules()) for part in (ae.encoder, ae.decoder)
             for kind in (nn.BatchNorm1d, nn.LeakyReLU, nn.ELU)]
    assert kinds == [5, 5, 0, 5, 0, 5]


@pytest.mark.parametrize("numel, layers, padded", [(2048, 5, 2048), (100, 5, 128), (1, 2, 64), (65, 1, 128),
                                                   (3, 7, 128)])
def test_any_length_goes_through_the_autoencoder(numel, layers, padded):
    ae = Autoencoder(numel, 5, (4,) * layers).eval()
    v = torch.randn(3, numel, generator=seeded())
    assert ae.padded == padded and ae.encode(v).shape == (3, 5) and ae.decode(ae.encode(v)).shape == (3, numel)
    zeros = F.pad(v, (0, padded - numel))[:, None]
    assert torch.equal(ae.encode(v), ae.encoder(zeros))


@pytest.mark.parametrize("sigma_v, sigma_z", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.5), (0.7, 0.5)])
def test_reconstruction_loss_is_against_the_noisy_input(sigma_v, sigma_z):
    ae, v, g = Autoencoder(70, 4, (4, 4)).eval(), torch.randn(5, 70, generator=seeded()), seeded(1)
    noisy = v + sigma_v * torch.randn(5, 70, generator=g)
    rebuilt = ae.decode(ae.encode(noisy) + sigma_z * torch.randn(5, 4, generator=g))
    loss = noisy_reconstruction_loss(ae, v, sigma_v, sigma_z, seeded(1)).item()
    assert loss == pytest.approx(((rebuilt - noisy) ** 2).sum().item() / (5 * 70), rel=1e-5)
    against_clean = ((rebuilt - v) ** 2).mean().item()
    assert (abs(loss - against_clean) > 0.05) == (sigma_v > 0)


# ---------------------------------------------------------------- the denoiser (Eq. 6)

def test_denoiser_has_the_authors_layers():
    net, widths = Denoiser(), (1, 64, 128, 256, 512, 256, 128, 64, 1)
    assert channels(net, nn.Conv1d) == [*zip(widths, widths[1:])]
    assert {(c.kernel_size, c.stride, c.padding) for c in net.convs} == {((7,), (1,), (3,))}
    assert [(m.in_features, m.out_features) for m in net.time if isinstance(m, nn.Linear)] == [(256, 128), (128, 128)]
    assert net(torch.zeros(2, 128), torch.tensor([0, 999])).shape == (2, 128)


@pytest.mark.parametrize("widths", [(5,), (4, 4), (4, 6, 4), (4, 6, 6, 4), (3, 4, 5, 4, 3)], ids=str)
def test_skips_join_layers_mirrored_about_the_middle(widths):
    net, depth = Denoiser(9, widths).eval(), len(widths)
    x, t = torch.randn(2, 9, generator=seeded()), torch.tensor([3, 700])
    time, out = net.time(sinusoidal(t))[:, None], []
    for i in range(depth):
        h = F.elu(net.norms[i](net.convs[i]((out[-1] if out else x[:, None]) + time)))
        mirrored = depth - 1 - i
        out.append(h + out[mirrored] if mirrored < i else h)
    torch.testing.assert_close(net(x, t), net.convs[depth](out[-1] + time)[:, 0])


def test_denoiser_must_be_symmetric():
    for make in (lambda: Denoiser(4, (8, 16)), lambda: PDiff(denoiser_channels=[8, 16])):
        with pytest.raises(ValueError, match=r"denoiser_channels is \[8, 16\]: expected a symmetric list"):
            make()


def test_sinusoidal_features_tell_every_step_apart():
    features = sinusoidal(torch.arange(1000))
    for j, want in ((0, math.sin(7)), (128, math.cos(7)), (64, math.sin(7 / 100)), (192, math.cos(7 / 100))):
        assert float(features[7, j]) == pytest.approx(want, abs=1e-5)
    assert torch.cdist(features, features).fill_diagonal_(9).min() > 0.1


def test_noise_loss_is_equation_6():
    net, schedule = Denoiser(5, (4, 4)).eval(), Schedule(10)
    z, eps = torch.randn(2, 3, 5, generator=seeded())
    t = torch.tensor([0, 4, 9])
    bar = [math.prod(1 - (1e-4 + (2e-2 - 1e-4) * i / 9) for i in range(int(s) + 1)) for s in t]
    noisy = [math.sqrt(b) * z[i] + math.sqrt(1 - b) * eps[i] for i, b in enumerate(bar)]
    want = [((net(x[None], t[i : i + 1])[0] - eps[i]) ** 2).sum().item() / 5 for i, x in enumerate(noisy)]
    assert noise_loss(net, z, t, eps, schedule).tolist() == pytest.approx(want, rel=1e-4)


# ---------------------------------------------------------------- p-diff

def test_defaults_are_the_papers():
    p = PDiff()
    ae, d = p.ae_settings, p.diffusion_settings
    assert (ae.ae_channels, ae.latent_dim, ae.ae_steps, ae.ae_lr) == ((64, 128, 256, 256, 32), 128, 500, 2e-5)
    assert (ae.ae_batch, ae.sigma_v, ae.sigma_z) == (50, 0.001, 0.1)
    assert (d.denoiser_channels, d.T, d.beta_range) == ((64, 128, 256, 512, 256, 128, 64), 1000, "fixed")
    assert (d.diffusion_steps, d.diffusion_lr, d.standardise_latents) == (1000, 1e-4, False)
    assert (p.sampling.sampler, p.sampling.sampling_steps) == ("ddpm", 0)
    assert p.schedule.T == 1000 and float(p.schedule.beta[0]) == 1e-4 and float(p.schedule.beta[-1]) == 0.02


def test_shapes_and_types(fitted):
    samples = fitted.sample(7, seeded())
    assert samples.shape == (7, 96) and samples.dtype == torch.float32 and torch.isfinite(samples).all()
    assert fitted.z.shape == (40, 6) and fitted.ae_losses.shape == (3,) == fitted.diffusion_losses.shape
    assert not samples.requires_grad and not fitted.ae.training and not fitted.denoiser.training
    assert torch.equal(fitted.encode(zoo()), fitted.z)


def test_a_trained_autoencoder_beats_the_mean_and_samples_lie_near_the_zoo():
    theta = zoo()
    settings = {**SMALL, "ae_steps": 120, "ae_lr": 5e-3, "denoiser_channels": (16, 32, 16), "diffusion_steps": 400,
                "diffusion_lr": 1e-2}
    p = PDiff((48, 48), standardise_latents=True, beta_range="rescaled", **settings).fit(theta)
    v, rebuilt = p.standardise(theta), p.standardise(p.decode(p.encode(theta)))
    ratio = float((rebuilt - v).square().sum() / (v - v.mean(0)).square().sum())
    found = p.diagnose(theta, 200, seeded())
    assert ratio < 0.1 and found["reconstruction_mse"] == pytest.approx(ratio, rel=1e-3)
    assert found["latent_std"] == pytest.approx(1, abs=1e-3) and 0.5 < found["generated_latent_std"] < 2
    assert found["loss_high_noise"] < found["loss_mid_noise"] < found["loss_low_noise"] < 1
    nearest = torch.cdist(p.standardise(p.sample(100, seeded(3))), v).amin(1).median()
    assert nearest < 0.6 * torch.cdist(v.mean(0, keepdim=True), v).median()


def test_centred_vectors_are_rebuilt_where_what_they_share_is_large():
    """As whole networks are: what checkpoints differ in is small beside what they have in common."""
    theta = (100 * torch.randn(96, generator=seeded(5)) + zoo()).to(DEVICE)
    errors = {}
    for centre in ("tensor", "vector"):
        p = PDiff((48, 48), centre=centre, **{**SMALL, "ae_steps": 120, "ae_lr": 5e-3}).fit_autoencoder(theta)
        errors[centre] = float((p.decode(p.z) - theta).square().sum() / (theta - theta.mean(0)).square().sum())
    assert errors["vector"] < 0.05 and errors["tensor"] > 0.5


def test_diagnose_is_finite_before_any_success(fitted):
    found = fitted.diagnose(zoo(), 5, seeded())
    assert set(found) == {"reconstruction_mse", "latent_std", "generated_latent_std",
                          *(f"loss_{level}_noise" for level in ("low", "mid", "high"))}
    assert all(math.isfinite(x) and x > 0 for x in found.values())
    assert found["latent_std"] == pytest.approx(float(fitted.z.std()))


def test_samples_are_decided_by_the_generator(fitted):
    state = torch.get_rng_state()
    a, b, c = (fitted.sample(4, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())
    assert torch.cdist(a, a).fill_diagonal_(9).min() > 0


def test_training_is_decided_by_its_seed(fitted):
    again, other = (PDiff((48, 48), pdiff_seed=s, **SMALL).fit(zoo()) for s in (0, 1))
    want = fitted.sample(3, seeded())
    assert torch.equal(again.sample(3, seeded()), want) and not torch.equal(other.sample(3, seeded()), want)


def test_chunks_do_not_change_what_is_decoded(fitted, monkeypatch):
    whole = fitted.decode(fitted.z)
    monkeypatch.setattr(pdiff, "CHUNK", 7)
    torch.testing.assert_close(fitted.decode(fitted.z), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted.encode(zoo()), fitted.z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra, moments, t", [
    ({}, 5, [20, 15, 10, 5, 0]), ({"sampler": "ddim", "sampling_steps": 4}, 9, [20, 15, 10, 5, 0]),
    ({"sampler": "ddim", "sampling_steps": 4, "eta": 0.5}, 3, [20, 10, 0]),
    ({"standardise_latents": True}, 2, [20, 0])],
    ids=["ddpm", "ddim", "few", "standardised"])
def test_trajectory_leads_from_noise_to_the_sample(extra, moments, t):
    p = PDiff((48, 48), **SMALL, **extra).fit(zoo())
    way = p.trajectory(3, moments, seeded(5))
    assert way.t == t and way.z.shape == (len(t), 3, 6) and way.theta.shape == (len(t), 3, 96)
    noise = torch.randn(3, 6, generator=seeded(5)).to(DEVICE)
    scale = (p.z.std(), p.z.mean()) if extra.get("standardise_latents") else (1.0, 0.0)
    torch.testing.assert_close(way.z[0], noise * scale[0] + scale[1])
    torch.testing.assert_close(way.theta[-1], p.sample(3, seeded(5)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(way.theta[1], p.decode(way.z[1]), rtol=1e-5, atol=1e-5)


def test_latents_are_standardised_for_the_diffusion_when_asked(monkeypatch):
    seen, fit = [], denoiser.fit
    monkeypatch.setattr(denoiser, "fit", lambda z, *args, **kwargs: (seen.append(z), fit(z, *args, **kwargs))[1])
    raw, scaled = (PDiff((48, 48), standardise_latents=s, **SMALL).fit(zoo()) for s in (False, True))
    assert torch.equal(seen[0], raw.z) and torch.equal(raw.z, scaled.z)
    assert abs(float(seen[1].mean())) < 1e-5 and float(seen[1].std()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(seen[1] * raw.z.std() + raw.z.mean(), raw.z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("theta, sizes, message", [
    (torch.zeros(1, 8), None, "theta holds 1 vectors: expected at least 2"),
    (torch.full((3, 8), math.nan), None, "NaN or infinity in 3 of 3 vectors"),
    (torch.zeros(8), None, r"theta has shape \[8\]: expected \[vectors, D\]"),
    (torch.ones(3, 8), (3, 4), "sizes add up to 7: expected 8")], ids=["one", "nan", "1-d", "sizes"])
def test_fit_refuses_what_is_no_zoo(unchecked, theta, sizes, message):
    with pytest.raises(ValueError, match=message):
        PDiff(sizes, **SMALL).fit(theta)


@pytest.mark.parametrize("settings, message", [
    ({"T": 10, "sampling_steps": 11}, "11 sampling steps: expected at most T=10"),
    ({"latent": 4}, "unknown setting 'latent'"), ({"k_checkpoints": 4}, "unknown setting 'k_checkpoints'"),
    ({"T": 0}, "T is 0: expected at least 1")])
def test_impossible_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        PDiff(**settings)


def test_sampling_needs_a_fit():
    for use in (PDiff().sample, PDiff().trajectory):
        with pytest.raises(ValueError, match="call fit"):
            use(3)


# ---------------------------------------------------------------- what the store keeps

@pytest.fixture
def trained(monkeypatch):
    """Which of the two networks have been trained, in order."""
    names = []
    for module in (autoencoder, denoiser):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "fit", lambda *args, _fit=module.fit, _name=name, **kwargs: (
            names.append(_name), _fit(*args, **kwargs))[1])
    return names


def test_a_second_fit_computes_nothing(tmp_path, fitted, trained):
    theta, store = zoo(), Store(tmp_path)
    want = fitted.sample(5, seeded())
    first = PDiff((48, 48), **SMALL).fit(theta, store).sample(5, seeded())
    assert trained == ["autoencoder", "denoiser"]
    second = PDiff((48, 48), **SMALL).fit(theta, store)
    assert trained == ["autoencoder", "denoiser"]
    assert torch.equal(first, want) and torch.equal(second.sample(5, seeded()), want)
    assert torch.equal(second.z, fitted.z) and torch.equal(second.ae_losses, fitted.ae_losses)


def test_statistics_with_other_last_bits_train_nothing_anew(tmp_path, trained, monkeypatch):
    """They depend on how many threads there are."""
    first = PDiff((48, 48), **SMALL).fit(zoo(), Store(tmp_path))
    plain = subset.Standardiser.__init__

    def nudged(self, *args):
        plain(self, *args)
        self.mean = self.mean * (1 + 1e-6)

    trained.clear()
    with monkeypatch.context() as m:
        m.setattr(subset.Standardiser, "__init__", nudged)
        second = PDiff((48, 48), **SMALL).fit(zoo(), Store(tmp_path))
    assert trained == [] and second.fingerprint == first.fingerprint
    assert torch.equal(second.sample(3, seeded()), first.sample(3, seeded()))


@pytest.mark.parametrize("change, again", [
    ({"diffusion_lr": 5e-3}, ["denoiser"]), ({"T": 30}, ["denoiser"]), ({"standardise_latents": True}, ["denoiser"]),
    ({"sampler": "ddim", "eta": 0.3}, []), ({"ae_lr": 1e-3}, ["autoencoder", "denoiser"]),
    ({"sigma_z": 0.3}, ["autoencoder", "denoiser"]), ({"centre": "vector"}, ["autoencoder", "denoiser"]), ({"pdiff_seed": 3}, ["autoencoder", "denoiser"])], ids=str)
def test_a_setting_computes_its_own_stage_anew(tmp_path, trained, change, again):
    PDiff((48, 48), **SMALL).fit(zoo(), Store(tmp_path))
    trained.clear()
    PDiff((48, 48), **{**SMALL, **change}).fit(zoo(), Store(tmp_path))
    assert trained == again


@pytest.mark.parametrize("theta, sizes", [(zoo(seed=1), (48, 48)), (zoo(), (96,)), (zoo()[:-1], (48, 48))],
                         ids=["others", "sizes", "fewer"])
def test_other_checkpoints_are_trained_on_anew(tmp_path, trained, theta, sizes):
    PDiff((48, 48), **SMALL).fit(zoo(), Store(tmp_path))
    trained.clear()
    PDiff(sizes, **SMALL).fit(theta, Store(tmp_path))
    assert trained == ["autoencoder", "denoiser"]


# ---------------------------------------------------------------- parts that can be exchanged

def test_pca_is_scikit_learns():
    v = torch.randn(30, 50, generator=seeded()) * torch.linspace(0.1, 3, 50) + 5
    new = torch.randn(7, 50, generator=seeded(1)) + 5
    ours, theirs = PCA.of(v, 6), decomposition.PCA(6, svd_solver="full").fit(v.double().numpy())
    sign = torch.from_numpy(theirs.components_).mul(ours.basis.double()).sum(1).sign()  # a component has no direction
    coordinates = torch.from_numpy(theirs.transform(new.double().numpy()))
    torch.testing.assert_close(ours.encode(new).double(), coordinates * sign, rtol=1e-4, atol=1e-4)
    rebuilt = torch.from_numpy(theirs.inverse_transform(coordinates.numpy()))
    torch.testing.assert_close(ours.decode(ours.encode(new)).double(), rebuilt, rtol=1e-4, atol=1e-4)
    assert ours.encode(v).var(dim=0).double().numpy() == pytest.approx(theirs.explained_variance_, rel=1e-4)


@pytest.mark.parametrize("k, latent, used", [(5, 4, 4), (5, 64, 4), (5, 2, 2), (40, 10, 8)])
def test_pca_rebuilds_exactly_from_as_many_components_as_there_are_directions(k, latent, used):
    v = torch.randn(k, 8, generator=seeded()) + 3
    pca = PCA.of(v, latent)
    error = float((pca.decode(pca.encode(v)) - v).abs().max())
    assert pca.basis.shape == (used, 8) and (error < 1e-4) == (used >= min(k - 1, 8))
    torch.testing.assert_close(pca.basis @ pca.basis.T, torch.eye(used), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_told_apart_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr(denoiser, "fit", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ValueError, match="all 5 originals are the same vector"):
        PDiff((48, 48), **SMALL, ae_kind="pca", standardise_latents=True).fit(zoo(k=1).expand(5, -1))
    monkeypatch.setattr(Autoencoder, "encode", lambda self, v: v.new_ones(len(v), 6) + 0 * self.to_inner.weight.sum())
    with pytest.raises(ValueError, match="the latents of all 40 originals are the same numbers"):
        PDiff((48, 48), **SMALL, standardise_latents=True).fit(zoo())


@pytest.mark.parametrize("latent_model", ["diffusion", "gaussian"])
def test_pdiff_with_pca_stays_in_the_span(tmp_path, latent_model):
    theta, settings = zoo(k=6).to(DEVICE), {**SMALL, "ae_kind": "pca", "latent_dim": 64, "latent_model": latent_model}
    p = PDiff((48, 48), **settings).fit(theta, Store(tmp_path))
    torch.testing.assert_close(p.decode(p.encode(theta)), theta, rtol=1e-4, atol=1e-4)
    samples = p.sample(20, seeded())
    assert p.z.shape == (6, 5) and len(p.ae_losses) == 0 and torch.cdist(samples, samples).fill_diagonal_(9).min() > 0
    # Standardised tensor by tensor, and so in the same span.
    assert similarity.outside_span(samples, theta).max() < 1e-4
    assert similarity.outside_span(PDiff((48, 48), **SMALL).fit(theta).sample(20, seeded()), theta).min() > 0.1
    again = PDiff((48, 48), **settings).fit(theta, Store(tmp_path))  # read back: PCA has a size of its own in the file
    assert torch.equal(again.sample(20, seeded()), samples)
    assert math.isfinite(p.diagnose(theta, 5, seeded())["loss_low_noise"]) == (latent_model == "diffusion")


def test_gaussian_latents_have_the_encoded_mean_and_covariance_and_train_nothing(trained):
    p = PDiff((48, 48), latent_model="gaussian", **SMALL).fit(zoo())
    n, z = 40_000, p.z.double()
    drawn = p.sample_latents(n, seeded()).double()
    want = torch.cov(z.T)
    spread = want.diag().sqrt()
    error = ((spread[:, None] * spread).square() + want.square()).div(n).sqrt()
    assert ((drawn.mean(0) - z.mean(0)).abs() < 4.5 * spread / n**0.5).all() and trained == ["autoencoder"]
    assert ((torch.cov(drawn.T) - want).abs() < 4.5 * error).all()
    with pytest.raises(ValueError, match="latent_model is 'gaussian': expected 'diffusion' for a trajectory"):
        p.trajectory()


def test_an_exact_velocity_gives_the_exact_noise():
    mean, std, schedule = 1.5, 0.4, Schedule(50)
    net, exact = ResidualMLP(6, schedule.alpha_bar, width=8), GaussianDenoiser(mean, std, schedule)

    def velocity(x, t):
        """E[v | x_t] = sqrt(alpha_bar) E[eps | x_t] - sqrt(1 - alpha_bar) E[z | x_t], by conditioning a Gaussian."""
        bar = schedule.alpha_bar[t].unsqueeze(1)
        residual = (x.double() - bar.sqrt() * mean) / (bar * std**2 + 1 - bar)
        z, eps = mean + bar.sqrt() * std**2 * residual, (1 - bar).sqrt() * residual
        return (bar.sqrt() * eps - (1 - bar).sqrt() * z).float()

    net.velocity = velocity
    x, t = 3 * torch.randn(50, 6, generator=seeded()), torch.arange(50)
    torch.testing.assert_close(net(x, t), exact(x, t), rtol=1e-4, atol=1e-4)


def test_the_mlps_loss_is_that_of_the_velocity():
    schedule = Schedule(10)
    net = ResidualMLP(5, schedule.alpha_bar, width=16)
    z, eps = torch.randn(2, 3, 5, generator=seeded())
    t = torch.tensor([0, 4, 9])
    losses, by_noise = net.loss(z, t, eps, schedule).detach(), noise_loss(net, z, t, eps, schedule).detach()
    for i, step in enumerate(t.tolist()):
        bar = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * j / 9) for j in range(step + 1))
        x = math.sqrt(bar) * z[i] + math.sqrt(1 - bar) * eps[i]
        want = math.sqrt(bar) * eps[i] - math.sqrt(1 - bar) * z[i]
        error = (net.velocity(x[None], t[i : i + 1])[0] - want).square().mean().item()
        assert float(losses[i]) == pytest.approx(error, rel=1e-4)
        # The noise that follows is off by sqrt(alpha_bar) of it: what the MLP is trained on does not vanish at the noisy end.
        assert float(by_noise[i]) == pytest.approx(bar * error, rel=1e-3)


def test_an_mlp_denoiser_learns_a_known_distribution_in_seconds():
    """Latents from N(m, diag(s^2)): PCA of them, so that each coordinate has a std of its own, far from 1."""
    std = torch.tensor([2.0, 1.0, 0.5])
    theta = std * torch.randn(400, 3, generator=seeded()) + torch.tensor([1.0, -2.0, 3.0])
    p = PDiff(ae_kind="pca", denoiser_kind="mlp", mlp_width=32, T=100, beta_range="rescaled", diffusion_steps=400,
              diffusion_lr=5e-3, diffusion_batch=128, sampler="ddim", progress=False, standardise_latents=True).fit(theta)
    samples = p.sample(2000, seeded(1)).cpu()
    assert (samples.std(0) / theta.std(0)).tolist() == pytest.approx([1, 1, 1], abs=0.15)
    assert ((samples.mean(0) - theta.mean(0)) / theta.std(0)).tolist() == pytest.approx([0, 0, 0], abs=0.15)
    assert p.diagnose(theta, 500, seeded())["generated_latent_std"] == pytest.approx(1, abs=0.15)


# ---------------------------------------------------------------- what the denoiser predicts

KINDS = {"conv": lambda bar: Denoiser(5, (4, 4)), "mlp": lambda bar: ResidualMLP(5, bar, width=16)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["noise", "v", "x0"])
def test_the_loss_is_that_of_what_is_predicted(kind, name):
    schedule = Schedule(10)
    raw = KINDS[kind](schedule.alpha_bar).eval()
    net, answer = Predictor(raw, schedule.alpha_bar, name), raw.velocity if kind == "mlp" else raw
    z, eps = torch.randn(2, 3, 5, generator=seeded())
    t = torch.tensor([0, 4, 9])
    losses, noise = net.loss(z, t, eps, schedule).detach(), net(schedule.add_noise(z, eps, t), t).detach()
    for i, step in enumerate(t.tolist()):
        bar = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * j / 9) for j in range(step + 1))
        x = math.sqrt(bar) * z[i] + math.sqrt(1 - bar) * eps[i]
        target = {"noise": eps[i], "v": math.sqrt(bar) * eps[i] - math.sqrt(1 - bar) * z[i], "x0": z[i]}[name]
        given = answer(x[None], t[i : i + 1])[0].detach()
        assert float(losses[i]) == pytest.approx(float((given - target).square().mean()), rel=1e-3)
        # The clean latent that the answer stands for, and the noise that leads from it to x.
        clean = {"noise": (x - math.sqrt(1 - bar) * given) / math.sqrt(bar), "x0": given,
                 "v": math.sqrt(bar) * x - math.sqrt(1 - bar) * given}[name]
        torch.testing.assert_close(noise[i], (x - math.sqrt(bar) * clean) / math.sqrt(1 - bar), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_are_trained_as_the_denoisers_are(monkeypatch, kind):
    """The same weights, batches and noise: what a network learns by itself comes out to the bit."""
    settings = recipe.Diffusion(denoiser_kind=kind, denoiser_channels=[4, 4], mlp_width=16, diffusion_steps=4, diffusion_batch=8, T=20)
    z, schedule = torch.randn(30, 5, generator=seeded()).to(DEVICE), Schedule(20)
    net, losses = denoiser.fit(z, schedule, settings, 3, progress=False)
    monkeypatch.setattr(prediction, "is_own", lambda settings: False)
    ours, again = prediction.fit(z, schedule, settings, 3, progress=False)
    assert isinstance(ours, Predictor) and not ours.training and torch.equal(losses, again)
    assert all(torch.equal(t, ours.net.state_dict()[name]) for name, t in net.state_dict().items())
    x, t = torch.randn(7, 5, generator=seeded(1)).to(DEVICE), torch.arange(7, device=DEVICE)
    torch.testing.assert_close(ours(x, t), net(x, t))


@pytest.mark.parametrize("kind, own, others", [("conv", "noise", ("v", "x0")), ("mlp", "v", ("noise", "x0"))])
def test_the_default_said_by_name_is_the_same_stage(tmp_path, kind, own, others):
    def fit(prediction):
        return PDiff((48, 48), denoiser_kind=kind, mlp_width=8, prediction=prediction, **SMALL).fit(zoo(), Store(tmp_path))

    def kept():
        return {name: len([*(tmp_path / name).glob("*.safetensors")]) for name in ("autoencoder", "denoiser")}

    default, named = fit("default"), fit(own)
    assert kept() == {"autoencoder": 1, "denoiser": 1} and default.fingerprint == named.fingerprint
    assert "prediction" not in default.fingerprint and torch.equal(default.sample(3, seeded()), named.sample(3, seeded()))
    made = [fit(other) for other in others]
    assert kept() == {"autoencoder": 1, "denoiser": 3} and made[0].fingerprint != made[1].fingerprint
    again = fit(others[0])  # read back
    assert kept()["denoiser"] == 3 and torch.equal(again.sample(3, seeded()), made[0].sample(3, seeded()))
    assert [p.fingerprint["prediction"] for p in made] == list(others)


class Stop(Exception):
    """The end of a process, as far as the loop can tell."""


def test_a_killed_training_of_another_prediction_resumes_to_the_bit(tmp_path, monkeypatch):
    settings = {**SMALL, "ae_kind": "pca", "prediction": "v"}
    whole = PDiff((48, 48), **settings).fit(zoo())
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)  # after every step
    loss, steps = Predictor.loss, []

    def stopping(self, *args):
        steps.append(1)
        if len(steps) == 2:
            raise Stop
        return loss(self, *args)

    monkeypatch.setattr(Predictor, "loss", stopping)
    with pytest.raises(Stop):
        PDiff((48, 48), **settings).fit(zoo(), Store(tmp_path))
    resumed = PDiff((48, 48), **settings).fit(zoo(), Store(tmp_path))
    assert len(steps) == 1 + 1 + 2 and torch.equal(resumed.diffusion_losses, whole.diffusion_losses)
    assert torch.equal(resumed.sample(3, seeded()), whole.sample(3, seeded()))


@pytest.fixture(scope="module")
def networks():
    return digits(40, 100)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_velocities_and_latents_keep_the_spread_of_real_networks(networks, kind):
    """40 MLPs in 16 components. Of the noise, after as short a training, the samples are far too wide: its error is divided by
    sqrt(alpha_bar) where sampling starts."""
    wide = {}
    for name in ("noise", "v", "x0"):
        p = PDiff((640, 10, 100, 10), ae_kind="pca", latent_dim=16, centre="vector", denoiser_kind=kind, mlp_width=64, prediction=name,
                  denoiser_channels=(8, 16, 8), T=100, beta_range="rescaled", diffusion_steps=250, diffusion_lr=5e-3,
                  diffusion_batch=64, sampler="ddim", sampling_steps=25, standardise_latents=True, progress=False).fit(networks)
        found = p.diagnose(networks, 200, seeded())
        wide[name] = found["generated_latent_std"] / found["latent_std"]
        assert found["loss_high_noise"] < found["loss_mid_noise"] < 0.3
    assert wide["v"] == pytest.approx(1, abs=0.25) and wide["x0"] == pytest.approx(1, abs=0.25) and wide["noise"] > 1.25


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(ValueError, match="prediction is 'eps': expected one of 'default', 'noise', 'v', 'x0'"):
        PDiff(prediction="eps")
    with pytest.raises(ValueError, match="prediction is 'default': expected one of 'noise', 'v', 'x0'"):
        Predictor(Denoiser(5, (4, 4)), Schedule(10).alpha_bar, "default")
