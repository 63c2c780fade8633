"""The originals: train a network, fine-tune the subset, keep one checkpoint per step (Sections 2.3 and 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pdiff_lib import data, evaluate, networks, recipe, runs, subset, training, weights
from pdiff_lib.runs import Checkpoint


@dataclass(frozen=True)
class Zoo:
    """Checkpoints of one subset.

    Attributes:
        theta: [K D], raw, on the CPU, in the order of training.
        names, shapes: of the subset they belong to.
        losses: [K], the training loss at each step; empty when unknown.

    Raises:
        ValueError: what `subset.vectors` refuses, or vectors of another length than the shapes have.
    """

    theta: Float[subset.Array, "K D"]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    losses: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        numel = subset.Subset(self.names, self.shapes).numel
        object.__setattr__(self, "theta", subset.vectors(self.theta, numel, device="cpu"))

    def save(self, path: str | Path) -> None:
        """One safetensors file, atomically."""
        note = {"names": list(self.names), "shapes": [list(s) for s in self.shapes]}
        runs.write(Path(path), {"theta": self.theta, "losses": self.losses}, note)


class TrainingPath(NamedTuple):
    """A network at S moments of its training.

    Attributes:
        epochs: [S] epochs done.
        theta: [S D] the subset's parameters.
        accuracy: [S] of the whole network as it was then, fractions.
    """

    epochs: list[float]
    theta: Float[Tensor, "S D"]
    accuracy: Float[Tensor, "S"]


def load(path: str | Path, sub: subset.Subset | None = None) -> Zoo:
    """A zoo from its file.

    Args:
        path: what `Zoo.save` wrote.
        sub: the subset that it must belong to.

    Raises:
        ValueError: no such file; damaged or not safetensors (a pickle is refused, never executed); a zoo of other
            parameters than `sub`.
    """
    if not Path(path).is_file():
        raise ValueError(f"no zoo file {str(path)!r}")
    with suppress(SafetensorError), safe_open(path, framework="pt") as file:  # `runs.read` says what is wrong with others
        if "checksum" not in (file.metadata() or {}):
            raise ValueError(f"{path} is not a zoo of this workbook (it holds {weights.some(file.keys())}): bring checkpoints "
                             "of your own with Zoo(torch.stack([sub.flatten(state) for state in states]), sub.names, "
                             "sub.shapes, torch.empty(0)).save(path)")
    tensors, note = runs.read(Path(path))
    if not {"names", "shapes"} <= note.keys() or "theta" not in tensors:
        raise ValueError(f"{path} holds {weights.some(tensors)}: expected a zoo (theta with names and shapes)")
    zoo = Zoo(tensors["theta"], tuple(note["names"]), tuple(map(tuple, note["shapes"])), tensors["losses"])
    if sub is not None and (zoo.names, zoo.shapes) != (sub.names, sub.shapes):
        raise ValueError(f"{path} is a zoo of {len(zoo.names)} tensors with {zoo.theta.shape[1]} numbers "
                         f"({zoo.names[0]}, ...): expected {len(sub.names)} with {sub.numel} ({sub.names[0]}, ...)")
    return zoo


def train(net: nn.Module, images: data.Images, *, after: Callable[[int], None] | None = None,
          buffers: Mapping[str, Tensor] | None = None, checkpoint: Checkpoint | None = None, device=None,
          progress: bool = True, **settings) -> Float[Tensor, "steps"]:
    """Train all parameters, in place (Table 5a).

    Args:
        net: the network.
        images: to train on.
        after, buffers: as in `training.loop`; to watch the network on its way.
        checkpoint: where the state of an unfinished training is kept.
        device: to train on; None: CUDA when there is one.
        progress: show a bar.
        settings: any of `recipe.Base`.

    Returns:
        The loss of each step. The network is left in eval mode.
    """
    (base,) = recipe.split(settings, recipe.Base)
    device = training.device_of(device)
    networks.check(net.to(device), (images.channels, images.size, images.size))
    optimizer = training.OPTIMIZERS[base.base_optimizer](
        net.parameters(), lr=base.base_lr, weight_decay=base.base_weight_decay)
    loss_at, per_epoch = _classification(net, images, base.base_batch, base, device, "train")
    losses = training.loop(loss_at, per_epoch * base.base_epochs, {"net": net.train()}, optimizer, after=after,
                           buffers=buffers, checkpoint=checkpoint, desc=f"training {base.network}",
                           progress=progress, tf32=True)
    net.eval()
    return losses


def collect(net: nn.Module, sub: subset.Subset, images: data.Images, *, checkpoint: Checkpoint | None = None, device=None,
            progress: bool = True, **settings) -> Zoo:
    """Fine-tune the subset alone and keep its parameters after each step (Table 5b, Section 3.1).

    The network runs in train mode (batch norm by the batch) at a constant learning rate, as the authors do; it is not
    changed itself: a copy is fine-tuned, and the running statistics stay those of the trained network.

    Args:
        net: the trained network.
        sub: what is fine-tuned and kept.
        images: to train on.
        checkpoint: where the state of an unfinished collection is kept.
        device: to train on; None: CUDA when there is one.
        progress: show a bar.
        settings: any of `recipe.Zoo`, and of `recipe.Base` for augmentation and seed.

    Raises:
        ValueError: K < 2, or a subset of another network.
    """
    zoo, base = recipe.split(settings, recipe.Zoo, recipe.Base)
    device = training.device_of(device)
    sub.flatten(net)
    networks.check(net, (images.channels, images.size, images.size))
    net = networks.copied(net).to(device).train()
    for name, p in net.named_parameters():
        p.requires_grad_(name in sub.names)
    chosen = [p for p in net.parameters() if p.requires_grad]
    optimizer = training.OPTIMIZERS[zoo.zoo_optimizer](chosen, lr=zoo.zoo_lr, weight_decay=zoo.zoo_weight_decay)
    loss_at, _ = _classification(net, images, zoo.zoo_batch, base, device, "zoo")
    theta = torch.empty(zoo.k_checkpoints, sub.numel, device=device)

    def keep(i: int) -> None:
        theta[i] = sub.flatten(net)

    losses = training.loop(loss_at, zoo.k_checkpoints, {"net": net}, optimizer, schedule="constant", after=keep,
                           buffers={"theta": theta}, checkpoint=checkpoint, desc="collecting the zoo", progress=progress, tf32=True)
    return Zoo(theta.cpu(), sub.names, sub.shapes, losses)


def steps_per_epoch(n: int, batch: int) -> int:
    """Steps in an epoch over n images; an incomplete last batch is left out."""
    return n // min(batch, n)


class Feed:
    """Training images and their labels by index: all on the device where they take at most half of its free memory, else in
    pinned memory of the host, from which each batch is copied while the device works.

    Attributes:
        where: the device on which indices are expected.
    """

    def __init__(self, images: data.Images, device: torch.device):
        self.device = self.where = device
        self.x, self.y = images.x_train, images.y_train
        if device.type == "cuda" and self.x.nbytes > training.free_memory(device) // 2:
            self.where = torch.device("cpu")
            self.x, self.y = self.x.pin_memory(), self.y.pin_memory()
        else:
            self.x, self.y = self.x.to(device), self.y.to(device)

    def __len__(self) -> int:
        return len(self.x)

    def __call__(self, pick: Int64[Tensor, "*shape"]) -> tuple[Shaped[Tensor, "*shape C H W"], Int64[Tensor, "*shape"]]:
        """Images and labels, on the device."""
        x, y = self.x[pick], self.y[pick]
        if self.where == self.device:
            return x, y
        return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))


def _classification(net: nn.Module, images: data.Images, batch: int, base: recipe.Base, device: torch.device, stream: str):
    """The loss of step i on augmented training images, and the steps in an epoch."""
    feed = Feed(images, device)
    batch = min(batch, len(feed))
    per_epoch = steps_per_epoch(len(feed), batch)
    order: dict[int, Tensor] = {}

    def loss_at(i: int) -> Tensor:
        epoch, at = divmod(i, per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = data.epoch_order(len(feed), epoch, training.seed_for(base.seed, stream)).to(feed.where)
        x, y = feed(order[epoch][at * batch : (at + 1) * batch])
        seed = training.seed_for(base.seed, stream, i)
        return F.cross_entropy(net(images.augment(x, seed, base.flip, (base.crop_scale, 1.0))), y)

    return loss_at, per_epoch


def training_path(net: nn.Module, images: data.Images, sub: subset.Subset, moments: int = 6, *, checkpoint: Checkpoint | None = None,
                  device=None, progress: bool = True, **settings) -> TrainingPath:
    """The subset's parameters and the accuracy at moments of the base training, denser at its start (Figure 1).

    Args:
        net: as it is before training; it is trained in place.
        images: train and test images.
        sub: the parameters to look at.
        moments: how many, at least two: first (untrained) and last are included; at most one per step.
        checkpoint, device, progress, settings: as in `train`.

    Raises:
        ValueError: fewer than two moments, or what `train` refuses.
    """
    if moments < 2:
        raise ValueError(f"moments is {moments}: expected at least 2, the first and the last")
    own, = recipe.split(settings, recipe.Base)
    device = training.device_of(device)
    per_epoch = steps_per_epoch(len(images.x_train), own.base_batch)
    steps = sorted({round(per_epoch * own.base_epochs * (i / (moments - 1)) ** 2) for i in range(moments)})
    theta, accuracy = torch.empty(len(steps), sub.numel, device=device), torch.empty(len(steps), device=device)
    net.to(device)

    def look(step: int) -> None:
        if step + 1 in steps:
            i = steps.index(step + 1)
            theta[i] = sub.flatten(net)
            wrong = evaluate.wrong(net, sub, theta[i : i + 1], images.x_test, images.y_test, prepare=images.prepare)
            accuracy[i] = evaluate.accuracy(wrong)[0]

    look(-1)
    train(net, images, after=look, buffers={"theta": theta, "accuracy": accuracy}, checkpoint=checkpoint, device=device,
          progress=progress, **settings)
    return TrainingPath([s / per_epoch for s in steps], theta.cpu(), accuracy.cpu())
