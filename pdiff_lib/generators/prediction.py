"""What the denoiser is trained to answer: the noise, the velocity or the clean latent. Samplers get the noise that follows.

At x_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps any of the three gives the others; what differs is how the error of the
network counts at each noise level.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Checkpoint, code_digest
from pdiff_lib.generators import denoiser
from pdiff_lib.generators.diffusion import Schedule

OWN = {"conv": "noise", "mlp": "v"}  # what the networks of `denoiser` learn by themselves, by `denoiser_kind`


def of(settings: recipe.Diffusion) -> str:
    """"noise", "v" or "x0": what `prediction` means for the network of these settings.

    >>> of(recipe.Diffusion()), of(recipe.Diffusion(denoiser_kind="mlp")), of(recipe.Diffusion(prediction="x0"))
    ('noise', 'v', 'x0')
    """
    return OWN[settings.denoiser_kind] if settings.prediction == "default" else settings.prediction


def is_own(settings: recipe.Diffusion) -> bool:
    """Whether the network of these settings learns that by itself, without `Predictor`."""
    return of(settings) == OWN[settings.denoiser_kind]


def key(settings: recipe.Diffusion) -> dict[str, Any]:
    """What a denoiser and its answers depend on. Of the prediction only one that is not the network's own (with the code here), so
    that "noise" said of the paper's denoiser is no other stage than "default", nor than what was kept before there was a choice."""
    values = dataclasses.asdict(settings)
    values.pop("prediction")
    return values if is_own(settings) else {**values, "prediction": of(settings), "code": code_digest(sys.modules[__name__])}


class Predictor(nn.Module):
    """A denoiser whose network answers with something else than its own kind does.

    Args:
        net: [B L], [B] -> [B L]; of a `denoiser.ResidualMLP` its `velocity`, that is, what its layers give.
        alpha_bar: [T] of the schedule.
        prediction: "noise", "v" or "x0".

    Source: Salimans and Ho 2022, Section 4 and Appendix D; not the paper's.
    """

    def __init__(self, net: nn.Module, alpha_bar: Float[Tensor, "T"], prediction: str):
        super().__init__()
        if prediction not in OWN.values() and prediction != "x0":
            raise ValueError(f"prediction is {prediction!r}: expected one of 'noise', 'v', 'x0'")
        self.net, self.prediction = net, prediction
        self.register_buffer("signal", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - alpha_bar).sqrt().float(), persistent=False)

    def answer(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """What the network predicts at x_t, in float32."""
        mlp = isinstance(self.net, denoiser.ResidualMLP)
        rounded = x.device.type == "cuda" and self.training and not mlp  # as each kind is trained by itself
        with torch.autocast(x.device.type, torch.bfloat16, enabled=rounded):
            return (self.net.velocity if mlp else self.net)(x, t).float()

    def target(self, z: Float[Tensor, "B L"], t: Int64[Tensor, "B"], eps: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """What it should predict."""
        if self.prediction == "v":
            return self.signal[t, None] * eps - self.noise[t, None] * z
        return z if self.prediction == "x0" else eps

    def forward(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """eps_theta(x_t, t), which follows from what is predicted."""
        answer, signal, noise = self.answer(x, t), self.signal[t, None], self.noise[t, None]
        if self.prediction == "v":
            return signal * answer + noise * x
        return (x - signal * answer) / noise if self.prediction == "x0" else answer

    def loss(self, z: Float[Tensor, "B L"], t: Int64[Tensor, "B"], eps: Float[Tensor, "B L"],
             schedule: Schedule) -> Float[Tensor, "B"]:
        """Squared error of the prediction, averaged over the latent, for each of the batch."""
        return (self.answer(schedule.add_noise(z, eps, t), t) - self.target(z, t, eps)).square().mean(dim=1)


def create(settings: recipe.Diffusion, latent_dim: int, schedule: Schedule) -> nn.Module:
    """The untrained denoiser of a recipe; it answers with the noise."""
    net = denoiser.create(settings, latent_dim, schedule)
    return net if is_own(settings) else Predictor(net, schedule.alpha_bar, of(settings))


def fit(z: Float[Tensor, "K L"], schedule: Schedule, settings: recipe.Diffusion, seed: int = 0, *,
        checkpoint: Checkpoint | None = None, progress: bool = True) -> tuple[nn.Module, Float[Tensor, "steps"]]:
    """Train a denoiser on latents, with the initial weights, batches and noise of `denoiser.fit`; arguments and what is returned as
    there."""
    if is_own(settings):
        return denoiser.fit(z, schedule, settings, seed, checkpoint=checkpoint, progress=progress)
    with training.seeded(training.seed_for(seed, "denoiser")):
        net = create(settings, z.shape[1], schedule).to(z.device)
    g, batch = torch.Generator(z.device), settings.diffusion_batch

    def loss_at(i: int) -> Tensor:
        g.manual_seed(training.seed_for(seed, "denoiser", i))
        pick, t = (torch.randint(high, (batch,), device=z.device, generator=g) for high in (len(z), schedule.T))
        return net.loss(z[pick], t, torch.randn(batch, z.shape[1], device=z.device, generator=g), schedule).mean()

    optimizer = torch.optim.AdamW(net.parameters(), settings.diffusion_lr, weight_decay=settings.diffusion_weight_decay)
    losses = training.loop(loss_at, settings.diffusion_steps, {"denoiser": net.train()}, optimizer, checkpoint=checkpoint,
                           desc="denoiser", progress=progress, tf32=True)
    return net.eval(), losses
