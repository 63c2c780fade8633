"""Flow matching on parameter vectors (DeepWeightFlow): a velocity that carries noise to networks, and its solvers.

Solvers are free functions with one signature: they take a velocity `velocity(x, t) -> dx/dt`, a start `x` at t = 0 and a number
of equal steps to t = 1, and call `callback(remaining, x)` after each of them with the steps that remain (0 at the end).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib.base import training, vectors
from pdiff_lib.base.recipe import setting
from pdiff_lib.generators import learned
from pdiff_lib.generators.diffusion import Callback, randn

Velocity = Callable[[Float[Tensor, "B D"], Float[Tensor, "B"]], Float[Tensor, "B D"]]

TIME_FEATURES = 64


def euler(velocity: Velocity, x: Float[Tensor, "B D"], steps: int, callback: Callback | None = None,
          progress: bool = False) -> Float[Tensor, "B D"]:
    """The velocity at the start of each step: one evaluation a step, error of order 1/steps."""
    return _integrate(lambda x, t, h: velocity(x, t), x, steps, callback, progress)


def midpoint(velocity: Velocity, x: Float[Tensor, "B D"], steps: int, callback: Callback | None = None,
             progress: bool = False) -> Float[Tensor, "B D"]:
    """The velocity in the middle of each step: two evaluations a step, error of order 1/steps^2."""
    return _integrate(lambda x, t, h: velocity(x + h / 2 * velocity(x, t), t + h / 2), x, steps, callback, progress)


def rk4(velocity: Velocity, x: Float[Tensor, "B D"], steps: int, callback: Callback | None = None,
        progress: bool = False) -> Float[Tensor, "B D"]:
    """The classical method of Runge and Kutta: four evaluations a step, error of order 1/steps^4."""

    def slope(x: Tensor, t: Tensor, h: float) -> Tensor:
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, t + h)
        return (k1 + 2 * k2 + 2 * k3 + k4) / 6

    return _integrate(slope, x, steps, callback, progress)


SOLVERS = {"euler": euler, "midpoint": midpoint, "rk4": rk4}


@torch.no_grad()
def _integrate(slope: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, steps: int, callback: Callback | None,
               progress: bool) -> Tensor:
    if steps < 1:
        raise ValueError(f"{steps} solver steps: expected at least 1")
    for i in tqdm(range(steps), desc="sampling", disable=not progress, mininterval=1.0, leave=False):
        x = x + slope(x, torch.full((len(x),), i / steps, device=x.device, dtype=x.dtype), 1 / steps) / steps
        if callback is not None:
            callback(steps - 1 - i, x)
    return x


class VelocityMLP(nn.Module):
    """v_theta(x_t, t): residual blocks of two linear layers, features of the time added before each, and the input itself, scaled by
    a learned function of the time.

    Without that last term the answer lies in as many dimensions as the network is wide, and in all others the source stays in
    the samples as it is.

    Args:
        numel: D.
        width: of the hidden layers.
        blocks: how many.
    """

    def __init__(self, numel: int, width: int, blocks: int):
        super().__init__()
        self.enter, self.leave, self.gate = nn.Linear(numel, width), nn.Linear(width, numel), nn.Linear(width, 1)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                                                  nn.Linear(width, width)) for _ in range(blocks))

    def forward(self, x: Float[Tensor, "B D"], t: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """v_theta(x_t, t); t from 0 to 1."""
        time, h = self.time(time_features(t)), self.enter(x)
        for block in self.blocks:
            h = h + block(h + time)
        return self.leave(h) + self.gate(nn.functional.silu(time)) * x


def time_features(t: Float[Tensor, "B"], features: int = TIME_FEATURES) -> Float[Tensor, "B F"]:
    """Sines and cosines of t in [0, 1] at wavelengths from 2 pi down to 2 pi / 100."""
    rates = torch.logspace(0, 2, features // 2, device=t.device, dtype=t.dtype)
    angles = t.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Trajectory(NamedTuple):
    """What the flow looked like on its way: S moments of n vectors.

    Attributes:
        t: [S] times, from 0 (the source) to 1 (the generated vector).
        theta: [S n D] raw parameters.
    """

    t: list[float]
    theta: Float[Tensor, "S n D"]


@dataclass(frozen=True)
class Settings(learned.Training):
    """`width`, `blocks`: of the network. `standardise`: learn vectors from which the mean vector is taken, each tensor divided by its
    own standard deviation (`vectors.Standardiser`, "vector"); else raw ones. `source_std`: of the noise at t = 0, in the units of
    what is learned. `coupling`: the noise that a vector is paired with at a visit: "fresh" (new), "pool" (one of as many as there are
    vectors, drawn once) or "fixed" (its own, drawn once). Of sampling, training does not depend on them: `solver`, `solver_steps`, and
    `temperature`, which the noise is multiplied with (below 1: nearer to the centre of what was learned, less diverse)."""

    width: int = setting(768, 1)
    blocks: int = setting(3, 1)
    standardise: bool = True
    source_std: float = setting(1.0, 1e-6)
    coupling: str = setting("fresh", choices=("fresh", "pool", "fixed"))
    solver: str = setting("midpoint", choices=tuple(SOLVERS))
    solver_steps: int = setting(50, 1)
    temperature: float = setting(1.0, 0.0)


class Flow(learned.Learned):
    """Flow matching: learns the velocity x1 - x0 at x_t = (1 - t) x0 + t x1 between noise x0 and vectors x1, and follows it.

    Arguments, attributes and errors as of `learned.Learned`, settings as of `Settings`.

    Source: Lipman et al. 2023, "Flow Matching for Generative Modeling" (conditional, straight paths without noise of their own). For
        networks DeepWeightFlow (Gupta et al. 2026); `SIZES["DeepWeightFlow"]` are its settings for MLPs (`width` 1024 for its
        ResNet-18), in `coded.PCA` coordinates of networks whose hidden units are in one order. It differs: the defaults are for a
        CPU, and for standardised vectors with a source of std 1; the network is another one (`VelocityMLP`; theirs: three hidden
        layers, the middle one half as wide, dropout .1); x_t has no noise of std .001; the last weights sample, not those of the
        batch with the least loss, and nothing stops early.
    """

    Settings = Settings
    SAMPLING = ("solver", "solver_steps", "temperature")
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {"DeepWeightFlow": {
        "steps": 30_000, "batch": 8, "lr": 5e-4, "weight_decay": 1e-5, "width": 512, "standardise": False, "source_std": 0.01,
        "coupling": "pool", "solver": "rk4", "solver_steps": 100}}
    CODE = (vectors.Standardiser,)

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        s, g = self.settings, torch.Generator(self.device)
        self._standardiser = vectors.Standardiser(theta, self.sizes, "vector") if s.standardise else None
        self._x1 = self._standardiser(theta) if s.standardise else theta
        g.manual_seed(training.seed_for(s.generator_seed, self.name, "coupling"))
        self._x0 = None if s.coupling == "fresh" else s.source_std * torch.randn(theta.shape, device=self.device, generator=g)

    def _build(self) -> VelocityMLP:
        return VelocityMLP(self.numel, self.settings.width, self.settings.blocks)

    def _pairs(self, g: torch.Generator) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """x0 and x1 of a batch."""
        s, device = self.settings, self.device
        pick = torch.randint(len(self._x1), (s.batch,), device=device, generator=g)
        if self._x0 is None:
            return s.source_std * torch.randn(s.batch, self.numel, device=device, generator=g), self._x1[pick]
        own = pick if s.coupling == "fixed" else torch.randint(len(self._x0), (s.batch,), device=device, generator=g)
        return self._x0[own], self._x1[pick]

    def _loss(self, net: nn.Module, step: int, g: torch.Generator) -> Float[Tensor, ""]:
        x0, x1 = self._pairs(g)
        t = torch.rand(len(x1), device=self.device, generator=g)
        x_t = torch.lerp(x0, x1, t.unsqueeze(1))
        return (net(x_t, t) - (x1 - x0)).square().mean()  # Lipman et al. 2023, Eq. 23 with sigma_min = 0

    def _draw(self, n: int, generator: torch.Generator | None, condition: Tensor | None = None,
              callback: Callback | None = None) -> Float[Tensor, "n D"]:
        x = self.settings.temperature * self.settings.source_std * randn((n, self.numel), self.device, generator)
        if callback is not None:
            callback(self.settings.solver_steps, x)
        return self._raw(SOLVERS[self.settings.solver](self.net, x, self.settings.solver_steps, callback, self.progress))

    def _raw(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        return vectors.vectors(self._standardiser.inverse(x) if self._standardiser else x)  # refuses what is not finite

    def trajectory(self, n: int = 5, moments: int = 11, generator: torch.Generator | None = None) -> Trajectory:
        """The way of n vectors at evenly spaced moments, from the source to the end.

        Args:
            n: how many vectors.
            moments: how many moments, first and last included; at most one per solver step and the start.
            generator: of the source.

        Raises:
            ValueError: before `fit`.
        """
        self._fitted()
        steps = self.settings.solver_steps
        chosen = {round(i * steps / max(moments - 1, 1)) for i in range(moments)}
        t: list[float] = []
        theta: list[Tensor] = []

        def keep(remaining: int, x: Tensor) -> None:
            if remaining in chosen:
                t.append(1 - remaining / steps)
                theta.append(self._raw(x))

        with training.precision(self.device):
            self._draw(n, generator, callback=keep)
        return Trajectory(t, torch.stack(theta))
