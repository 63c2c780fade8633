"""G.pt: from a network, its loss and the loss that is asked for to parameters that are to have it, learned from training paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import vectors
from pdiff_lib.base.recipe import setting
from pdiff_lib.base.runs import Store, tensor_digest
from pdiff_lib.base.vectors import Array
from pdiff_lib.generators import diffusion, learned, targets, tokens

FREQUENCIES, OCTAVES = 128, 14  # of a scalar's features: 2^0 to 2^14
STD = 0.538  # of the scaled parameters, over all numbers
AT_ONCE = 1024  # rows per pass through the transformer at sampling: bounds memory
RUNS = 1 << 24  # from here on float32, in which a condition comes, does not tell whole numbers apart


@dataclass(frozen=True)
class Settings(learned.Training):
    """Of G.pt, at a size for one core and networks of about a thousand parameters. `token_length`: parameters per token;
    `sampling_steps`: 0 = all T; few steps leave samples narrower than they should be, those of DDIM less so."""

    steps: int = setting(3000, 1)
    batch: int = setting(64, 1)
    weight_decay: float = setting(0.1, 0.0)
    ema: float = setting(0.999, 0.0, 1.0)
    token_length: int = setting(100, 1)
    width: int = setting(128, 1)
    layers: int = setting(3, 1)
    heads: int = setting(4, 1)
    T: int = setting(1000, 1)
    sampler: str = setting("ddim", choices=tuple(diffusion.SAMPLERS))
    sampling_steps: int = setting(50, 0)


class Moments(NamedTuple):
    """What a generator's own output led to, step by step.

    Attributes:
        theta: [S n D] raw parameter vectors, the start first.
        loss: [S n], as they were measured.
    """

    theta: Float[Tensor, "S n D"]
    loss: Float[Tensor, "S n"]


def features(x: Float[Tensor, "B S"]) -> Float[Tensor, "B S F"]:
    """Sines and cosines of scalars at frequencies 2^0 to 2^14, and the scalars themselves: F = 257 numbers for each."""
    x = x.double().unsqueeze(2)  # float32 has no decimals left at 2^14 times t = 999
    angles = x * 2 ** torch.linspace(0, OCTAVES, FREQUENCIES, dtype=torch.float64, device=x.device)
    return torch.cat([angles.sin(), angles.cos(), x], dim=2).float()


def pairs(moments: Int64[Tensor, "R"], n: int, generator: torch.Generator
          ) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"], Int64[Tensor, "n"]]:
    """n random pairs of moments: a uniform run, a uniform spacing from 1 to S-1 within it, then a uniform start.

    Args:
        moments: S, how many each of R runs has; at least two.
        n: how many pairs.
        generator: on the same device.

    Returns:
        The run (0 to R-1), the earlier moment and the later one (0 to S-1).
    """
    def below(bound: Tensor) -> Tensor:
        return (torch.rand(n, dtype=torch.float64, generator=generator, device=moments.device) * bound).long()

    run = below(torch.full_like(moments[:1], len(moments)))
    spacing = 1 + below(moments[run] - 1)
    first = below(moments[run] - spacing)
    return run, first, first + spacing


def orders(groups: Sequence[Int64[Tensor, "_ _"]], numel: int, n: int, generator: torch.Generator) -> Int64[Tensor, "n D"]:
    """n random orders of hidden units, as places: `theta.gather(1, orders)` are the same functions as `theta [n D]`.

    Args:
        groups: a tensor [units numbers] per layer of hidden units: which places belong to which unit.
        numel: D.
        n: how many.
        generator: on the device of the groups.
    """
    places = torch.arange(numel, device=generator.device).repeat(n, 1)
    for positions in groups:
        order = torch.rand(n, len(positions), generator=generator, device=generator.device).argsort(dim=1)
        places[:, positions.flatten()] = places.gather(1, positions[order].flatten(1))
    return places


class Transformer(nn.Module):
    """Predicts clean parameters from noised ones, the current ones, the diffusion step and three losses.

    Tokens: the noised parameters', the current ones', then t, the loss difference (asked - current), the asked loss and the
    current one. Each token has a linear encoder of its own, each of the noised ones a linear decoder of its own; the answer is
    the current parameters plus what is decoded, which is 0 before training.

    Args:
        cut: how a vector is cut into tokens.
        width, layers, heads: of the transformer (pre-norm, GELU, hidden layers of 4 width, no dropout).

    Source: Peebles et al. 2022, Section 3, and the authors' implementation: one layer norm over all encoded tokens, learned
        positions from 0, no biases in encoders and decoders, weights from N(0, 0.02^2).
    """

    def __init__(self, cut: tokens.Tokens, width: int, layers: int, heads: int):
        super().__init__()
        self.cut, (n, length) = cut, cut.positions.shape
        self.encoders = nn.Parameter(torch.empty(2 * n, length, width))
        self.scalars = nn.Parameter(torch.empty(4, 2 * FREQUENCIES + 1, width))
        self.norm, self.positions = nn.LayerNorm(width), nn.Parameter(torch.zeros(2 * n + 4, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoders = nn.Parameter(torch.zeros(n, width, length))
        for weight in (self.encoders, self.scalars, *(p for p in self.blocks.parameters() if p.ndim > 1)):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Float[Tensor, "B D"], t: Int64[Tensor, "B"], start: Float[Tensor, "B D"], start_loss: Float[Tensor, "B"],
                asked_loss: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """The clean parameters, scaled as x and start are."""
        parameters = torch.cat([self.cut.encode(x), self.cut.encode(start)], dim=1)
        scalars = features(torch.stack([t.to(x.dtype), asked_loss - start_loss, asked_loss, start_loss], dim=1))
        encoded = torch.cat([torch.einsum("bnl,nlw->bnw", parameters, self.encoders),
                             torch.einsum("bsf,sfw->bsw", scalars, self.scalars)], dim=1)
        h = self.blocks(self.norm(encoded) + self.positions)
        return start + self.cut.decode(torch.einsum("bnw,nwl->bnl", h[:, :len(self.cut)], self.decoders))


class GPT(learned.Learned):
    """Learns from training paths; gives, for a network and its loss, one that is to have the loss that is asked for.

    `fit(theta, condition=...)` takes `theta [K D]`, the moments of all runs (in the memory of the device), and `condition [K 2]`:
    the run that each is of, a whole number, and its loss there. Rows of one run are in the order of time, and at least two. A
    training pair is two moments of one run, the later one the target (`pairs`). `sample(n, condition=...)` takes
    `condition [n D+2]`: parameters to start from, raw, their loss and the asked one. `fit_paths` and `step` put them together.

    Losses enter as they are. What they are measured on is what can be asked for: validation items, not test items.

    Args:
        sizes: lengths of the tensors in a vector, which are cut into tokens one by one; None: the vector as one tensor.
        device, progress: as in `Learned`.
        groups: a tensor [units numbers] per layer of hidden units, such as `symmetry.groups` gives: both members of a pair are
            shown in the same random order of units. None: as they are.
        settings: of `Settings`, by name; `SIZES` are the authors' for MNIST (MLP 784-10-10) and CIFAR-10 (a CNN of 5,370 numbers).

    Raises:
        ValueError: an unknown setting, a value out of range, or settings that do not go together.

    Source: Peebles et al. 2022, "Learning to Learn with Generative Models of Neural Network Checkpoints", and the authors'
        implementation, which measures losses on test items. It has besides: warm-up, clipped gradients, no weight decay on
        biases, norms and positions. It samples with the variance beta, here it is the posterior's.
    """

    conditional = True
    Settings = Settings
    SAMPLING = ("sampler", "sampling_steps")
    SIZES = {  # steps: the authors' epochs, each of as many pairs as they take from their runs
        "mnist": {"token_length": 1000, "width": 1536, "layers": 12, "heads": 16, "steps": 178_000, "batch": 1024, "lr": 4e-4,
                  "weight_decay": 0.1, "ema": 0.9999, "sampler": "ddpm", "sampling_steps": 0},
        "cifar10": {"token_length": 576, "width": 2048, "layers": 12, "heads": 16, "steps": 1_485_000, "batch": 550, "lr": 4e-4,
                    "weight_decay": 0.1, "ema": 0.9999, "sampler": "ddpm", "sampling_steps": 0}}
    CODE = (tokens, diffusion)

    def __init__(self, sizes: Sequence[int] | None = None, device: str | torch.device | None = None, progress: bool = True, *,
                 groups: Sequence[Int64[Tensor, "_ _"]] | None = None, **settings):
        super().__init__(sizes, device, progress, **settings)
        self.groups, s = tuple(g.to(self.device) for g in groups or ()), self.settings
        if s.width % s.heads:
            raise ValueError(f"width is {s.width} with {s.heads} heads: expected a multiple of heads")
        self.schedule = diffusion.Schedule(s.T)
        self.schedule.ladder(s.sampling_steps)  # refuses more than there are

    def fit_paths(self, theta: Float[Array, "R S D"], loss: Float[Array, "R S"], store: Store | None = None) -> GPT:
        """`fit` on R runs at S moments each, in the order of time; `store` as there.

        Raises:
            ValueError: shapes other than these, or what `fit` refuses.
        """
        if theta.ndim != 3 or tuple(loss.shape) != tuple(theta.shape[:2]):
            raise ValueError(f"theta {list(theta.shape)} and loss {list(loss.shape)}: expected [R S D] and [R S]")
        loss = torch.as_tensor(loss, dtype=torch.float32)
        run = torch.arange(len(loss), dtype=torch.float32, device=loss.device)[:, None].expand_as(loss)
        return self.fit(theta.reshape(-1, theta.shape[2]), store, torch.stack([run, loss], dim=2).reshape(-1, 2))

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        if self.condition is None or self.condition.shape[1] != 2:
            raise ValueError(f"condition is {_shape(self.condition)}: expected [{len(theta)}, 2], the run and the loss of each vector")
        run = self.condition[:, 0]
        if bool(((run != run.round()) | (run.abs() >= RUNS)).any()):
            raise ValueError(f"runs from {float(run.min()):g} to {float(run.max()):g}: expected whole numbers between -{RUNS} and {RUNS}")
        names, of, self.moments = run.unique(return_inverse=True, return_counts=True)
        if int(self.moments.min()) < 2:
            raise ValueError(f"run {int(names[self.moments.argmin()])} has 1 moment: expected at least two of each run")
        self.rows = of.argsort(stable=True)  # run after run, each in the order of time
        self.begins = self.moments.cumsum(0) - self.moments
        for g in self.groups:
            if g.ndim != 2 or g.min() < 0 or g.max() >= self.numel or len(g.unique()) != g.numel():
                raise ValueError(f"a group of shape {list(g.shape)}: expected places from 0 to {self.numel - 1}, each at most once")
        self.theta, self.scale = theta, STD / float(theta.std())

    def _key(self, theta: Float[Tensor, "K D"]) -> dict[str, Any]:
        return {**super()._key(theta), "groups": [tensor_digest(g) for g in self.groups]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted generator depend on, their random numbers apart."""
        return {**super().fingerprint, "scale": self.scale}

    def _build(self) -> Transformer:
        s = self.settings
        return Transformer(tokens.Tokens.cut(self.sizes or (self.numel,), s.token_length), s.width, s.layers, s.heads)

    def _loss(self, net: nn.Module, step: int, g: torch.Generator) -> Float[Tensor, ""]:
        batch = self.settings.batch
        run, *both = pairs(self.moments, batch, g)
        first, later = (self.rows[self.begins[run] + moment] for moment in both)
        start, target = self.scale * self.theta[first], self.scale * self.theta[later]
        if self.groups:
            places = orders(self.groups, self.numel, batch, g)
            start, target = start.gather(1, places), target.gather(1, places)
        t = torch.randint(self.schedule.T, (batch,), generator=g, device=self.device)
        eps = torch.randn(target.shape, generator=g, device=self.device)
        loss = self.condition[:, 1]
        return (net(self.schedule.add_noise(target, eps, t), t, start, loss[first], loss[later]) - target).square().mean()

    def _draw(self, n: int, generator: torch.Generator | None, condition: Tensor | None) -> Float[Tensor, "n D"]:
        if condition is None or list(condition.shape) != [n, self.numel + 2]:
            raise ValueError(f"condition is {_shape(condition)}: expected [{n}, {self.numel + 2}], parameters to start from, their loss "
                             "and the asked loss")
        return torch.cat([self._chain(part, generator) for part in vectors.vectors(condition, device=self.device).split(AT_ONCE)])

    def _chain(self, condition: Float[Tensor, "n C"], generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        start, (start_loss, asked_loss), s = self.scale * condition[:, :-2], condition[:, -2:].T, self.settings
        denoise = targets.from_x0(lambda x, t: self.net(x, t, start, start_loss, asked_loss), self.schedule)
        x = diffusion.randn(start.shape, start.device, generator)
        return diffusion.SAMPLERS[s.sampler](denoise, x, self.schedule, steps=s.sampling_steps, generator=generator,
                                             progress=self.progress) / self.scale

    def step(self, start: Float[Array, "n D"], start_loss: Float[Array, "n"] | float, asked_loss: Float[Array, "n"] | float,
             generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """One step from each network: parameters that are to have the asked loss.

        Args:
            start: raw parameter vectors, of any networks.
            start_loss: their losses, measured as those in `fit`; one number: of all.
            asked_loss: the losses that are wanted.
            generator: of the random numbers.

        Raises:
            ValueError: before `fit`, vectors of another length, not as many losses as vectors, or NaN or infinity among them.
        """
        self._fitted()
        start = vectors.vectors(start, self.numel, device=self.device)
        losses = [_each(name, loss, start) for name, loss in (("start_loss", start_loss), ("asked_loss", asked_loss))]
        return self.sample(len(start), generator, torch.cat([start, torch.stack(losses, dim=1)], dim=1))

    def recurse(self, start: Float[Array, "n D"], loss_of: Callable[[Float[Tensor, "n D"]], Float[Array, "n"]],
                asked_loss: Float[Array, "n"] | float, times: int, generator: torch.Generator | None = None) -> Moments:
        """Several steps, each from what the one before it gave and from the loss that this was measured to have.

        Args:
            start: raw parameter vectors.
            loss_of: measures raw vectors as the losses in `fit` were measured.
            asked_loss, generator: as in `step`.
            times: how many steps.

        Raises:
            ValueError: fewer than one step, what `step` refuses, or what was measured is not n finite losses.
        """
        if times < 1:
            raise ValueError(f"times is {times}: expected at least 1")
        self._fitted()
        theta, loss = [vectors.vectors(start, self.numel, device=self.device)], []
        for i in range(times + 1):
            if i:
                theta.append(self.step(theta[-1], loss[-1], asked_loss, generator))
            loss.append(_each("what loss_of gave", torch.as_tensor(loss_of(theta[-1])).reshape(-1), theta[-1]))
        return Moments(torch.stack(theta), torch.stack(loss))


def _shape(x: Tensor | None) -> list[int] | None:
    return None if x is None else list(x.shape)


def _each(name: str, loss: Float[Array, "_"] | float, theta: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
    """One finite loss for each vector, beside them."""
    loss = torch.as_tensor(loss).to(theta)
    if loss.ndim > 1 or loss.ndim == 1 and len(loss) != len(theta) or not bool(torch.isfinite(loss).all()):
        raise ValueError(f"{name} has shape {list(loss.shape)}, {int((~torch.isfinite(loss)).sum())} of them NaN or infinite: expected "
                         f"[{len(theta)}] finite losses, or one for all")
    return loss.detach().expand(len(theta))
