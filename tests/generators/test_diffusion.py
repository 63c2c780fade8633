"""diffusion.py against diffusers, step by step, and against a Gaussian whose score is known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from pdiff_lib.generators import diffusion
from pdiff_lib.generators.diffusion import Schedule, ddim, ddpm
from pdiff_lib.generators.prediction import Predictor


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wavy(x, t):
    """Any deterministic noise predictor will do for comparing samplers."""
    return torch.sin(3 * x + 0.01 * t[:, None]) * (1 + x.mean(1, keepdim=True).abs())


# ---------------------------------------------------------------- the forward process

@pytest.mark.parametrize("T, beta_1, beta_T", [(1000, 1e-4, 0.02), (10, 1e-4, 0.02), (37, 1e-3, 0.5)])
def test_schedule_and_forward_process_equal_diffusers(T, beta_1, beta_T):
    ours = Schedule(T, beta_1, beta_T)
    theirs = DDPMScheduler(T, beta_1, beta_T, beta_schedule="linear")
    torch.testing.assert_close(ours.beta.float(), theirs.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=0)
    z, eps = torch.randn(2, T, 5, generator=seeded())
    t = torch.arange(T)
    torch.testing.assert_close(ours.add_noise(z, eps, t), theirs.add_noise(z, eps, t), rtol=1e-4, atol=1e-5)


def test_the_authors_fixed_range_ends_far_from_noise_at_small_T():
    ends = [float(Schedule(T).alpha_bar[-1]) for T in (10, 100, 1000)]
    assert [round(e, 2) for e in ends] == [0.90, 0.36, 0.00]  # METHOD


@pytest.mark.parametrize("T", [1, 7, 10, 100, 1000, 2000])
def test_rescaled_walks_the_same_curve_at_every_T(T):
    fixed, rescaled = Schedule(1000), Schedule(T, beta_range="rescaled")
    assert rescaled.beta.shape == (T,) and ((rescaled.beta > 0) & (rescaled.beta < 1)).all()
    assert float(rescaled.alpha_bar[-1]) == pytest.approx(float(fixed.alpha_bar[-1]), rel=1e-9)
    steps = [i for i in range(1, T + 1) if 1000 * i % T == 0]  # those that fall on one of the 1000
    torch.testing.assert_close(rescaled.alpha_bar[[i - 1 for i in steps]],
                               fixed.alpha_bar[[1000 * i // T - 1 for i in steps]], rtol=1e-9, atol=0)


def test_rescaled_equals_fixed_at_1000():
    torch.testing.assert_close(Schedule(1000, beta_range="rescaled").beta, Schedule(1000).beta, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kwargs, message", [
    ({"beta_range": "cosine"}, "beta_range is 'cosine': expected 'fixed' or 'rescaled'"),
    ({"beta_1": 0.0}, "beta from 0.0 to 0.02 over T=1000: expected variances between 0 and 1"),
    ({"beta_T": 1.0, "T": 5}, "beta from 0.0001 to 1.0 over T=5")])
def test_impossible_schedules_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**kwargs)


@pytest.mark.parametrize("T, steps", [(1000, 1), (1000, 7), (1000, 50), (1000, 999), (10, 4), (10, 10), (37, 5)])
def test_ladder_equals_diffusers_trailing_steps(T, steps):
    theirs = DDIMScheduler(T, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert Schedule(T).ladder(steps) == theirs.timesteps.tolist()


def test_all_steps_and_too_many():
    assert Schedule(5).ladder() == [4, 3, 2, 1, 0] == Schedule(5).ladder(5)
    for sampler in (ddpm, ddim):
        with pytest.raises(ValueError, match="6 sampling steps: expected at most T=5"):
            sampler(wavy, torch.zeros(1, 2), Schedule(5), steps=6)


# ---------------------------------------------------------------- the samplers

def follow(theirs, step, sampler, schedule, **kwargs):
    """Runs our sampler, and has diffusers repeat each of its steps from the same x with the same noise."""
    x, noise, compared = torch.randn(3, 6, generator=seeded(1)), seeded(2), []
    before = [x]

    def callback(remaining, after):
        t = theirs.timesteps[len(compared)]
        eps = wavy(before[0], t.repeat(3))
        want = step(eps, t, before[0], generator=noise).prev_sample
        torch.testing.assert_close(after, want, rtol=1e-3, atol=1e-4)
        before[0] = after
        compared.append(remaining)

    end = sampler(wavy, x, schedule, generator=seeded(2), callback=callback, **kwargs)
    assert torch.equal(end, before[0])
    assert compared == [int(t) + 1 for t in theirs.timesteps[1:]] + [0]


@pytest.mark.parametrize("T", [10, 200, 1000])
def test_ddpm_equals_diffusers_step_by_step(T):
    theirs = DDPMScheduler(T, beta_schedule="linear", variance_type="fixed_small", clip_sample=False)
    theirs.set_timesteps(T)
    follow(theirs, theirs.step, ddpm, Schedule(T))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 50, 1000])
def test_ddim_equals_diffusers_step_by_step(steps, eta):
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True,
                           timestep_spacing="trailing")
    theirs.set_timesteps(steps)

    def step(*args, generator):
        return theirs.step(*args, eta=eta, generator=generator)

    follow(theirs, step, ddim, Schedule(1000), steps=steps, eta=eta)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.5, 0.4), (-3.0, 2.5)])
@pytest.mark.parametrize("sampler, kwargs", [(ddpm, {}), (ddim, {}), (ddim, {"steps": 250}), (ddim, {"eta": 1.0})],
                         ids=["ddpm", "ddim", "ddim 250", "ddim eta 1"])
def test_the_analytic_score_of_a_gaussian_gives_the_gaussian(sampler, kwargs, mean, std):
    schedule, n = Schedule(1000), 20_000

    def eps(x, t):
        bar = schedule.alpha_bar[t].float()[:, None]  # x_t ~ N(sqrt(bar) m, bar s^2 + 1 - bar)
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * std**2 + 1 - bar)

    x = sampler(eps, torch.randn(n, 1, generator=seeded(3)), schedule, generator=seeded(4), **kwargs)
    # Four standard errors, 1 % for the finite steps, and what is left of the data at t = T.
    slack = 0.01 + math.sqrt(float(schedule.alpha_bar[-1]))
    assert abs(float(x.mean()) - mean) < 4 * std / math.sqrt(n) + slack * max(std, abs(mean))
    assert float(x.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * n) + 0.01)


def test_ddim_without_noise_is_deterministic_and_ddpm_is_decided_by_its_generator():
    x = torch.randn(4, 3, generator=seeded())
    schedule = Schedule(20)
    state = torch.get_rng_state()
    assert torch.equal(ddim(wavy, x, schedule), ddim(wavy, x, schedule, generator=seeded(5)))
    a, b, c = (ddpm(wavy, x, schedule, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ddim(wavy, x, schedule, eta=1.0, generator=seeded(1)), a)


def test_nothing_is_clipped():
    x = ddim(lambda x, t: torch.zeros_like(x), torch.full((1, 2), 50.0), Schedule(10))
    torch.testing.assert_close(x, torch.full((1, 2), 50.0 / math.sqrt(float(Schedule(10).alpha_bar[-1]))))


def test_randn_takes_the_generators_numbers():
    assert torch.equal(diffusion.randn((2, 3), torch.device("cpu"), seeded(8)), torch.randn(2, 3, generator=seeded(8)))


def test_gaussian_denoiser_is_the_best_predictor_of_the_noise():
    """The regression of eps on x_t over many draws, and no better one: the residual does not correlate with x_t."""
    schedule, mean, std, n = Schedule(), 1.5, 0.5, 200_000
    t = torch.full((n,), 300)
    eps = torch.randn(n, 1, generator=seeded(1))
    x = schedule.add_noise(mean + std * torch.randn(n, 1, generator=seeded(2)), eps, t)
    predicted = diffusion.GaussianDenoiser(mean, std, schedule)(x, t)
    residual = eps - predicted
    assert abs(float(residual.mean())) < 5 / n**0.5
    assert abs(float((residual * (x - x.mean())).mean())) < 5 * float(x.std()) / n**0.5
    slope = ((x - x.mean()) * eps).mean() / x.var()
    assert float((predicted - predicted.mean()).std() / x.std()) == pytest.approx(float(slope), rel=0.02)


class Exact(torch.nn.Module):
    """E[z | x_t], E[eps | x_t] or E[v | x_t] of latents from N(mean, std^2), by conditioning a Gaussian."""

    def __init__(self, mean, std, schedule, prediction):
        super().__init__()
        self.mean, self.std, self.schedule, self.prediction = mean, std, schedule, prediction

    def forward(self, x, t):
        bar = self.schedule.alpha_bar[t].unsqueeze(1)
        residual = (x.double() - bar.sqrt() * self.mean) / (bar * self.std**2 + 1 - bar)
        z, eps = self.mean + bar.sqrt() * self.std**2 * residual, (1 - bar).sqrt() * residual
        return {"x0": z, "noise": eps, "v": bar.sqrt() * eps - (1 - bar).sqrt() * z}[self.prediction].float()


@pytest.mark.parametrize("sampler, kwargs", [(ddpm, {}), (ddim, {}), (ddim, {"steps": 100})], ids=["ddpm", "ddim", "ddim 100"])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_exact_answers_of_any_kind_give_the_same_samples(prediction, sampler, kwargs):
    mean, std, schedule = 1.5, 0.4, Schedule(200, beta_range="rescaled")
    net = Predictor(Exact(mean, std, schedule, prediction), schedule.alpha_bar, prediction).eval()
    x = torch.randn(500, 3, generator=seeded(3))
    want = sampler(diffusion.GaussianDenoiser(mean, std, schedule), x, schedule, generator=seeded(4), **kwargs)
    torch.testing.assert_close(sampler(net, x, schedule, generator=seeded(4), **kwargs), want, rtol=1e-3, atol=1e-3)
    assert float(want.mean()) == pytest.approx(mean, abs=0.1) and float(want.std()) == pytest.approx(std, rel=0.1)
