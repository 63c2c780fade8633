"""rpg.py: tokens and their padding, an exact denoiser, what the recurrence sees, and whose copies samples are."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from device import DEVICE
from pdiff_lib.base.runs import Store
from pdiff_lib.generators import rpg
from pdiff_lib.generators.rpg import RPG, Prototypes, TokenDenoiser
from pdiff_lib.generators.tokens import Tokens
from resumed import killed_and_resumed

SIZES = (5, 3, 1)  # in tokens of 4: two, one, one
SMALL = dict(token_length=4, width=16, layers=1, denoiser_channels=(4, 8, 4), T=1000, steps=3, lr=5e-3, sampling_steps=10)
MLP = (640, 10, 100, 10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zoo(k=12, seed=0):
    """A Gaussian; each tensor at its own scale."""
    scale = torch.tensor([0.1, 3.0, 1.0]).repeat_interleave(torch.tensor(SIZES))
    return scale * (torch.randn(k, 9, generator=seeded(seed)) + torch.arange(9) / 4)


def made(sizes=SIZES, **changes):
    return RPG(sizes, progress=False, **{**SMALL, **changes})


def logits(theta, images):
    """Of networks 64-10-10 with ReLU, all at once."""
    w1, b1, w2, b2 = theta.split(MLP, dim=1)
    h = torch.baddbmm(b1[:, None], images.expand(len(theta), -1, -1), w1.view(-1, 64, 10)).relu()
    return torch.baddbmm(b2[:, None], h, w2.view(-1, 10, 10))


def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def trainings(k, steps=150):
    """k networks after each step of their training, [steps k 760]."""
    g, (x, y) = seeded(), (part[:900] for part in digits())
    theta = torch.randn(k, 760, generator=g) * torch.tensor([0.15, 0.0, 0.3, 0.0]).repeat_interleave(torch.tensor(MLP))
    optimizer, path = torch.optim.Adam([theta.requires_grad_()], 0.02), []
    for _ in range(steps):
        pick = torch.randint(900, (128,), generator=g)
        optimizer.zero_grad()
        (F.cross_entropy(logits(theta, x[pick]).flatten(0, 1), y[pick].repeat(k)) * k).backward()
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def accuracy(theta):
    """On images that no network has seen, [k]."""
    x, y = (part[900:] for part in digits())
    return (logits(theta.cpu(), x).argmax(2) == y).float().mean(1)


def nearest(theta):
    """The originals' own median distance to the nearest other: the unit of distances."""
    return float(torch.cdist(theta, theta).fill_diagonal_(torch.inf).min(1).values.median())


# ---------------------------------------------------------------- tokens

def test_vectors_are_standardised_tensor_by_tensor_and_cut_within_them():
    theta, fitted = zoo(), made().fit(zoo())
    parts = [(p - p.mean()) / (p.std(1, correction=0).mean() if p.shape[1] > 1 else p.std(correction=0)) for p in theta.split(SIZES, 1)]
    x = fitted.x.cpu()
    for token, want in zip(x.unbind(1), (parts[0][:, :4], parts[0][:, 4:], parts[1], parts[2])):
        torch.testing.assert_close(token, F.pad(want, (0, 4 - want.shape[1])))
    assert fitted.mask.sum(1).tolist() == [4, 1, 3, 1]
    torch.testing.assert_close(fitted.standardise.inverse(fitted.tokens.decode(fitted.x)).cpu(), theta)


@pytest.mark.parametrize("prototype_only", [False, True])
def test_padding_is_no_part_of_the_loss(prototype_only):
    fitted, losses = made(prototype_only=prototype_only).fit(zoo()), []
    for value in (0.0, 1e6, float("nan")):
        fitted.x[:, ~fitted.mask] = value
        losses.append(float(fitted._loss(fitted.net, 0, torch.Generator(fitted.device).manual_seed(1))))
    assert losses[0] == losses[1] == losses[2] > 0


def test_a_padded_token_is_denoised_as_one_that_ends_there():
    net, short = TokenDenoiser(9, 6, (4, 8, 4)).eval(), TokenDenoiser(5, 6, (4, 8, 4)).eval()
    for norm in net.norms:
        norm.running_mean.normal_(generator=seeded(3))
    short.convs, short.norms = net.convs, net.norms
    short.prototype.weight, short.prototype.bias = (nn.Parameter(p[:5]) for p in (net.prototype.weight, net.prototype.bias))
    last = nn.Linear(9, 5)
    last.weight, last.bias = (nn.Parameter(p[:5]) for p in (net.time[2].weight, net.time[2].bias))
    short.time = nn.Sequential(net.time[0], net.time[1], last)
    x, c, t = torch.randn(3, 9, generator=seeded()), torch.randn(3, 6, generator=seeded(1)), torch.tensor([0, 400, 999])
    mask = (torch.arange(9) < 5).expand(3, 9)
    want = short(x[:, :5], t, c, mask[:, :5])
    torch.testing.assert_close(net(x, t, c, mask)[:, :5], want)
    torch.testing.assert_close(net(x.where(mask, 1e6), t, c, mask)[:, :5], want)
    assert not torch.allclose(net(x, t, c, mask | True)[:, :5], want, atol=1e-3)


def test_samples_do_not_depend_on_the_noise_on_padding(monkeypatch):
    fitted = made(sampler="ddim").fit(zoo())
    want, draw = fitted.sample(6, seeded()), rpg.diffusion.randn

    def other_on_padding(shape, device, generator=None):
        x = draw(shape, device, generator)
        return x.where(fitted.mask.repeat(6, 1), 77.0)

    monkeypatch.setattr(rpg.diffusion, "randn", other_on_padding)
    torch.testing.assert_close(fitted.sample(6, seeded()), want)
    assert float(want.std()) > 0


# ---------------------------------------------------------------- the recurrence

def test_positions_are_sines_of_tensor_and_place_within_it():
    net = Prototypes(Tokens.cut(SIZES, 4), 3, rpg.Settings(width=16))
    rates = 10_000 ** (-np.arange(4) / 4)
    want = [np.concatenate([f(place * rates) for place in token for f in (np.sin, np.cos)]) for token in ((0, 0), (0, 1), (1, 0), (2, 0))]
    np.testing.assert_allclose(net.positions.numpy(), want, atol=1e-6)


def test_prototypes_come_from_positions_and_the_index_alone():
    one, other = (made(lr=0.0).fit(zoo(seed=s)).net["prototypes"] for s in (0, 1))  # nothing is learned
    index = torch.arange(12, device=DEVICE)
    assert torch.equal(one(index), other(index))  # whatever the vectors are
    assert (one.index.weight == 1 / 16).all() and torch.allclose(one(index)[0], one(index)[7])  # all alike at the start
    trained = made(steps=30).fit(zoo()).net["prototypes"]
    assert torch.cdist(*[trained(index).flatten(1)] * 2).fill_diagonal_(9).min() > 1e-4
    torch.testing.assert_close(trained(index[[3, 5, 3]]), trained(index)[[3, 5, 3]])
    assert trained(index).shape == (12, 4, 16)


def test_mamba_takes_the_released_settings_where_it_is_installed(monkeypatch):
    made_of = []

    class Mamba2(nn.Linear):  # only what is asked of it: a map of sequences
        def __init__(self, width, **settings):
            super().__init__(width, width)
            made_of.append((width, settings))

    package = ModuleType("mamba_ssm")
    package.Mamba2 = Mamba2
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    net = Prototypes(Tokens.cut(SIZES, 4), 3, rpg.Settings(**{**RPG.SIZES["small CNN"], "width": 32}))
    assert made_of == [(32, dict(d_state=32, d_conv=4, expand=2, headdim=64))] * 2
    first, second = net.recurrence
    torch.testing.assert_close(net(torch.tensor([2]))[0], second(first(net.positions + net.index.weight[2])))


@pytest.mark.skipif(DEVICE == "cpu", reason="mamba_ssm needs CUDA")
def test_mamba_learns():
    pytest.importorskip("mamba_ssm")
    assert made(recurrence="mamba2", width=64, steps=5).fit(zoo()).sample(3, seeded()).shape == (3, 9)


# ---------------------------------------------------------------- training and sampling

def test_all_tokens_of_a_batch_are_denoised_at_once_or_as_many_as_asked_for(monkeypatch):
    rows, forward = [], TokenDenoiser.forward
    monkeypatch.setattr(TokenDenoiser, "forward", lambda self, x, t, c, mask: (rows.append((len(x), len(t.unique()))),
                                                                              forward(self, x, t, c, mask))[1])
    made(batch=8).fit(zoo())
    made(batch=8, diffusion_tokens=5).fit(zoo())
    assert [n for n, _ in rows] == [32] * 3 + [5] * 3 and min(times for _, times in rows[:3]) > 16  # each token at its own t


class Oracle(nn.Module):
    """The exact noise predictor of tokens from N(5 c, 0.25), c: the first number of their prototype."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, t, c, mask):
        bar = self.schedule.alpha_bar.float().to(x.device)[t, None]
        return (1 - bar).sqrt() * (x - bar.sqrt() * 5 * c[:, :1]) / (bar * 0.25 + 1 - bar)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_with_an_exact_denoiser_each_token_has_its_own_mean_and_std(monkeypatch, sampler):
    fitted = made(steps=20, lr=0.02, sampler=sampler, sampling_steps=0, T=400, beta_T=0.05).fit(zoo())
    fitted.net["answer"] = Oracle(fitted.schedule)
    monkeypatch.setattr(rpg, "ACTIVATIONS", 4 * 8 * 5001)  # two passes, which cut a network in two
    index = torch.tensor([2, 7]).repeat(1000)
    x = fitted.tokens.encode(fitted.standardise(fitted.sample_of(index, seeded()))).cpu()
    c = 5 * fitted.net["prototypes"](torch.tensor([2, 7], device=DEVICE))[..., :1].cpu()
    mask = fitted.mask.cpu()
    for i in (0, 1):
        assert (x[i::2].mean(0) - c[i])[mask].abs().max() < 0.08  # 5 standard errors
        assert (x[i::2].std(0) - 0.5)[mask].abs().max() < 0.06
    assert c.std() > 0.05


def test_samples_are_for_checkpoints_drawn_at_random(monkeypatch):
    fitted, asked = made(prototype_only=True, steps=60, lr=0.02).fit(zoo()), []
    monkeypatch.setattr(RPG, "_tokens_of", lambda self, index, g, of=RPG._tokens_of: (asked.append(index.cpu()), of(self, index, g))[1])
    a, b, c = (fitted.sample(600, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (600, 9) and not a.requires_grad
    counts = asked[0].bincount(minlength=12)
    assert counts.min() > 20 and counts.max() < 90  # 50 each, give or take 7
    torch.testing.assert_close(a, fitted.sample_of(asked[0]))


def test_it_learns_mean_and_spread():
    theta = zoo(k=48)
    fitted = made(steps=400, batch=48, ema=0.98, denoiser_channels=(16, 32, 16), sampling_steps=50).fit(theta)
    samples, std = fitted.sample(600, seeded()).cpu(), theta.std(0)
    assert ((samples.mean(0) - theta.mean(0)) / std).abs().max() < 0.35
    assert 0.6 < float((samples.std(0) / std).min()) and float((samples.std(0) / std).max()) < 1.4


def test_prototypes_alone_are_a_lookup_table_of_real_networks():
    networks = trainings(16)[-1]  # each from a start of its own
    fitted = RPG(MLP, progress=False, prototype_only=True, steps=400, batch=16, lr=5e-3).fit(networks)
    again = fitted.sample_of(torch.arange(16)).cpu()
    distance = torch.cdist(again, networks) / nearest(networks)
    assert distance.argmin(1).tolist() == list(range(16)) and float(distance.diagonal().max()) < 0.25
    assert float(accuracy(again).mean()) > float(accuracy(networks).mean()) - 0.05
    assert len(fitted.sample(200, seeded()).unique(dim=0)) <= 16  # never anything else


def test_from_checkpoints_of_one_training_it_gives_networks_that_work():
    checkpoints = trainings(1, 230)[-80::5, 0]
    fitted = RPG(MLP, progress=False, steps=450, batch=8, lr=5e-3, width=64, denoiser_channels=(8, 16, 8), sampling_steps=50)
    generated = fitted.fit(checkpoints).sample(32, seeded()).cpu()
    noise = fitted.standardise.inverse(torch.randn(32, 760, generator=seeded()).to(DEVICE)).cpu()
    assert float(accuracy(generated).mean()) > 0.6 and float(accuracy(noise).mean()) < 0.2
    assert torch.cdist(generated, generated).fill_diagonal_(9).min() > 0.01


def test_a_killed_training_resumes_to_the_bit(tmp_path, monkeypatch):
    how = {"steps": 9, "diffusion_tokens": 7, "ema": 0.9}
    want = made(**how).fit(zoo())
    resumed, steps = killed_and_resumed(lambda: made(**how).fit(zoo(), Store(tmp_path)), monkeypatch, at=4)
    assert steps == [4, 5, 6, 7, 8] and torch.equal(resumed.losses, want.losses)
    assert torch.equal(resumed.sample(5, seeded()), want.sample(5, seeded()))
    made(steps=9, diffusion_tokens=7, ema=0.9, sampling_steps=7, sampler="ddim").fit(zoo(), Store(tmp_path))
    assert len(steps) == 5  # how it samples is no part of what is trained
    made(steps=9, diffusion_tokens=7, ema=0.9, width=20).fit(zoo(), Store(tmp_path))
    assert len(steps) == 14


def test_the_released_settings_are_settings():
    for size in RPG.SIZES.values():
        s = RPG(progress=False, **{**size, "recurrence": "gru"}).settings
        assert s.width == s.token_length and s.denoiser_channels == (32, 64, 128, 64, 32) and (s.T, s.sampling_steps) == (1000, 0)


@pytest.mark.parametrize("settings, message", [
    ({"recurrence": "lstm"}, "recurrence is 'lstm': expected one of 'gru', 'mamba2'"), ({"tokens": 3}, "unknown setting 'tokens'"),
    ({"width": 18}, "width is 18: expected a multiple of 4"), ({"token_length": 0}, "token_length is 0: expected at least 1"),
    ({"sampling_steps": 1001}, "1001 sampling steps: expected at most T=1000"),
    ({"denoiser_channels": (4, 8)}, "expected a symmetric list")])
def test_impossible_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_a_recurrence_that_cannot_run_is_refused_at_once(monkeypatch):
    found = rpg.importlib.util.find_spec
    monkeypatch.setattr(rpg.importlib.util, "find_spec", lambda name, *more: None if name == "mamba_ssm" else found(name, *more))
    with pytest.raises(ValueError, match="expected the package mamba_ssm.*pip install.*or recurrence='gru'"):
        made(recurrence="mamba2")
    monkeypatch.setattr(rpg.importlib.util, "find_spec", lambda name, *more: True if name == "mamba_ssm" else found(name, *more))
    with pytest.raises(ValueError, match="on device 'cpu': expected 'cuda'"):
        RPG(device="cpu", recurrence="mamba2")


def test_what_cannot_be_learned_from_or_sampled_is_refused(unchecked):
    with pytest.raises(ValueError, match="call fit"):
        made().sample(3)
    with pytest.raises(ValueError, match="call fit"):
        made().sample_of(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"sizes add up to 8: expected 9"):
        made((5, 3)).fit(zoo())
    for bad in (12, -1):
        with pytest.raises(ValueError, match=f"index {bad}: expected 0 to 11"):
            made().fit(zoo()).sample_of(torch.tensor([0, bad]))
