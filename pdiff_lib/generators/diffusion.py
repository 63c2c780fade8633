"""The forward process and its reversal (Eq. 1-4): noise schedules and samplers.

Samplers are free functions with one signature: they take a noise predictor `denoise(x, t) -> eps`, a start `x` and a
schedule, and call `callback(remaining, x)` after each step with the diffusion steps that remain (0 at the end).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

Denoiser = Callable[[Float[Tensor, "B L"], Int64[Tensor, "B"]], Float[Tensor, "B L"]]
Callback = Callable[[int, Float[Tensor, "B L"]], None]

REFERENCE_T = 1000  # the T for which the paper states its beta range
NUMBERS_AT_ONCE = 1 << 24  # of noise that are drawn on the CPU and copied to a GPU together


class Schedule:
    """Linear noise variances (Eq. 1, Table 5d), computed in float64, kept in float32.

    Args:
        T: number of diffusion steps; t runs from 0 to T-1.
        beta_1, beta_T: first and last variance.
        beta_range: "fixed" uses these for every T, as the authors do; at small T the chain then ends far from N(0, I).
            "rescaled" walks the alpha_bar curve of the 1000-step schedule in T steps (the same curve at every T; equal
            to "fixed" at T = 1000).

    Attributes:
        beta, alpha_bar: [T] float64, on the CPU.
    """

    def __init__(self, T: int = REFERENCE_T, beta_1: float = 1e-4, beta_T: float = 2e-2, beta_range: str = "fixed"):
        if beta_range == "fixed":
            self.beta = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
        elif beta_range == "rescaled":
            reference = torch.linspace(beta_1, beta_T, REFERENCE_T, dtype=torch.float64)
            log_bar = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-reference).cumsum(0)])
            at = torch.arange(T + 1, dtype=torch.float64) * REFERENCE_T / T
            low = at.floor().long().clamp(max=REFERENCE_T - 1)
            log_bar = torch.lerp(log_bar[low], log_bar[low + 1], at - low)
            self.beta = -torch.expm1(log_bar.diff())
        else:
            raise ValueError(f"beta_range is {beta_range!r}: expected 'fixed' or 'rescaled'")
        if not ((self.beta > 0) & (self.beta < 1)).all():
            raise ValueError(f"beta from {beta_1} to {beta_T} over T={T}: expected variances between 0 and 1")
        self.T = T
        self.alpha_bar = torch.cumprod(1 - self.beta, 0)
        self._on: dict[torch.device, Float[Tensor, "T"]] = {}

    def alpha_bar_on(self, device: torch.device) -> Float[Tensor, "T"]:
        """`alpha_bar` on a device; copied there once."""
        if device not in self._on:
            self._on[device] = self.alpha_bar.to(device)
        return self._on[device]

    def add_noise(self, z: Float[Tensor, "B L"], eps: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """x_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) eps (Eq. 2)."""
        bar = self.alpha_bar_on(z.device)[t].unsqueeze(1)
        return bar.sqrt().to(z.dtype) * z + (1 - bar).sqrt().to(z.dtype) * eps

    def ladder(self, steps: int = 0) -> list[int]:
        """The t that a sampler visits, descending from T-1: `steps` of them, evenly spaced; 0 = all.

        >>> Schedule(1000).ladder(4)
        [999, 749, 499, 249]
        """
        if steps > self.T:
            raise ValueError(f"{steps} sampling steps: expected at most T={self.T}")
        steps = steps or self.T
        return [round(self.T - i * self.T / steps) - 1 for i in range(steps)]


def ddpm(denoise: Denoiser, x: Float[Tensor, "B L"], schedule: Schedule, *, steps: int = 0, eta: float = 1.0,
         generator: torch.Generator | None = None, callback: Callback | None = None,
         progress: bool = False) -> Float[Tensor, "B L"]:
    """Ancestral sampling with the posterior variance (Eq. 3; Ho et al. 2020, Eq. 7): `ddim` with eta = 1."""
    return ddim(denoise, x, schedule, steps=steps, eta=eta, generator=generator, callback=callback, progress=progress)


@torch.no_grad()
def ddim(denoise: Denoiser, x: Float[Tensor, "B L"], schedule: Schedule, *, steps: int = 0, eta: float = 0.0,
         generator: torch.Generator | None = None, callback: Callback | None = None,
         progress: bool = False) -> Float[Tensor, "B L"]:
    """Sampling along a ladder of steps (Song et al. 2021, Eq. 12 and 16).

    Args:
        denoise: the noise predictor; t is [B], the same for all.
        x: [B L], the start, N(0, I).
        schedule: with T steps.
        steps: how many of them are visited; 0 = all.
        eta: 0 = deterministic; 1 = the posterior variance, which over all T steps is DDPM.
        generator: of the added noise; not used when eta = 0.
        callback: called after each step with the diffusion steps that remain, and the new x.
        progress: show a bar over the steps.

    Returns:
        [B L], the clean end of the chain. Latents are unbounded: nothing is clipped.
    """
    ladder = schedule.ladder(steps)
    bars = [*schedule.alpha_bar[ladder].tolist(), 1.0]
    sigmas = [eta * ((1 - after) / (1 - bar) * (1 - bar / after)) ** 0.5 for bar, after in zip(bars, bars[1:])]
    noise = _noise(x.shape, x.device, generator, sum(sigma > 0 for sigma in sigmas))
    for i, t in enumerate(tqdm(ladder, desc="sampling", disable=not progress, mininterval=1.0, leave=False)):
        bar, bar_next, sigma = bars[i], bars[i + 1], sigmas[i]
        eps = denoise(x, torch.full((len(x),), t, device=x.device))
        z = (x - (1 - bar) ** 0.5 * eps) / bar**0.5
        x = bar_next**0.5 * z + max(1 - bar_next - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * next(noise)
        if callback is not None:
            callback(ladder[i + 1] + 1 if i + 1 < len(ladder) else 0, x)
    return x


class GaussianDenoiser:
    """The exact noise predictor for data from N(mean, std^2), elementwise: what a perfect denoiser would answer.

    With it a sampler's own error is all that is left, and can be measured against the known mean and variance.
    """

    def __init__(self, mean: float, std: float, schedule: Schedule):
        self.mean, self.variance, self.schedule = mean, std**2, schedule

    def __call__(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """E[eps | x_t], from the score of N(sqrt(alpha_bar) mean, alpha_bar std^2 + 1 - alpha_bar)."""
        bar = self.schedule.alpha_bar_on(x.device)[t].unsqueeze(1).to(x.dtype)
        return (1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / (bar * self.variance + 1 - bar)


def randn(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1), drawn where the generator lives: a CPU generator gives a CUDA run the numbers of a CPU run."""
    return torch.randn(shape, device=generator.device if generator else device, generator=generator).to(device)


def _noise(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None, count: int) -> Iterator[Tensor]:
    """`count` times `randn`, the same numbers; from a generator on another device many are copied at once, not one per step."""
    if generator is None or generator.device.type == device.type:
        yield from (randn(shape, device, generator) for _ in range(count))
        return
    many = max(1, NUMBERS_AT_ONCE // prod(shape))
    for start in range(0, count, many):
        drawn = [randn(shape, generator.device, generator) for _ in range(min(many, count - start))]
        yield from torch.stack(drawn).to(device)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
