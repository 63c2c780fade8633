"""The VAE of Table 8: the autoencoder's network with a Gaussian latent, sampled without any diffusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdiff_lib.base import recipe, training, vectors
from pdiff_lib.base.runs import Checkpoint, Store, tensor_digest
from pdiff_lib.generators import autoencoder
from pdiff_lib.generators.diffusion import randn
from pdiff_lib.generators.methods import unconditional
from pdiff_lib.generators.pdiff import CHUNK

ACTIVE = 0.01  # variance of its posterior means from which on a latent dimension counts as used


class VariationalAutoencoder(autoencoder.Autoencoder):
    """`Autoencoder` whose encoder gives mean and log variance of the latent. Arguments as there."""

    def __init__(self, numel: int, latent_dim: int = 128, channels: Sequence[int] = (64, 128, 256, 256, 32)):
        super().__init__(numel, latent_dim, channels)
        self.log_var = nn.Linear(latent_dim, latent_dim)

    def distribution(self, v: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Mean and log variance of q(z | v)."""
        padded = nn.functional.pad(v, (0, self.padded - self.numel)).unsqueeze(1)
        features = self.encoder[:-1](padded)
        return self.encoder[-1](features), self.log_var(features)


def divergence(mean: Float[Tensor, "B L"], log_var: Float[Tensor, "B L"]) -> Float[Tensor, "B"]:
    """KL(N(mean, exp(log_var)) || N(0, I)) in nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1)


def negative_elbo(net: VariationalAutoencoder, v: Float[Tensor, "B D"], kl_weight: float,
                  generator: torch.Generator) -> Float[Tensor, ""]:
    """Squared error over D plus `kl_weight` times KL(q(z | v), N(0, I)), both divided by D (Kingma and Welling 2014, Eq. 10,
    with unit variance of the decoder up to the factor 2)."""
    with torch.autocast(v.device.type, dtype=torch.bfloat16, enabled=v.device.type == "cuda"):
        mean, log_var = net.distribution(v)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, device=v.device, generator=generator)
        out = net.decode(z)
    return (out.float() - v).square().mean() + kl_weight * divergence(mean.float(), log_var.float()).mean() / v.shape[1]


class VAE:
    """A variational autoencoder on checkpoints: `fit`, then `sample` decodes N(0, I).

    Args:
        sizes: lengths of the tensors in a vector, standardised one by one; None: the vector as one tensor.
        device: to train and sample on, and where samples are; None: CUDA when there is one.
        progress: show progress bars.
        settings: any of `recipe.Autoencoder` (widths, latent size, batch, seed) and `recipe.Vae`, by name.

    Raises:
        ValueError: an unknown setting or a value out of range.

    Source: Table 8 (METHOD "Training steps").
    """

    conditional = False

    def __init__(self, sizes: Sequence[int] | None = None, device: str | torch.device | None = None,
                 progress: bool = True, **settings):
        self.sizes, self.progress, self.device = sizes, progress, training.device_of(device)
        self.network, self.settings = recipe.split(settings, recipe.Autoencoder, recipe.Vae)

    def fit(self, theta: Float[Tensor, "K D"], store: Store | None = None, condition: Tensor | None = None) -> VAE:
        """Train on raw checkpoints.

        Args:
            theta: raw parameter vectors, at least two.
            store: keeps the stage and lets a killed training resume; None keeps nothing.

        Raises:
            ValueError: fewer than two vectors, all the same, not [K D], NaN, `sizes` that do not add up to D, or a condition.
        """
        unconditional(self, condition)
        device, own, vae = self.device, self.network, self.settings
        theta = vectors.vectors(theta, at_least=2, device=device)
        self.standardise = vectors.Standardiser(theta, self.sizes, own.centre)
        vectors.distinct(theta)
        v = self.standardise(theta)

        def train(checkpoint: Checkpoint) -> dict[str, Tensor]:
            net, generator = self._create(v), torch.Generator(device)

            def loss_at(i: int) -> Tensor:
                generator.manual_seed(training.seed_for(own.pdiff_seed, "vae", i))
                pick = torch.randint(len(v), (own.ae_batch,), device=device, generator=generator)
                return negative_elbo(net, v[pick], vae.kl_weight, generator)

            optimizer = torch.optim.AdamW(net.parameters(), vae.vae_lr, weight_decay=own.ae_weight_decay)
            losses = training.loop(loss_at, vae.vae_steps, {"vae": net.train()}, optimizer, checkpoint=checkpoint, desc="VAE",
                                   progress=self.progress)
            return {"losses": losses, "mean": self.standardise.mean, "std": self.standardise.std, **net.state_dict(prefix="net.")}

        key = {"theta": tensor_digest(theta), "sizes": self.sizes, "device": device.type, **dataclasses.asdict(own),
               **dataclasses.asdict(vae)}
        code = (VAE.fit, vectors.Standardiser, VAE._create, VariationalAutoencoder, negative_elbo, divergence, autoencoder, training)
        stage = (store or Store(None)).stage("VAE", key, train, code=code)
        self.net, self.losses = self._create(v), stage["losses"]
        self.net.load_state_dict({k.removeprefix("net."): t for k, t in stage.items() if k.startswith("net.")})
        self.net.eval()
        self.standardise.mean, self.standardise.std = stage["mean"].to(device), stage["std"].to(device)
        return self

    def _create(self, v: Float[Tensor, "K D"]) -> VariationalAutoencoder:
        with training.seeded(training.seed_for(self.network.pdiff_seed, "vae")):
            return VariationalAutoencoder(v.shape[1], self.network.latent_dim, self.network.ae_channels).to(v.device)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted method depend on, their random numbers apart."""
        return {"net": tensor_digest(self.net.state_dict()), "channels": list(self.network.ae_channels),
                "standardise": tensor_digest({"mean": self.standardise.mean, "std": self.standardise.std})}

    @torch.no_grad()
    def diagnose(self, theta: Float[Tensor, "K D"]) -> dict[str, float]:
        """Whether the latent is used, and whether what is encoded lies where N(0, I) is drawn.

        Args:
            theta: the checkpoints it was fitted on.

        Returns:
            `reconstruction_mse` of the posterior means (standardised units: 1 = as bad as the mean), `active` (latent
            dimensions whose posterior means have a variance above 0.01), `means_std` (of the posterior means, over all
            dimensions), `posterior_std` (of q(z | v), mean), `aggregate_std` (of z over all checkpoints; 1 where the prior
            fits), `kl` (nats per checkpoint).

        Source: active units as in Burda et al. 2016, "Importance Weighted Autoencoders", Section 5.
        """
        v = self.standardise(vectors.vectors(theta, device=self.device))
        parts = [self.net.distribution(part) for part in v.split(CHUNK)]
        mean, log_var = (torch.cat(p) for p in zip(*parts))
        rebuilt = torch.cat([self.net.decode(part) for part in mean.split(CHUNK)])
        spread = mean.var(dim=0, correction=0)
        return {"reconstruction_mse": float((rebuilt - v).square().mean() / (v - v.mean(0)).square().mean()),
                "active": float((spread > ACTIVE).sum()), "means_std": float(spread.mean().sqrt()),
                "posterior_std": float((0.5 * log_var).exp().mean()),
                "aggregate_std": float((spread + log_var.exp().mean(dim=0)).mean().sqrt()),
                "kl": float(divergence(mean, log_var).mean())}

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Float[Tensor, "n D"]:
        """n new raw parameter vectors: N(0, I), decoded.

        Args:
            n: how many.
            generator: of the latents; on the CPU it gives the same whatever the device.

        Raises:
            ValueError: before `fit`, or a condition.
        """
        unconditional(self, condition)
        if not hasattr(self, "net"):
            raise ValueError("this VAE has not seen any checkpoints: call fit(theta) first")
        z = randn((n, self.network.latent_dim), self.device, generator)
        with training.precision(self.device):
            return torch.cat([self.standardise.inverse(self.net.decode(part)) for part in z.split(CHUNK)])
