"""What generators that train one network on parameter vectors have in common: the border, the loop, what is kept."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdiff_lib.base import recipe, training, vectors
from pdiff_lib.base.recipe import setting
from pdiff_lib.base.runs import Checkpoint, Store, tensor_digest
from pdiff_lib.generators.methods import unconditional


@dataclasses.dataclass(frozen=True)
class Training(recipe.Section):
    """How the network of a generator is trained: AdamW. `lr_schedule`: "cosine" (to 0) or "constant"; `ema`: the decay of the
    running average of its weights that samples, 0 for none; `generator_seed`: of initial weights, batches and noise."""

    steps: int = setting(3000, 1)
    batch: int = setting(128, 1)
    lr: float = setting(1e-3, 0.0)
    weight_decay: float = setting(0.0, 0.0)
    lr_schedule: str = setting("cosine", choices=("cosine", "constant"))
    ema: float = setting(0.0, 0.0, 1.0)
    generator_seed: int = setting(0, 0)


class Learned:
    """A generator with one trained network: `fit` on parameter vectors, `sample` new ones. Derived classes have

    - `Settings`, a section of settings derived from `Training`, `SAMPLING`, the names of those that sampling alone depends on, and
      `SIZES`, the authors' settings by name;
    - `_prepare(theta)`: learns statistics, keeps what the loss needs; raises what cannot be learned from;
    - `_build()`: the untrained network (global random numbers are seeded);
    - `_loss(net, step, g)`: the loss of a training step; g: random numbers of that step, on the device;
    - `_draw(n, generator, condition)`: n raw vectors of `self.net`, in eval mode, without gradients.

    Args:
        sizes: lengths of the tensors in a vector; None: the vector as one tensor.
        device: to train and sample on, and where samples are; None: CUDA when there is one.
        progress: show progress bars.
        settings: of `Settings`, by name.

    Attributes:
        net: the trained network, in eval mode: the running average of its weights, where there is one.
        losses: [steps].

    Raises:
        ValueError: an unknown setting or a value out of range.
    """

    conditional = False
    Settings: ClassVar[type[Training]] = Training
    SAMPLING: ClassVar[Collection[str]] = ()
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {}
    CODE: ClassVar[tuple[Any, ...]] = ()  # what training and sampling depend on, beside the class's own module

    def __init__(self, sizes: Sequence[int] | None = None, device: str | torch.device | None = None, progress: bool = True, **settings):
        self.sizes, self.progress, self.device = None if sizes is None else tuple(sizes), progress, training.device_of(device)
        (self.settings,) = recipe.split(settings, self.Settings)

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        raise NotImplementedError

    def _build(self) -> nn.Module:
        raise NotImplementedError

    def _loss(self, net: nn.Module, step: int, g: torch.Generator) -> Float[Tensor, ""]:
        raise NotImplementedError

    def _draw(self, n: int, generator: torch.Generator | None, condition: Tensor | None) -> Float[Tensor, "n D"]:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Of its stage and its progress bar."""
        return type(self).__name__

    def fit(self, theta: Float[vectors.Array, "K D"], store: Store | None = None, condition: Tensor | None = None) -> Learned:
        """Train the network.

        Args:
            theta: raw parameter vectors, at least two different ones.
            store: keeps the stage and lets a killed training resume; None keeps nothing.
            condition: [K C], where the generator takes one.

        Raises:
            ValueError: what `vectors.vectors` refuses, vectors that are all the same, `sizes` that do not add up to D, or a
                condition that the generator does not take.
        """
        if not self.conditional:
            unconditional(self, condition)
        theta = vectors.vectors(theta, at_least=2, device=self.device)
        vectors.distinct(theta)
        if self.sizes is not None and sum(self.sizes) != theta.shape[1]:
            raise ValueError(f"sizes add up to {sum(self.sizes)}: expected {theta.shape[1]}, the length of the vectors")
        self.condition = None if condition is None else vectors.vectors(condition, device=self.device)
        if self.condition is not None and len(self.condition) != len(theta):
            raise ValueError(f"the condition has {len(self.condition)} rows: expected one per vector, {len(theta)}")
        self.numel, self.theta_digest = theta.shape[1], tensor_digest(theta)
        self._prepare(theta)
        with training.seeded(training.seed_for(self.settings.generator_seed, self.name)):
            net = self._build().to(self.device)
        stage = (store or Store(None)).stage(self.name, self._key(theta), lambda checkpoint: self._train(net, checkpoint), code=self.code)
        self.losses = stage["losses"]
        net.load_state_dict({k.removeprefix("net."): v for k, v in stage.items() if k.startswith("net.")})
        self.net = net.eval().requires_grad_(False)
        return self

    @property
    def code(self) -> tuple[Any, ...]:
        """What training and sampling depend on: modules, classes."""
        return sys.modules[type(self).__module__], sys.modules[__name__], training, *self.CODE

    def _key(self, theta: Float[Tensor, "K D"]) -> dict[str, Any]:
        more = {} if self.condition is None else {"condition": tensor_digest(self.condition)}
        return {"theta": self.theta_digest, "sizes": self.sizes, "device": self.device.type, **more,
                **{name: value for name, value in dataclasses.asdict(self.settings).items() if name not in self.SAMPLING}}

    def _train(self, net: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
        s = self.settings
        optimizer = torch.optim.AdamW(net.parameters(), s.lr, weight_decay=s.weight_decay)
        average = copy.deepcopy(net).requires_grad_(False)
        kept = {f"average.{k}": v for k, v in average.state_dict().items()} if s.ema else {}
        g = torch.Generator(self.device)

        def loss_at(i: int) -> Tensor:
            g.manual_seed(training.seed_for(s.generator_seed, self.name, i))
            return self._loss(net, i, g)

        def after(i: int) -> None:  # a slow average of few steps is mostly their start: warmed up, (1 + i) / (10 + i)
            with torch.no_grad():
                for old, new in zip(average.state_dict().values(), net.state_dict().values()):
                    if old.is_floating_point():
                        old.lerp_(new, 1 - min(s.ema, (1 + i) / (10 + i)))
                    else:
                        old.copy_(new)

        losses = training.loop(loss_at, s.steps, {"net": net.train()}, optimizer, schedule=s.lr_schedule, after=after if s.ema else None,
                               buffers=kept, checkpoint=checkpoint, desc=self.name, progress=self.progress, tf32=True)
        return {"losses": losses, **(average if s.ema else net).state_dict(prefix="net.")}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted generator depend on, their random numbers apart."""
        self._fitted()
        return {"net": tensor_digest(self.net.state_dict()), "theta": self.theta_digest, "sizes": self.sizes, **dataclasses.asdict(self.settings)}

    def _fitted(self) -> None:
        if not hasattr(self, "net"):
            raise ValueError(f"this {type(self).__name__} has not seen any vectors: call fit(theta) first")

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Float[Tensor, "n D"]:
        """n new raw parameter vectors.

        Args:
            n: how many.
            generator: of the random numbers; on the CPU it gives the same ones whatever the device.
            condition: [n C], where the generator takes one.

        Raises:
            ValueError: before `fit`, or a condition that it does not take.
        """
        self._fitted()
        if not self.conditional:
            unconditional(self, condition)
        with training.precision(self.device):
            return self._draw(n, generator, condition)
