"""Recurrent parameter generation (Wang et al. 2025): a recurrence gives a prototype per token, a diffusion the token."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import training, vectors
from pdiff_lib.base.recipe import setting
from pdiff_lib.base.runs import tensor_digest
from pdiff_lib.generators import denoiser, diffusion, learned, tokens

ACTIVATIONS = 1 << 26  # numbers in a layer of the denoiser that are sampled at once: bounds memory
MAMBA_HEAD = 64  # numbers per head of Mamba-2; its inner width, twice the outer one, is a multiple of it


@dataclasses.dataclass(frozen=True)
class Settings(learned.Training):
    """`token_length`: numbers per token; `width`: of the recurrence and of the prototypes, `layers` of it; `recurrence`: "gru", or
    "mamba2" (the authors') where the package mamba_ssm is installed, with a state of `mamba_state`; `denoiser_channels`: between
    the one channel of input and output; `diffusion_tokens`: how many tokens of a batch are denoised in a training step, drawn
    without replacement, 0 for all; `sampling_steps`: 0 for all T; `prototype_only`: the control without diffusion."""

    steps: int = setting(2000, 1)
    batch: int = setting(8, 1)
    token_length: int = setting(64, 1)
    width: int = setting(128, 4)
    layers: int = setting(2, 1)
    recurrence: str = setting("gru", choices=("gru", "mamba2"))
    mamba_state: int = setting(32, 1)
    denoiser_channels: tuple[int, ...] = setting((32, 64, 128, 64, 32), 1)
    T: int = setting(1000, 1)
    beta_1: float = setting(1e-4, 0.0, 1.0)
    beta_T: float = setting(2e-2, 0.0, 1.0)
    diffusion_tokens: int = setting(0, 0)
    prototype_only: bool = False
    sampler: str = setting("ddpm", choices=("ddpm", "ddim"))
    sampling_steps: int = setting(100, 0)


class Prototypes(nn.Module):
    """A vector per token of the network with some index, from a recurrence over where tokens stand.

    It sees positions and the index, never a parameter: what it can know of a network is what training put into the index's row.

    Args:
        cut: where tokens stand.
        count: K, how many indices ("permutation states") there are.
        settings: `width`, `layers`, `recurrence`, `mamba_state`.
    """

    def __init__(self, cut: tokens.Tokens, count: int, settings: Settings):
        super().__init__()
        half = settings.width // 2
        positions = torch.cat([denoiser.sinusoidal(cut.tensor, half), denoiser.sinusoidal(cut.within, half)], dim=1)
        self.register_buffer("positions", positions, persistent=False)
        self.index = nn.Embedding(count, settings.width)
        nn.init.constant_(self.index.weight, 1 / settings.width)  # all alike, as the authors start
        if settings.recurrence == "mamba2":
            from mamba_ssm import Mamba2  # runs on CUDA alone, and takes minutes to install

            self.recurrence = nn.Sequential(*(Mamba2(settings.width, d_state=settings.mamba_state, d_conv=4, expand=2,
                                                     headdim=MAMBA_HEAD) for _ in range(settings.layers)))
        else:
            self.recurrence = nn.GRU(settings.width, settings.width, settings.layers, batch_first=True)

    def forward(self, index: Int64[Tensor, "B"]) -> Float[Tensor, "B N W"]:
        """Prototypes of the networks with these indices."""
        h = self.recurrence(self.positions + self.index(index).unsqueeze(1))
        return h[0] if isinstance(self.recurrence, nn.GRU) else h


class TokenDenoiser(denoiser.Denoiser):
    """Predicts the noise in a token, given its prototype: p-diff's convolutions over the length of a token.

    Padding is 0 before every convolution: what stands there changes nothing, and a token is denoised as if it ended where its
    numbers do.

    Args:
        length: L, of a token.
        width: of a prototype.
        channels: as of `denoiser.Denoiser`.

    Source: the authors' implementation: the input of every convolution is (h + prototype) * time, each mapped to length L.
    """

    def __init__(self, length: int, width: int, channels: Sequence[int]):
        super().__init__(length, channels)
        self.prototype = nn.Linear(width, length)

    def forward(self, x: Float[Tensor, "B L"], t: Int64[Tensor, "B"], prototype: Float[Tensor, "B W"],
                mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """eps_theta(x_t, t, prototype); mask: where the token holds numbers."""
        time, c, mask = (v.unsqueeze(1) for v in (self.time(denoiser.sinusoidal(t)), self.prototype(prototype), mask))
        h, skips, depth = x.unsqueeze(1), [], len(self.norms)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            h = F.elu(norm(conv(((h + c) * time).where(mask, 0.0))))
            if i < depth // 2:
                skips.append(h)
            elif i > depth // 2 or depth % 2 == 0:
                h = h + skips.pop()
        return self.convs[-1](((h + c) * time).where(mask, 0.0)).squeeze(1)


class RPG(learned.Learned):
    """Recurrent parameter generation: `fit` on checkpoints, `sample` new parameters.

    A sample is made **for a training checkpoint**: its index is drawn at random, as the authors do, the recurrence turns it into
    prototypes, and the diffusion turns each prototype into a token. How far samples are from the checkpoint that they were drawn
    for is `sample_of(index)` against it. With `prototype_only` a prototype is mapped linearly to its token by squared error: a
    lookup table by index, which can give nothing but the checkpoints it has seen; whatever RPG does better is the diffusion's.

    Tensors are standardised one by one (`vectors.Standardiser`); the logarithm of running variances is the caller's.

    Args:
        sizes: lengths of the tensors in a vector, which tokens do not cross; None: the vector as one tensor.
        device: to train and sample on, and where samples are; None: CUDA when there is one.
        progress: show progress bars.
        settings: of `Settings`, by name; `SIZES` has the authors'.

    Attributes:
        tokens: how a vector is cut, once fitted.

    Raises:
        ValueError: an unknown setting or a value out of range, or a recurrence that is not installed.

    Source: Wang et al. 2025 and the released settings (`SIZES`). Here by default: a GRU in place of Mamba-2, 100 sampling steps
    of 1000. Not verified: how the released layers of Mamba-2 are joined (here one follows the other), and whether the tokens of a
    step are drawn as `diffusion_tokens` does. In their own control without diffusion a prototype is the token, without a linear map.
    """

    Settings = Settings
    SAMPLING = ("sampler", "sampling_steps")
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "ResNet-18": dict(token_length=8192, width=8192, recurrence="mamba2", mamba_state=128, diffusion_tokens=1024, batch=8,
                          steps=80_000, lr=3e-5, sampling_steps=0),
        "small CNN": dict(token_length=256, width=256, recurrence="mamba2", mamba_state=32, batch=8, steps=30_000, lr=1e-4,
                          sampling_steps=0),
    }
    CODE = (denoiser, tokens, diffusion.Schedule, vectors.Standardiser)

    def __init__(self, sizes: Sequence[int] | None = None, device: str | torch.device | None = None, progress: bool = True, **settings):
        super().__init__(sizes, device, progress, **settings)
        s = self.settings
        if s.width % 4:
            raise ValueError(f"width is {s.width}: expected a multiple of 4, sines and cosines of two coordinates")
        self.schedule = diffusion.Schedule(s.T, s.beta_1, s.beta_T)
        self.schedule.ladder(s.sampling_steps)  # refuse what cannot be sampled or built now, not after training
        denoiser.Denoiser(1, s.denoiser_channels)
        if s.recurrence == "mamba2":
            self._check_mamba()

    def _check_mamba(self) -> None:
        if importlib.util.find_spec("mamba_ssm") is None:
            raise ValueError("recurrence is 'mamba2': expected the package mamba_ssm, which is not installed (pip install "
                             "'mamba-ssm[causal-conv1d]' --no-build-isolation, beside a CUDA compiler), or recurrence='gru'")
        if self.device.type != "cuda":
            raise ValueError(f"recurrence is 'mamba2' on device {self.device.type!r}: expected 'cuda', or recurrence='gru'")
        if 2 * self.settings.width % MAMBA_HEAD:
            raise ValueError(f"width is {self.settings.width}: expected a multiple of {MAMBA_HEAD // 2} for recurrence 'mamba2'")

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        self.standardise = vectors.Standardiser(theta, self.sizes)
        self.tokens = tokens.Tokens.cut(self.sizes or (theta.shape[1],), self.settings.token_length)
        self.x, self.mask = self.tokens.encode(self.standardise(theta)), self.tokens.mask.to(self.device)

    def _build(self) -> nn.Module:
        s = self.settings
        answer = (nn.Linear(s.width, s.token_length) if s.prototype_only
                  else TokenDenoiser(s.token_length, s.width, s.denoiser_channels))
        return nn.ModuleDict({"prototypes": Prototypes(self.tokens, len(self.x), s), "answer": answer})

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted generator depend on, their random numbers apart."""
        return {**super().fingerprint, "standardise": tensor_digest({"mean": self.standardise.mean, "std": self.standardise.std})}

    def _loss(self, net: nn.Module, step: int, g: torch.Generator) -> Float[Tensor, ""]:
        s, device = self.settings, self.device
        index = torch.randint(len(self.x), (s.batch,), device=device, generator=g)
        x, c = self.x[index].flatten(0, 1), net["prototypes"](index).flatten(0, 1)
        mask = self.mask.repeat(s.batch, 1)
        if s.diffusion_tokens:
            pick = torch.randperm(len(x), device=device, generator=g)[:s.diffusion_tokens]
            x, c, mask = x[pick], c[pick], mask[pick]
        if s.prototype_only:
            error = net["answer"](c) - x
        else:
            t = torch.randint(self.schedule.T, (len(x),), device=device, generator=g)
            eps = torch.randn(x.shape, device=device, generator=g)
            error = net["answer"](self.schedule.add_noise(x, eps, t), t, c, mask) - eps  # Ho et al. 2020, Eq. 14
        return error.square().where(mask, 0.0).sum() / mask.sum()

    def _draw(self, n: int, generator: torch.Generator | None, condition: Tensor | None) -> Float[Tensor, "n D"]:
        index = torch.randint(len(self.x), (n,), device=generator.device if generator else self.device, generator=generator)
        return self._tokens_of(index.to(self.device), generator)

    @torch.no_grad()
    def sample_of(self, index: Int64[Tensor, "n"], generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """New raw parameter vectors for given training checkpoints.

        Args:
            index: rows of the `theta` that it was fitted on, from 0.
            generator: of the noise; on the CPU it gives the same whatever the device.

        Raises:
            ValueError: before `fit`, or an index that is none.
        """
        self._fitted()
        bad = index[(index < 0) | (index >= len(self.x))]
        if len(bad):
            raise ValueError(f"index {int(bad[0])}: expected 0 to {len(self.x) - 1}, a row of the vectors it was fitted on")
        with training.precision(self.device):
            return self._tokens_of(index.to(self.device), generator)

    def _tokens_of(self, index: Int64[Tensor, "n"], generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        c, s = self.net["prototypes"](index).flatten(0, 1), self.settings
        if s.prototype_only:
            x = self.net["answer"](c)
        else:
            x = diffusion.randn((len(c), s.token_length), self.device, generator)
            size = max(1, ACTIVATIONS // (s.token_length * max(s.denoiser_channels)))
            parts = zip(x.split(size), c.split(size), self.mask.repeat(len(index), 1).split(size))
            x = torch.cat([self._denoised(*part, generator) for part in parts])
        theta = self.standardise.inverse(self.tokens.decode(x.unflatten(0, (len(index), -1))))
        return vectors.vectors(theta)  # refuses what is not finite

    def _denoised(self, x: Float[Tensor, "B L"], c: Float[Tensor, "B W"], mask: Bool[Tensor, "B L"],
                  generator: torch.Generator | None) -> Float[Tensor, "B L"]:
        return diffusion.SAMPLERS[self.settings.sampler](
            lambda x, t: self.net["answer"](x, t, c, mask), x, self.schedule, steps=self.settings.sampling_steps, generator=generator,
            progress=self.progress)
