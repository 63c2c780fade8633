"""The parameter autoencoder (Section 2.3, Eq. 5): 1-D convolutions between `v [B D]` and a latent `z [B L]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Checkpoint


class Autoencoder(nn.Module):
    """Strided 1-D convolutions to a latent, mirrored by transposed ones.

    Args:
        numel: D; vectors are zero-padded to a multiple of 64 (and of 2^layers) inside.
        latent_dim: L.
        channels: of the encoder's convolutions (kernel 7, stride 2), each with batch norm and LeakyReLU.

    Source: Section 2.3 and the authors' implementation (METHOD "Autoencoder"): two linear layers to the latent, ELU and
    one plain convolution at the decoder's end.
    """

    def __init__(self, numel: int, latent_dim: int = 128, channels: Sequence[int] = (64, 128, 256, 256, 32)):
        super().__init__()
        multiple = max(64, 2 ** len(channels))
        self.numel, self.padded = numel, -(-numel // multiple) * multiple
        self.inner = (channels[-1], self.padded // 2 ** len(channels))
        flat = self.inner[0] * self.inner[1]
        down = []
        for a, b in zip((1, *channels), channels):
            down += [nn.Conv1d(a, b, 7, stride=2, padding=3), nn.BatchNorm1d(b), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, latent_dim), nn.Linear(latent_dim, latent_dim))
        widths = (*reversed(channels), channels[0])
        up = []
        for a, b in zip(widths, widths[1:]):
            up += [nn.ConvTranspose1d(a, b, 7, stride=2, padding=3, output_padding=1), nn.BatchNorm1d(b), nn.ELU()]
        self.to_inner = nn.Linear(latent_dim, flat)
        self.decoder = nn.Sequential(*up, nn.Conv1d(channels[0], 1, 7, padding=3))

    def encode(self, v: Float[Tensor, "B D"]) -> Float[Tensor, "B L"]:
        """Standardised vectors to latents."""
        return self.encoder(F.pad(v, (0, self.padded - self.numel)).unsqueeze(1))

    def decode(self, z: Float[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Latents to standardised vectors."""
        return self.decoder(self.to_inner(z).view(-1, *self.inner)).squeeze(1)[:, : self.numel]


class PCA(nn.Module):
    """Principal components in the autoencoder's place: the linear map that loses least of the vectors it was made of.

    K vectors span at most K-1 directions, so K-1 components rebuild them exactly.

    Args:
        numel: D.
        latent_dim: L, components.
    """

    def __init__(self, numel: int, latent_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(numel))
        self.register_buffer("basis", torch.zeros(latent_dim, numel))

    @classmethod
    def of(cls, v: Float[Tensor, "K D"], latent_dim: int) -> PCA:
        """The components of standardised vectors, at most `min(latent_dim, K-1, D)` of them."""
        mean = v.double().mean(dim=0)
        basis = torch.linalg.svd(v.double() - mean, full_matrices=False).Vh[:min(latent_dim, len(v) - 1)]
        pca = cls(v.shape[1], len(basis)).to(v.device)
        pca.mean.copy_(mean)
        pca.basis.copy_(basis)
        return pca

    def encode(self, v: Float[Tensor, "B D"]) -> Float[Tensor, "B L"]:
        """Standardised vectors to coordinates."""
        return (v - self.mean) @ self.basis.T

    def decode(self, z: Float[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Coordinates to standardised vectors."""
        return z @ self.basis + self.mean


def create(settings: recipe.Autoencoder, numel: int, latent_dim: int) -> nn.Module:
    """The untrained encoder and decoder of a recipe."""
    return PCA(numel, latent_dim) if settings.ae_kind == "pca" else Autoencoder(numel, latent_dim, settings.ae_channels)


def noisy_reconstruction_loss(ae: Autoencoder, v: Float[Tensor, "B D"], sigma_v: float, sigma_z: float,
                              generator: torch.Generator) -> Float[Tensor, ""]:
    """Mean squared error of Eq. 5, against the **noisy** input, as the authors have it (the text says v_k).

    In float32 also on CUDA, where the authors use bf16: its rounding (.0017 on average) would hide a sigma_v of .001.
    """
    noisy = v + sigma_v * torch.randn(v.shape, device=v.device, generator=generator)
    z = ae.encode(noisy)
    z = z + sigma_z * torch.randn(z.shape, device=z.device, dtype=z.dtype, generator=generator)
    return F.mse_loss(ae.decode(z).float(), noisy)


def fit(v: Float[Tensor, "K D"], settings: recipe.Autoencoder, *, checkpoint: Checkpoint | None = None,
        progress: bool = True) -> tuple[nn.Module, Float[Tensor, "steps"]]:
    """Train an autoencoder on standardised vectors (of kind "pca": fit it).

    Args:
        v: [K D], standardised, on the device to train on.
        settings: Table 5c.
        checkpoint: where the state of an unfinished training is kept.
        progress: show a bar.

    Returns:
        The autoencoder in eval mode, and the loss of each step (none of PCA).
    """
    if settings.ae_kind == "pca":
        return PCA.of(v, settings.latent_dim).eval(), torch.empty(0)
    with training.seeded(training.seed_for(settings.pdiff_seed, "autoencoder")):
        ae = create(settings, v.shape[1], settings.latent_dim).to(v.device)
    generator = torch.Generator(v.device)

    def loss_at(i: int) -> Tensor:
        generator.manual_seed(training.seed_for(settings.pdiff_seed, "autoencoder", i))
        pick = torch.randint(len(v), (settings.ae_batch,), device=v.device, generator=generator)
        return noisy_reconstruction_loss(ae, v[pick], settings.sigma_v, settings.sigma_z, generator)

    optimizer = torch.optim.AdamW(ae.parameters(), settings.ae_lr, weight_decay=settings.ae_weight_decay)
    losses = training.loop(loss_at, settings.ae_steps, {"autoencoder": ae.train()}, optimizer, checkpoint=checkpoint,
                           desc="autoencoder", progress=progress, tf32=True)
    return ae.eval(), losses
