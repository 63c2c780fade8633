"""The task: what a network is trained for and judged by. A new one is a class in one file, and its name in a recipe."""

from __future__ import annotations

import inspect
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib.base import own, recipe, training, vectors
from pdiff_lib.base.runs import Store, tensor_digest
from pdiff_lib.base.score import Score
from pdiff_lib.networks.modes import evaluating
from pdiff_lib.networks.subset import Subset
from pdiff_lib.tasks import order

TASKS = {name: f"pdiff_lib.tasks.{name}:{name.title().replace('_', '')}" for name in
         ("classification", "regression", "fields", "detection", "segmentation", "image_generation")}
AT_ONCE, NUMBERS_AT_ONCE = 64, 2**26  # vectors that share one vmap, at most; and their outputs and parameters together
BatchOf = Callable[[int, slice], tuple[Tensor, Tensor]]
Predictor = Callable[[Tensor], Tensor]


class Judged(NamedTuple):
    """What M networks are worth.

    Attributes:
        score: [M], in float64; NaN where outputs that are not finite leave none.
        wrong: [M N] which of N items (images, rows, objects to be found) each of them gets wrong: what Eq. 7 compares. None
            where "wrong" has no meaning for the task.
    """

    score: Float[Tensor, "M"]
    wrong: Bool[Tensor, "M N"] | None


class Task(ABC):
    """What networks are trained for and judged by, on data that it holds.

    A task of your own sets `score`, `name` and the four tensors in `__init__(data)`, which gets the recipe's section `Data`, and
    has `network`, `criterion` and `judged`. The rest has defaults for items that fit into memory and pass through the network
    as they are: override what the task does otherwise (`batches` for augmentation, `predictor` for another way to evaluate).

    Attributes:
        score: what `judged` gives.
        relative: whether "wrong" is measured by what the originals give.
        name: of its data, for titles ("diabetes").
        x_train, y_train: items to learn from, and what is wanted of them; [items ...].
        x_test, y_test: those to be judged on.
    """

    score: Score
    relative: bool = False
    name: str
    x_train: Shaped[Tensor, "n ..."]
    y_train: Shaped[Tensor, "n ..."]
    x_test: Shaped[Tensor, "N ..."]
    y_test: Shaped[Tensor, "N ..."]

    @abstractmethod
    def __init__(self, data: recipe.Data):
        """Load the data; whatever is wrong with it is said here (`ValueError`)."""

    @abstractmethod
    def network(self, base: recipe.Base) -> nn.Module:
        """The network that a recipe names, not trained; initial weights from `base.seed` alone. Raises `ValueError`: one that the
        task does not know, or that does not take its items."""

    @abstractmethod
    def criterion(self, outputs: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
        """The loss of one batch, the mean over its items."""

    @abstractmethod
    def judged(self, outputs: Shaped[Tensor, "M N ..."], originals: Shaped[Tensor, "K N ..."] | None = None,
               items: Tensor | None = None) -> Judged:
        """Score M networks by what `predictor` says they give.

        Args:
            outputs: of the networks, for each test item.
            originals: those of the originals, where `relative`.
            items: [n] indices of the test items that count; None: all.
        """

    def alike(self, outputs: Shaped[Tensor, "M N ..."], others: Shaped[Tensor, "K N ..."]) -> Float[Tensor, "M K"] | None:
        """How like others networks are where nothing is "wrong", at most 1; by default there is no such measure."""
        return None

    @property
    def title(self) -> str:
        """Data and scale, for titles of figures."""
        return self.name

    @property
    def code(self) -> tuple[Any, ...]:
        """What the result of a training depends on, beside `training_digest`: functions, classes or modules."""
        return self._source, Task.batches, Task.loss, order, training

    @property
    def _source(self) -> Any:
        """The task's module; of one that is typed into a notebook, its class."""
        module = sys.modules[type(self).__module__]
        return module if hasattr(module, "__file__") else type(self)

    @property
    def judging(self) -> tuple[Any, ...]:
        """What `predictor` computes with, likewise."""
        return self._source, predict, Task.predictor

    @cached_property
    def training_digest(self) -> str:
        """Content digest of all that training sees."""
        return tensor_digest({"x": self.x_train, "y": self.y_train})

    @cached_property
    def digest(self) -> str:
        """Content digest of all that training and judging see."""
        return tensor_digest({"x": self.x_train, "y": self.y_train, "x_test": self.x_test, "y_test": self.y_test})

    @property
    def example(self) -> Tensor:
        """One item as the network takes it, [1 ...]; zeros."""
        return torch.zeros_like(self.x_train[:1])

    def check(self, net: nn.Module) -> None:
        """Refuse a network that does not take this task's items (`ValueError`)."""
        device = next(net.parameters()).device
        try:
            with torch.no_grad(), evaluating(net):
                self.criterion(net(self.example.to(device)), self.y_train[:1].to(device))
        except Exception as error:  # whatever a network of a user's own raises
            raise ValueError(f"{type(net).__name__} does not take items of shape {list(self.example.shape[1:])} of {self.name}, or gives "
                             f"what they are not compared with: {type(error).__name__}: {error}") from error

    def prepared(self, items: Shaped[Tensor, "n ..."]) -> Tensor:
        """Items, not augmented, as the network takes them; on their device."""
        return items

    def scaled(self, mean: Sequence[float], std: Sequence[float]) -> Task:
        """The same task for networks that were trained on another input scale."""
        raise ValueError(f"input_mean {list(mean)} and input_std {list(std)}: expected [] with {self.name}, whose items have no scale to "
                         "be set")

    def batches(self, seeds: Sequence[int], batch: int, base: recipe.Base, device: torch.device, stream: str) -> tuple[BatchOf, int]:
        """Training batches of several networks, each in an order of its own.

        Args:
            seeds: one per network.
            batch: items at a time.
            base: its settings of augmentation.
            device: where batches are wanted.
            stream: what else the randomness depends on, beside seed and step.

        Returns:
            (step, slice of the networks) -> items [m B ...] and what is wanted of them [m B ...]; and the steps in an epoch.
        """
        x, y = self.x_train.to(device), self.y_train.to(device)
        picks = order.Picks(len(x), batch, seeds, stream, device)

        def batch_of(step: int, part: slice) -> tuple[Tensor, Tensor]:
            chosen = picks(step, part)
            return x[chosen], y[chosen]

        return batch_of, picks.per_epoch

    def of_members(self, members: Sequence[int]) -> Task:
        """What these members of a zoo (0: its first network) are trained for: the same, unless each has an object of its own."""
        return self

    def loss(self, net: nn.Module, batch: int, base: recipe.Base, device: torch.device,
             stream: str) -> tuple[Callable[[int], Tensor], int]:
        """The loss of step i of training one network, and the steps in an epoch."""
        batch_of, per_epoch = self.batches([base.seed], batch, base, device, stream)

        def loss_at(i: int) -> Tensor:
            x, y = batch_of(i, slice(0, 1))
            return self.criterion(net(x[0]), y[0])

        return loss_at, per_epoch

    def predictor(self, net: nn.Module, sub: Subset, device: torch.device, progress: bool = False) -> Predictor:
        """Parameter vectors [M D] -> what their networks give for the test items, [M N ...] on the CPU; made once for many calls."""
        return lambda theta: predict(net, sub, theta, self.x_test, device, progress)

    def warned(self, outputs: Shaped[Tensor, "M N ..."]) -> Shaped[Tensor, "M N ..."]:
        """The outputs, with a warning where some are not finite."""
        bad = ~torch.isfinite(outputs).flatten(1).all(dim=1)
        if bad.any():
            warnings.warn(f"{int(bad.sum())} of {len(bad)} networks give NaN or infinity (first: network {int(bad.nonzero()[0])}): "
                          "counted as wrong, and left without a score")
        return outputs

    def rehearse(self, net: nn.Module, sub: Subset, device: torch.device) -> None:
        """Evaluate two vectors on little: what the network does not take is said before any long work and not after it."""
        predict(net, sub, sub.flatten(net).expand(2, -1), self.example, device)

    def start(self, net: nn.Module, sub: Subset, device: torch.device) -> dict[str, Tensor]:
        """What there is to say of weights that training starts from, as numbers to be kept; nothing by default."""
        return {}

    def say_start(self, kept: dict[str, Tensor], source: str) -> None:
        """Print what `start` found; `source`: of the weights, in words."""

    def summary(self, outputs: Shaped[Tensor, "M N ..."], originals: Shaped[Tensor, "K N ..."] | None = None,
                seed: int = 0) -> dict[str, float | int]:
        """The scores of many networks in a few numbers: see `summary`."""
        n = len(self.x_test)
        return {"n_models": len(outputs), "n_items": n,
                **summary(lambda items: self.judged(outputs, originals, items).score, n, self.score.better, seed)}


def of(data: recipe.Data, store: Store | None = None) -> Task:
    """The task that a recipe names, with its data; `store`: for a task that keeps what it makes of them. Raises `ValueError`: a name that is
    neither known nor `package.module:Class` of a `Task`, or what the task refuses."""
    place = TASKS.get(data.task, data.task)
    if not own.is_name(place):
        raise ValueError(f"{recipe.unknown('task', data.task, TASKS)}, or package.module:Class")
    try:
        found = own.load(place)
    except ValueError as error:
        raise ValueError(f"task {error}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"task {data.task!r} is {found!r}: expected a class derived from pdiff_lib.tasks.task.Task")
    return found(data, **({"store": store} if "store" in inspect.signature(found).parameters else {}))


@torch.no_grad()
def predict(net: nn.Module, sub: Subset, theta: Float[vectors.Array, "M D"], x: Shaped[Tensor, "N ..."], device: torch.device | str,
            progress: bool = False) -> Shaped[Tensor, "M N ..."]:
    """What the networks of many parameter vectors give for the same items, under one vmap as far as memory goes.

    Args:
        net: the network around them; left as it is.
        sub: which of its parameters the vectors hold.
        theta: parameter vectors, raw.
        x: items, as the network takes them.
        device: where to compute.
        progress: show a bar.

    Raises:
        ValueError: vectors of another length, or with NaN or infinity.
    """
    theta, x = vectors.vectors(theta, sub.numel, device=device), x.to(device)
    state = {name: t.detach().to(device) for name, t in (*net.named_parameters(), *net.named_buffers())}

    def one(vector: Tensor) -> Tensor:
        return torch.func.functional_call(net, {**state, **sub.unflatten(vector)}, (x,))

    with evaluating(net), training.precision(torch.device(device)):
        at_once = max(1, min(AT_ONCE, NUMBERS_AT_ONCE // (one(theta[0]).numel() + sub.numel)))
        outputs = []
        for part in tqdm(theta.split(at_once), desc="evaluating", unit="part", leave=False, disable=not progress):
            # As many at once everywhere, so that equal vectors give equal numbers wherever they stand.
            filled = torch.cat([part, part[-1:].expand(at_once - len(part), -1)])
            outputs.append(torch.func.vmap(one)(filled)[:len(part)].cpu())
    return torch.cat(outputs)


def halves(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of two random halves of n items, the first to pick networks on and the second to report them on."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split([n // 2])


def summary(score_on: Callable[[Tensor], Float[Tensor, "M"]], n: int, better: str = "higher", seed: int = 0) -> dict[str, float | int]:
    """The scores of many networks in a few numbers. `best` picks the best of many networks on the items that it is reported on, so it
    improves with their number alone. The honest figure beside it picks on one random half of the items and reports on the other.

    Args:
        score_on: from indices of items to the score of each network on these.
        n: how many items there are, at least 2.
        better: "higher" or "lower".
        seed: of the random halves (the first has n // 2 items).

    Returns:
        `mean` and `std` over the networks (population, ddof 0), `best`, `best_selected_half` (score of the network
        that is best on the first half, there; the first of equals) and `best_other_half` (the same network on the second half).
        A network without a score makes the mean NaN, and is never the best one.

    Raises:
        ValueError: no network, or fewer than 2 items.

    Source: Table 1 reports `best`; the two halves are ours.
    """
    first, second = halves(n, seed)
    everywhere, here, there = (score_on(items) for items in (torch.arange(n), first, second))
    if len(everywhere) < 1 or n < 2:
        raise ValueError(f"{len(everywhere)} networks judged on {n} items: expected at least 1 network and 2 items")
    worst, sign = (-torch.inf, 1) if better == "higher" else (torch.inf, -1)
    best = (sign * here.nan_to_num(nan=worst)).argmax()
    return {"mean": everywhere.mean().item(), "std": everywhere.std(correction=0).item(),
            "best": (sign * (sign * everywhere.nan_to_num(nan=worst)).max()).item(),
            "best_selected_half": here[best].item(), "best_other_half": there[best].item()}
