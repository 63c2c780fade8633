"""hyperdiffusion.py, targets.py: the transformer's parts, exact answers for a Gaussian, real networks, resuming."""

import pytest
import torch
from test_rpg import MLP, SIZES, accuracy, nearest, seeded, trainings, zoo
from torch import nn

from device import DEVICE
from pdiff_lib.base.runs import Store
from pdiff_lib.generators import diffusion, targets
from pdiff_lib.generators.hyperdiffusion import HyperDiffusion, TensorTransformer
from resumed import killed_and_resumed

SMALL = dict(width=16, blocks=1, heads=2, steps=3, lr=5e-3, sampling_steps=10)
FIELD = (27 * 128, 128, 128 * 128, 128, 128 * 128, 128, 128, 1)  # the authors' occupancy field: 36,737 numbers


def made(sizes=SIZES, **changes):
    return HyperDiffusion(sizes, progress=False, **{**SMALL, **changes})


# ---------------------------------------------------------------- the transformer

def test_untrained_it_answers_with_the_mean():
    theta, fitted = zoo(), made(lr=0.0).fit(zoo())
    x, t = torch.randn(4, 9, generator=seeded()).to(DEVICE), torch.tensor([0, 10, 400, 499], device=DEVICE)
    assert (fitted.net(x, t) == 0).all()
    torch.testing.assert_close(fitted.sample(3, seeded()).cpu(), theta.mean(0).expand(3, -1), atol=1e-4, rtol=1e-4)


def test_each_tensor_has_a_token_an_encoder_and_a_decoder_of_its_own():
    net, seen = TensorTransformer(SIZES, 16, 1, 2).eval(), []
    for linear in net.decoders:
        nn.init.normal_(linear.weight)
    net.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, t = torch.randn(1, 9, generator=seeded()), torch.tensor([7])
    changed = torch.cat([x, x, x, x]) + torch.block_diag(*(torch.ones(1, n) for n in SIZES), torch.zeros(1, 0))
    net(changed, torch.tensor([7, 7, 7, 8]))
    net(x, t)
    assert seen[0].shape == (4, 4, 16)  # three tensors, and t last
    assert torch.equal((seen[0] - seen[1]).abs().sum(2) > 1e-3, torch.eye(4, dtype=torch.bool))
    want = net(x, t)
    nn.init.zeros_(net.decoders[1].weight)
    assert torch.equal(net(x, t), want * torch.tensor([1.0] * 5 + [0.0] * 3 + [1.0]))


def test_numbers_go_back_to_where_they_came_from():
    net = TensorTransformer(SIZES, 16, 1, 2)
    net.transformer, net.norm = nn.Identity(), nn.Identity()
    for encode, decode in zip(net.encoders, net.decoders):
        nn.init.eye_(encode.weight)
        nn.init.eye_(decode.weight)
    x = torch.randn(6, 9, generator=seeded())
    assert torch.equal(net(x, torch.zeros(6, dtype=torch.long)), x)


@pytest.mark.parametrize("name, width", [("planes", 2880), ("animals", 1440)])
def test_the_released_settings_make_the_transformer_that_they_name(name, width):
    s = HyperDiffusion(FIELD, progress=False, **HyperDiffusion.SIZES[name]).settings
    with torch.device("meta"):
        net = TensorTransformer(FIELD, s.width, s.blocks, s.heads)
    block = 12 * width**2 + 13 * width  # attention 4 + 4, inside 8 + 5, two norms 4
    assert sum(p.numel() for p in net.parameters()) == 12 * block + width * (2 * sum(FIELD) + 256 + 9 + 2 + 2) and sum(FIELD) == 36_737
    assert (s.T, s.beta_1, s.beta_T, s.sampler, s.sampling_steps, s.scaling) == (500, 1e-4, 2e-2, "ddim", 0, "none")


# ---------------------------------------------------------------- targets, and what is sampled with the exact answer

def test_a_predicted_x0_becomes_the_noise_that_was_added():
    schedule, z, eps = diffusion.Schedule(500), *torch.randn(2, 4, 9, generator=seeded())
    t = torch.tensor([0, 3, 250, 499])
    denoise = targets.from_x0(lambda x, t: z, schedule)
    torch.testing.assert_close(denoise(schedule.add_noise(z, eps, t), t), eps, atol=1e-4, rtol=1e-4)


class Oracle(nn.Module):
    """E[x0 | x_t] for data from N(mean, std^2)."""

    def __init__(self, mean, std, schedule):
        super().__init__()
        self.mean, self.variance, self.bar = mean.to(DEVICE), std.to(DEVICE) ** 2, schedule.alpha_bar.float().to(DEVICE)

    def forward(self, x, t):
        bar = self.bar[t, None]
        return (bar.sqrt() * self.variance * x + (1 - bar) * self.mean) / (bar * self.variance + 1 - bar)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("scaling", ["none", "vector"])
def test_with_an_exact_answer_each_number_has_its_mean_and_std(sampler, scaling):
    fitted = made(sampler=sampler, scaling=scaling, sampling_steps=0).fit(zoo())
    mean, std = torch.linspace(-1, 1, 9), torch.linspace(0.3, 1.2, 9)
    fitted.net = Oracle(mean, std, fitted.schedule)
    x = fitted.standardise(fitted.sample(3000, seeded())).cpu()
    bar = float(fitted.schedule.alpha_bar[-1])  # 0.0064: 500 steps of these variances do not end in N(0, I) ...
    end = (bar * std**2 + 1 - bar).sqrt()
    if sampler == "ddim":  # ... which DDIM carries back along exact paths: z = mean + std (x_T - sqrt(bar) mean) / end
        mean, std = mean * (1 - std * bar**0.5 / end), std / end
    assert ((x.mean(0) - mean) / std).abs().max() < 0.09 and ((x.std(0) / std) - 1).abs().max() < 0.06  # 5 standard errors


def test_it_learns_mean_and_spread():
    theta = zoo(k=600)
    fitted = made(steps=400, width=32, batch=128, sampling_steps=50).fit(theta)
    samples, std = fitted.sample(1000, seeded()).cpu(), theta.std(0)
    assert ((samples.mean(0) - theta.mean(0)) / std).abs().max() < 0.3
    assert (samples.std(0) / std - 1).abs().max() < 0.3 and torch.corrcoef(samples.T).fill_diagonal_(0).abs().max() < 0.3


def test_of_few_real_networks_it_gives_working_near_copies():
    networks = trainings(8)[-1]
    fitted = made(MLP, width=128, blocks=2, heads=4, steps=400, batch=32, lr=1e-3, sampling_steps=20).fit(networks)
    generated = fitted.sample(100, seeded()).cpu()
    distance = torch.cdist(generated, networks).min(1).values / nearest(networks)
    assert float(accuracy(generated).median()) > 0.75 and float(distance.median()) < 0.3


# ---------------------------------------------------------------- stages and errors

def test_scaling_is_by_the_vector_the_tensor_or_not_at_all():
    theta = zoo()
    x = {scaling: made(scaling=scaling).fit(theta).x.cpu() for scaling in ("vector", "tensor", "none")}
    assert torch.equal(x["none"], theta)
    torch.testing.assert_close(x["vector"].mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack([p.mean() for p in x["tensor"].split(SIZES, 1)]), torch.zeros(3), atol=1e-5, rtol=0)
    assert x["tensor"].mean(0).abs().max() > 0.5


def test_a_killed_training_resumes_to_the_bit(tmp_path, monkeypatch):
    want = made(steps=9, ema=0.9).fit(zoo())
    resumed, steps = killed_and_resumed(lambda: made(steps=9, ema=0.9).fit(zoo(), Store(tmp_path)), monkeypatch, at=4)
    assert steps == [4, 5, 6, 7, 8] and torch.equal(resumed.losses, want.losses)
    assert torch.equal(resumed.sample(5, seeded()), want.sample(5, seeded()))
    made(steps=9, ema=0.9, sampling_steps=7, sampler="ddpm").fit(zoo(), Store(tmp_path))
    assert len(steps) == 5  # how it samples is no part of what is trained
    made(steps=9, ema=0.9, scaling="none").fit(zoo(), Store(tmp_path))
    assert len(steps) == 14


@pytest.mark.parametrize("settings, message", [
    ({"heads": 3}, "width is 16: expected a multiple of heads, 3"), ({"sampling_steps": 501}, "501 sampling steps: expected at most T=500"),
    ({"scaling": "none "}, "scaling is 'none ': expected one of"), ({"layers": 2}, "unknown setting 'layers'"),
    ({"width": 0}, "width is 0: expected at least 1")])
def test_impossible_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_what_cannot_be_learned_from_or_sampled_is_refused(unchecked):
    with pytest.raises(ValueError, match="call fit"):
        made().sample(3)
    with pytest.raises(ValueError, match="sizes add up to 8: expected 9"):
        made((5, 3)).fit(zoo())
    with pytest.raises(ValueError, match="condition"):
        made().fit(zoo(), condition=torch.zeros(12, 1))
