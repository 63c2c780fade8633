"""The denoising network and its training (Section 2.4, Eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib import recipe, training
from pdiff_lib.diffusion import Schedule
from pdiff_lib.runs import Checkpoint

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
        checkpoint: Checkpoint | None = None, progress: bool = True) -> tuple[Denoiser, Float[Tensor, "steps"]]:
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed_for(seed, "denoiser"))
        net = Denoiser(z.shape[1], settings.denoiser_channels).to(z.device)
    generator = torch.Generator(z.device)

    def loss_at(i: int) -> Tensor:
        generator.manual_seed(training.seed_for(seed, "denoiser", i))
        pick = torch.randint(len(z), (settings.diffusion_batch,), device=z.device, generator=generator)
        t = torch.randint(schedule.T, (settings.diffusion_batch,), device=z.device, generator=generator)
        eps = torch.randn(settings.diffusion_batch, z.shape[1], device=z.device, generator=generator)
        return noise_loss(net, z[pick], t, eps, schedule).mean()

    optimizer = torch.optim.AdamW(net.parameters(), settings.diffusion_lr, weight_decay=settings.diffusion_weight_decay)
    losses = training.loop(loss_at, settings.diffusion_steps, {"denoiser": net.train()}, optimizer, checkpoint=checkpoint,
                           desc="denoiser", progress=progress)
    return net.eval(), losses
