"""The denoising network and its training (Section 2.4, Eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Checkpoint
from pdiff_lib.generators.diffusion import Schedule

TIME_FEATURES = 256


class Denoiser(nn.Module):
    """Predicts the noise in a latent: 1-D convolutions at full latent length, kernel 7, no pooling.

    Args:
        latent_dim: L.
        channels: between the one channel of input and output; symmetric, with additive skips across the middle.

    Source: the authors' implementation (METHOD "Denoiser"): batch norm and ELU; a sinusoidal time embedding through a
    two-layer MLP to length L is added to the input of every convolution.
    """

    def __init__(self, latent_dim: int = 128, channels: Sequence[int] = (64, 128, 256, 512, 256, 128, 64)):
        super().__init__()
        if tuple(channels) != tuple(reversed(channels)):
            raise ValueError(f"denoiser_channels is {list(channels)}: expected a symmetric list (the skips are additive)")
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 7, padding=3) for a, b in zip((1, *channels), (*channels, 1)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(c) for c in channels)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, latent_dim), nn.ELU(), nn.Linear(latent_dim, latent_dim))

    def forward(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """eps_theta(x_t, t)."""
        time = self.time(sinusoidal(t)).unsqueeze(1)
        h, skips, depth = x.unsqueeze(1), [], len(self.norms)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            h = F.elu(norm(conv(h + time)))
            if i < depth // 2:
                skips.append(h)
            elif i > depth // 2 or depth % 2 == 0:
                h = h + skips.pop()
        return self.convs[-1](h + time).squeeze(1)


class ResidualMLP(nn.Module):
    """A light denoiser: residual blocks of two linear layers, the time embedding added before each.

    It learns v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z and answers with the eps that follows from it: an MLP that
    learns eps itself leaves samples that are far too wide, as its error at the noisy end is divided by sqrt(alpha_bar).

    Args:
        latent_dim: L.
        alpha_bar: [T] of the schedule.
        width: of the hidden layers.
        blocks: how many.

    Source: Salimans and Ho 2022, Section 4 (v-prediction); not the paper's.
    """

    def __init__(self, latent_dim: int, alpha_bar: Float[Tensor, "T"], width: int = 512, blocks: int = 3):
        super().__init__()
        self.register_buffer("signal", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - alpha_bar).sqrt().float(), persistent=False)
        self.enter, self.leave = nn.Linear(latent_dim, width), nn.Linear(width, latent_dim)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                                                  nn.Linear(width, width)) for _ in range(blocks))

    def velocity(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """v_theta(x_t, t)."""
        time, h = self.time(sinusoidal(t)), self.enter(x)
        for block in self.blocks:
            h = h + block(h + time)
        return self.leave(h)

    def forward(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        """eps_theta(x_t, t)."""
        return self.signal[t, None] * self.velocity(x, t) + self.noise[t, None] * x

    def loss(self, z: Float[Tensor, "B L"], t: Int64[Tensor, "B"], eps: Float[Tensor, "B L"],
             schedule: Schedule) -> Float[Tensor, "B"]:
        """Squared error of v, averaged over the latent, for each of the batch."""
        v = self.signal[t, None] * eps - self.noise[t, None] * z
        return (self.velocity(schedule.add_noise(z, eps, t), t) - v).square().mean(dim=1)


def create(settings: recipe.Diffusion, latent_dim: int, schedule: Schedule) -> nn.Module:
    """The untrained denoiser of a recipe."""
    if settings.denoiser_kind == "mlp":
        return ResidualMLP(latent_dim, schedule.alpha_bar, settings.mlp_width)
    return Denoiser(latent_dim, settings.denoiser_channels)


def sinusoidal(t: Int64[Tensor, "B"], features: int = TIME_FEATURES) -> Float[Tensor, "B F"]:
    """Sines and cosines of t at wavelengths from 2 pi to 20,000 pi."""
    rates = torch.exp(torch.arange(features // 2, device=t.device) * (-math.log(10_000) / (features // 2)))
    angles = t.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def noise_loss(net: nn.Module, z: Float[Tensor, "B L"], t: Int64[Tensor, "B"], eps: Float[Tensor, "B L"],
               schedule: Schedule) -> Float[Tensor, "B"]:
    """Squared error of the predicted noise, averaged over the latent (Eq. 6), for each of the batch."""
    with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=z.device.type == "cuda" and net.training):
        predicted = net(schedule.add_noise(z, eps, t), t)
    return (predicted.float() - eps).square().mean(dim=1)


def fit(z: Float[Tensor, "K L"], schedule: Schedule, settings: recipe.Diffusion, seed: int = 0, *,
        checkpoint: Checkpoint | None = None, progress: bool = True) -> tuple[nn.Module, Float[Tensor, "steps"]]:
    """Train a denoiser on latents.

    Args:
        z: [K L], on the device to train on.
        schedule: the forward process.
        settings: Table 5d.
        seed: of initialisation, batches and noise.
        checkpoint: where the state of an unfinished training is kept.
        progress: show a bar.

    Returns:
        The denoiser in eval mode, and the loss of each step.
    """
    with training.seeded(training.seed_for(seed, "denoiser")):
        net = create(settings, z.shape[1], schedule).to(z.device)
    error = net.loss if isinstance(net, ResidualMLP) else partial(noise_loss, net)
    generator = torch.Generator(z.device)

    def loss_at(i: int) -> Tensor:
        generator.manual_seed(training.seed_for(seed, "denoiser", i))
        pick = torch.randint(len(z), (settings.diffusion_batch,), device=z.device, generator=generator)
        t = torch.randint(schedule.T, (settings.diffusion_batch,), device=z.device, generator=generator)
        eps = torch.randn(settings.diffusion_batch, z.shape[1], device=z.device, generator=generator)
        return error(z[pick], t, eps, schedule).mean()

    optimizer = torch.optim.AdamW(net.parameters(), settings.diffusion_lr, weight_decay=settings.diffusion_weight_decay)
    losses = training.loop(loss_at, settings.diffusion_steps, {"denoiser": net.train()}, optimizer, checkpoint=checkpoint,
                           desc="denoiser", progress=progress, tf32=True)
    return net.eval(), losses
