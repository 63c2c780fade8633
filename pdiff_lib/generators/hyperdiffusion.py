"""HyperDiffusion (Erkoc et al. 2023): diffusion on parameters themselves by a transformer, a token per tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import training, vectors
from pdiff_lib.base.recipe import setting
from pdiff_lib.base.runs import tensor_digest
from pdiff_lib.generators import denoiser, diffusion, learned, targets
from pdiff_lib.generators.flow import Trajectory

CHUNK = 1024  # vectors that are sampled at once: bounds memory


@dataclasses.dataclass(frozen=True)
class Settings(learned.Training):
    """`width`, `blocks` and `heads` of the transformer; `scaling`: "vector" (each number by the mean network, each tensor by its
    standard deviation), "tensor" (each tensor by its own two), or "none" (the authors': vectors as they are); `sampling_steps`: 0
    for all T."""

    steps: int = setting(3000, 1)
    batch: int = setting(32, 1)
    lr: float = setting(2e-4, 0.0)
    weight_decay: float = setting(0.01, 0.0)
    width: int = setting(192, 1)
    blocks: int = setting(4, 1)
    heads: int = setting(4, 1)
    scaling: str = setting("vector", choices=("vector", "tensor", "none"))
    T: int = setting(500, 1)
    beta_1: float = setting(1e-4, 0.0, 1.0)
    beta_T: float = setting(2e-2, 0.0, 1.0)
    sampler: str = setting("ddim", choices=("ddim", "ddpm"))
    sampling_steps: int = setting(0, 0)


class TensorTransformer(nn.Module):
    """Predicts clean vectors: a token per tensor, each with a linear encoder and decoder of its own, and one for t.

    Decoders start at 0, and so does the answer: in standardised units the mean of what is learned from.

    Args:
        sizes: lengths of the tensors in a vector.
        width, blocks, heads: of the transformer.

    Source: the authors' implementation: encoders and decoders without biases, LayerNorm after encoding, learned positions from 0,
    pre-norm blocks with GELU and four times the width inside, LayerNorm before decoding, weights from N(0, 0.02^2). Deviations:
    decoders from 0; the token for t is made from sines of wavelengths as in `denoiser.sinusoidal`, where theirs have 128 frequencies
    up to 2^20 per step.
    """

    def __init__(self, sizes: Sequence[int], width: int, blocks: int, heads: int):
        super().__init__()
        self.sizes = list(sizes)
        self.encoders = nn.ModuleList(nn.Linear(size, width, bias=False) for size in self.sizes)
        self.time = nn.Linear(denoiser.TIME_FEATURES, width, bias=False)
        self.norm, self.positions = nn.LayerNorm(width), nn.Parameter(torch.zeros(len(self.sizes) + 1, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoders = nn.ModuleList(nn.Linear(width, size, bias=False) for size in self.sizes)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and name != "positions":
                nn.init.normal_(parameter, std=0.0 if name.startswith("decoders") else 0.02)

    def forward(self, x: Float[Tensor, "B D"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """x0_theta(x_t, t)."""
        tokens = [encode(part) for encode, part in zip(self.encoders, x.split(self.sizes, dim=1))]
        h = torch.stack([*tokens, self.time(denoiser.sinusoidal(t))], dim=1)
        h = self.transformer(self.norm(h) + self.positions)
        return torch.cat([decode(h[:, i]) for i, decode in enumerate(self.decoders)], dim=1)


class HyperDiffusion(learned.Learned):
    """Diffusion on parameter vectors by a transformer that predicts the clean vector: `fit` on vectors, `sample` new ones.

    Permutations of hidden units are not learned: the authors' networks all start from the first one's weights, which is the caller's
    to arrange; independent ones are brought into one order before (`Coded(HyperDiffusion(...), symmetry.Canonical(...))`).
    From few vectors it learns copies: measure distances.

    Args:
        sizes: lengths of the tensors in a vector, a token each; None: the vector as one tensor.
        device: to train and sample on, and where samples are; None: CUDA when there is one.
        progress: show progress bars.
        settings: of `Settings`, by name; `SIZES` has the authors'.

    Raises:
        ValueError: an unknown setting or a value out of range.

    Source: Erkoc et al. 2023 and the released settings: x0 by mean squared error, T = 500 with variances 1e-4 to 2e-2, AdamW with
    PyTorch's weight decay, DDIM over all steps. "planes" is what they release for shapes (width 2,880; 6,000 epochs, here of 86
    batches, as of 2,749 shapes), "animals" for animations (width 1,440; how many batches its 6,000 epochs have is not verified, so
    that `steps` is left to you). Deviations: by default vectors are standardised; the learning rate follows a cosine where that of
    "planes" falls by a tenth every 200 epochs.
    """

    Settings = Settings
    SAMPLING = ("sampler", "sampling_steps")
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "planes": dict(width=2880, blocks=12, heads=16, batch=32, lr=2e-4, steps=516_000, scaling="none"),
        "animals": dict(width=1440, blocks=12, heads=16, batch=32, lr=5e-5, lr_schedule="constant", scaling="none"),
    }
    CODE = (denoiser, targets, diffusion.Schedule, vectors.Standardiser)

    def __init__(self, sizes: Sequence[int] | None = None, device: str | torch.device | None = None, progress: bool = True, **settings):
        super().__init__(sizes, device, progress, **settings)
        s = self.settings
        if s.width % s.heads:
            raise ValueError(f"width is {s.width}: expected a multiple of heads, {s.heads}")
        self.schedule = diffusion.Schedule(s.T, s.beta_1, s.beta_T)
        self.schedule.ladder(s.sampling_steps)  # refuse more sampling steps than T now, not after training

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        scaling = self.settings.scaling
        self.standardise = vectors.Standardiser(theta, self.sizes, "tensor" if scaling == "none" else scaling)
        if scaling == "none":
            self.standardise.mean, self.standardise.std = torch.zeros_like(theta[0]), torch.ones_like(theta[0])
        self.x = self.standardise(theta)

    def _build(self) -> nn.Module:
        s = self.settings
        return TensorTransformer(self.sizes or (self.numel,), s.width, s.blocks, s.heads)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted generator depend on, their random numbers apart."""
        return {**super().fingerprint, "standardise": tensor_digest({"mean": self.standardise.mean, "std": self.standardise.std})}

    def _loss(self, net: nn.Module, step: int, g: torch.Generator) -> Float[Tensor, ""]:
        batch = self.settings.batch
        x = self.x[torch.randint(len(self.x), (batch,), device=self.device, generator=g)]
        t = torch.randint(self.schedule.T, (batch,), device=self.device, generator=g)
        eps = torch.randn(x.shape, device=self.device, generator=g)
        return (net(self.schedule.add_noise(x, eps, t), t) - x).square().mean()

    def _draw(self, n: int, generator: torch.Generator | None, condition: Tensor | None = None,
              callback: diffusion.Callback | None = None) -> Float[Tensor, "n D"]:
        start = diffusion.randn((n, self.numel), self.device, generator)
        denoise, sampler = targets.from_x0(self.net, self.schedule), diffusion.SAMPLERS[self.settings.sampler]
        if callback is not None:
            callback(self.schedule.T, start)
        x = torch.cat([sampler(denoise, part, self.schedule, steps=self.settings.sampling_steps, generator=generator, callback=callback,
                               progress=self.progress) for part in start.split(CHUNK)])
        return vectors.vectors(self.standardise.inverse(x))  # refuses what is not finite

    def trajectory(self, n: int = 5, moments: int = 11, generator: torch.Generator | None = None) -> Trajectory:
        """The reverse process of n vectors at evenly spaced moments.

        Args:
            n: how many vectors, at most `CHUNK`.
            moments: how many moments, first and last included; at most one per sampling step and the start.
            generator: of the noise.

        Returns:
            t: diffusion steps that remain, from T to 0.

        Raises:
            ValueError: before `fit`, or more vectors than are sampled at once.
        """
        self._fitted()
        if n > CHUNK:
            raise ValueError(f"the trajectory of {n} vectors: expected at most {CHUNK}")
        remaining = [self.schedule.T, *(t + 1 for t in self.schedule.ladder(self.settings.sampling_steps)[1:]), 0]
        chosen = {remaining[round(i * (len(remaining) - 1) / max(moments - 1, 1))] for i in range(moments)}
        t: list[int] = []
        theta: list[Tensor] = []

        def keep(steps_left: int, x: Tensor) -> None:
            if steps_left in chosen:
                t.append(steps_left)
                theta.append(vectors.vectors(self.standardise.inverse(x)))

        with torch.no_grad(), training.precision(self.device):
            self._draw(n, generator, callback=keep)
        return Trajectory(t, torch.stack(theta))
