"""P-diff (Section 2): an autoencoder, a diffusion model in its latent space, and the way back to parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pdiff_lib.base import recipe, training, vectors
from pdiff_lib.base.runs import Checkpoint, Store, tensor_digest
from pdiff_lib.generators import autoencoder, denoiser, diffusion, prediction
from pdiff_lib.generators.baselines import gaussian
from pdiff_lib.generators.methods import unconditional

CHUNK = 32  # vectors per pass through the autoencoder: bounds memory at D = 80,000 and the paper's widths


class Trajectory(NamedTuple):
    """What the reverse process looked like on its way: S chosen moments of M chains.

    Attributes:
        t: [S] remaining diffusion steps, from T (pure noise) to 0 (the generated network).
        z: [S M L] latents.
        theta: [S M D] the same, decoded to raw parameters.
    """

    t: list[int]
    z: Float[Tensor, "S M L"]
    theta: Float[Tensor, "S M D"]


class PDiff:
    """Neural network diffusion: `fit` on checkpoints, `sample` new parameters. Without arguments: the paper's recipe.

    Args:
        sizes: lengths of the tensors in a vector (`sub.sizes`), standardised one by one; None: the vector as one tensor.
        device: to train and sample on, and where latents and samples are; None: CUDA when there is one.
        progress: show progress bars.
        settings: any of `recipe.Autoencoder`, `recipe.Diffusion`, `recipe.Sampling`, by name.

    Raises:
        ValueError: an unknown setting or a value out of range.

    Source: Eq. 5 and 6, Table 5; deviations are settings (`centre`, `standardise_latents`, `beta_range`, `sampler`).
    """

    conditional = False

    def __init__(self, sizes: Sequence[int] | None = None, device: str | torch.device | None = None,
                 progress: bool = True, **settings):
        self.sizes, self.progress, self.device = sizes, progress, training.device_of(device)
        self.ae_settings, self.diffusion_settings, self.sampling = recipe.split(
            settings, recipe.Autoencoder, recipe.Diffusion, recipe.Sampling)
        d = self.diffusion_settings
        self.schedule = diffusion.Schedule(d.T, d.beta_1, d.beta_T, d.beta_range)
        self.schedule.ladder(self.sampling.sampling_steps)  # refuse more sampling steps than T now, not after training
        denoiser.Denoiser(1, d.denoiser_channels)  # likewise an asymmetric list of channels

    def fit(self, theta: Float[Tensor, "K D"], store: Store | None = None, condition: Tensor | None = None) -> PDiff:
        """Train the autoencoder, then the denoiser on its latents.

        Args:
            theta: raw parameter vectors, at least two.
            store: keeps both stages and lets a killed training resume; None keeps nothing.

        Raises:
            ValueError: fewer than two vectors, all the same, not [K D], NaN, `sizes` that do not add up to D, or an autoencoder
                that gives all originals one latent (`standardise_latents`), or a condition.
        """
        unconditional(self, condition)
        store = store or Store(None)
        self.fit_autoencoder(theta, store)
        device, settings, seed = self.z.device, self.diffusion_settings, self.ae_settings.pdiff_seed
        self.z_mean, self.z_std = torch.zeros((), device=device), torch.ones((), device=device)
        if settings.standardise_latents:
            self.z_mean, self.z_std = self.z.mean(), self.z.std()
            if not float(self.z_std) > 0:
                raise ValueError(f"the latents of all {len(self.z)} originals are the same numbers: expected a spread to standardise "
                                 "by; the autoencoder tells the originals not apart (longer training, or ae_kind 'pca')")
        self.scaled, self.denoiser, self.diffusion_losses = (self.z - self.z_mean) / self.z_std, None, torch.empty(0)
        if settings.latent_model == "gaussian":
            return self

        def train_denoiser(checkpoint: Checkpoint) -> dict[str, Tensor]:
            net, losses = prediction.fit(self.scaled, self.schedule, settings, seed, checkpoint=checkpoint, progress=self.progress)
            return {"losses": losses, **net.state_dict(prefix="net.")}

        key = {"z": tensor_digest(self.z), "seed": seed, "device": device.type, **prediction.key(settings)}
        stage = store.stage("denoiser", key, train_denoiser, code=(denoiser, diffusion.Schedule, training))
        self.denoiser = prediction.create(settings, self.z.shape[1], self.schedule)
        self._load(self.denoiser, stage, device)
        self.diffusion_losses = stage["losses"]
        return self

    def fit_autoencoder(self, theta: Float[Tensor, "K D"], store: Store | None = None) -> PDiff:
        """The first half of `fit`: enough for `encode` and `decode`. Arguments and errors as there."""
        device, settings = self.device, self.ae_settings
        theta = vectors.vectors(theta, at_least=2, device=device)
        self.standardise = vectors.Standardiser(theta, self.sizes, settings.centre)
        vectors.distinct(theta)
        v = self.standardise(theta)

        def train_autoencoder(checkpoint: Checkpoint) -> dict[str, Tensor]:
            self.ae, losses = autoencoder.fit(v, settings, checkpoint=checkpoint, progress=self.progress)
            return {"losses": losses, "z": self.encode(theta), "mean": self.standardise.mean, "std": self.standardise.std,
                    **self.ae.state_dict(prefix="net.")}

        # Of the raw vectors: the last bits of v (and of the statistics, kept with it) depend on how many threads there are.
        key = {"theta": tensor_digest(theta), "sizes": self.sizes, "device": device.type, **dataclasses.asdict(settings)}
        stage = (store or Store(None)).stage("autoencoder", key, train_autoencoder, code=(autoencoder, vectors.Standardiser, training))
        self.ae = autoencoder.create(settings, v.shape[1], stage["z"].shape[1])
        self._load(self.ae, stage, device)
        self.ae_losses, self.z = stage["losses"], stage["z"].to(device)
        self.standardise.mean, self.standardise.std = stage["mean"].to(device), stage["std"].to(device)
        return self

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted method depend on, their random numbers apart."""
        parts = {"autoencoder": tensor_digest(self.ae.state_dict()), "z": tensor_digest(self.z), "standardise": tensor_digest(
            {"mean": self.standardise.mean, "std": self.standardise.std})}
        if self.denoiser is not None:
            parts["denoiser"] = tensor_digest(self.denoiser.state_dict())
        return {**parts, **prediction.key(self.diffusion_settings), **dataclasses.asdict(self.sampling),
                **dataclasses.asdict(self.ae_settings)}

    @staticmethod
    def _load(net: torch.nn.Module, stage: dict[str, Tensor], device: torch.device) -> None:
        net.load_state_dict({k.removeprefix("net."): v for k, v in stage.items() if k.startswith("net.")})
        net.to(device).eval()

    @torch.no_grad()
    def encode(self, theta: Float[Tensor, "M D"]) -> Float[Tensor, "M L"]:
        """Latents of raw parameter vectors, which may lie on any device."""
        theta = vectors.vectors(theta, self.standardise.mean.numel(), device=self.device)
        with training.precision(self.device):
            return torch.cat([self.ae.encode(self.standardise(part)) for part in theta.split(CHUNK)])

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Raw parameter vectors of latents, which may lie on any device."""
        with training.precision(self.device):
            return torch.cat([self.standardise.inverse(self.ae.decode(part)) for part in z.to(self.device).split(CHUNK)])

    def sample_latents(self, n: int, generator: torch.Generator | None = None,
                       callback: diffusion.Callback | None = None) -> Float[Tensor, "n L"]:
        """Latents from noise; the callback sees each step's latents as the denoiser does (standardised if it is)."""
        if not hasattr(self, "denoiser"):
            raise ValueError("this PDiff has not seen any checkpoints: call fit(theta) first")
        if self.denoiser is None:
            return gaussian(self.z, n, generator)
        x = diffusion.randn((n, self.z.shape[1]), self.z.device, generator)
        if callback is not None:
            callback(self.schedule.T, x)
        kwargs = {"eta": self.sampling.eta} if self.sampling.sampler == "ddim" else {}
        with training.precision(self.device):
            x = diffusion.SAMPLERS[self.sampling.sampler](
                self.denoiser, x, self.schedule, steps=self.sampling.sampling_steps, generator=generator, callback=callback,
                progress=self.progress, **kwargs)
        return x * self.z_std + self.z_mean

    def sample(self, n: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Float[Tensor, "n D"]:
        """n new raw parameter vectors from noise, all together.

        Args:
            n: how many.
            generator: of the noise; on the CPU it gives the same noise whatever the device.

        Raises:
            ValueError: a condition.
        """
        unconditional(self, condition)
        return self.decode(self.sample_latents(n, generator))

    def trajectory(self, n: int = 5, moments: int = 11, generator: torch.Generator | None = None) -> Trajectory:
        """The reverse process of n networks at evenly spaced moments, from pure noise to the end (Figure 5b).

        Args:
            n: how many networks.
            moments: how many moments, first and last included; at most one per sampling step.
            generator: of the noise.

        Raises:
            ValueError: latents that come from a Gaussian have no way from noise.
        """
        if self.diffusion_settings.latent_model != "diffusion":
            raise ValueError(f"latent_model is {self.diffusion_settings.latent_model!r}: expected 'diffusion' for a trajectory")
        remaining = [*(t + 1 for t in self.schedule.ladder(self.sampling.sampling_steps)), 0]
        chosen = {remaining[round(i * (len(remaining) - 1) / max(moments - 1, 1))] for i in range(moments)}
        t, z = [], []

        def keep(steps_left: int, x: Tensor) -> None:
            if steps_left in chosen:
                t.append(steps_left)
                z.append(x * self.z_std + self.z_mean)

        self.sample_latents(n, generator, keep)
        stack = torch.stack(z)
        theta = self.decode(stack.flatten(0, 1)).unflatten(0, (len(z), n))
        return Trajectory(t, stack, theta)

    @torch.no_grad()
    def diagnose(self, theta: Float[Tensor, "K D"], n: int = 100,
                 generator: torch.Generator | None = None) -> dict[str, float]:
        """Where a failing p-diff fails: reconstruction, scale of the latents, denoising error by noise level.

        Args:
            theta: the checkpoints it was fitted on.
            n: how many latents to generate.
            generator: of the noise.

        Returns:
            `reconstruction_mse` (standardised units: 1 = as bad as the mean), `latent_std`, `generated_latent_std`
            (in the diffusion's own units, where N(0, I) is where it starts), `loss_low_noise`, `loss_mid_noise`,
            `loss_high_noise` (Eq. 6 over the thirds of t; predicting nothing scores 1).
        """
        v = self.standardise(vectors.vectors(theta, device=self.device))
        generated = (self.sample_latents(n, generator) - self.z_mean) / self.z_std
        t = torch.arange(self.schedule.T, device=v.device).repeat(-(-1000 // self.schedule.T))
        z, losses = self.scaled[torch.arange(len(t), device=v.device) % len(self.scaled)], torch.full(t.shape, torch.nan, device=v.device)
        if self.denoiser is not None:
            losses = denoiser.noise_loss(self.denoiser, z, t, diffusion.randn(z.shape, z.device, generator), self.schedule)
        thirds = [losses[(t * 3 // self.schedule.T) == i] for i in range(3)]
        rebuilt = self.standardise(self.decode(self.z))
        return {"reconstruction_mse": float((rebuilt - v).square().mean() / (v - v.mean(0)).square().mean()),
                "latent_std": float(self.scaled.std()), "generated_latent_std": float(generated.std()),
                **{f"loss_{name}_noise": float(x.mean()) if len(x) else float("nan")
                   for name, x in zip(("low", "mid", "high"), thirds)}}
