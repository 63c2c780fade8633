"""The originals: train a network, fine-tune the subset, keep one checkpoint per step (Sections 2.3 and 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdiff_lib import networks
from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Checkpoint
from pdiff_lib.networks import subset
from pdiff_lib.tasks import data
from pdiff_lib.tasks.classification import task_of
from pdiff_lib.tasks.order import steps_per_epoch
from pdiff_lib.tasks.task import Task
from pdiff_lib.zoos.zoo import Zoo


class TrainingPath(NamedTuple):
    """A network at S moments of its training.

    Attributes:
        epochs: [S] epochs done.
        theta: [S D] the subset's parameters.
        accuracy: [S] of the whole network as it was then, fractions; of another task than classification its score.
    """

    epochs: list[float]
    theta: Float[Tensor, "S D"]
    accuracy: Float[Tensor, "S"]


def train(net: nn.Module, images: data.Images | Task, *, after: Callable[[int], None] | None = None,
          buffers: Mapping[str, Tensor] | None = None, checkpoint: Checkpoint | None = None, device=None,
          progress: bool = True, **settings) -> Float[Tensor, "steps"]:
    """Train all parameters, in place (Table 5a).

    Args:
        net: the network.
        images: to classify; or any other task.
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
    task = task_of(images)
    task.check(net.to(device))
    optimizer = training.OPTIMIZERS[base.base_optimizer](
        net.parameters(), lr=base.base_lr, weight_decay=base.base_weight_decay)
    loss_at, per_epoch = task.loss(net, base.base_batch, base, device, "train")
    losses = training.loop(loss_at, per_epoch * base.base_epochs, {"net": net.train()}, optimizer, after=after,
                           buffers=buffers, checkpoint=checkpoint, desc=f"training {base.network}",
                           progress=progress, tf32=True)
    net.eval()
    return losses


def collect(net: nn.Module, sub: subset.Subset, images: data.Images | Task, *, checkpoint: Checkpoint | None = None, device=None,
            progress: bool = True, **settings) -> Zoo:
    """Fine-tune the subset alone and keep its parameters after each step (Table 5b, Section 3.1).

    The network runs in train mode (batch norm by the batch) at a constant learning rate, as the authors do; it is not
    changed itself: a copy is fine-tuned, and the running statistics stay those of the trained network.

    Args:
        net: the trained network.
        sub: what is fine-tuned and kept.
        images: as for `train`.
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
    task = task_of(images)
    task.check(net)
    net = networks.copied(net).to(device).train()
    for name, p in net.named_parameters():
        p.requires_grad_(name in sub.names)
    chosen = [p for p in net.parameters() if p.requires_grad]
    optimizer = training.OPTIMIZERS[zoo.zoo_optimizer](chosen, lr=zoo.zoo_lr, weight_decay=zoo.zoo_weight_decay)
    loss_at, _ = task.loss(net, zoo.zoo_batch, base, device, "zoo")
    theta = torch.empty(zoo.k_checkpoints, sub.numel, device=device)

    def keep(i: int) -> None:
        theta[i] = sub.flatten(net)

    losses = training.loop(loss_at, zoo.k_checkpoints, {"net": net}, optimizer, schedule="constant", after=keep,
                           buffers={"theta": theta}, checkpoint=checkpoint, desc="collecting the zoo", progress=progress, tf32=True)
    return Zoo(theta.cpu(), sub.names, sub.shapes, losses)


def training_path(net: nn.Module, images: data.Images | Task, sub: subset.Subset, moments: int = 6, *, checkpoint: Checkpoint | None = None,
                  device=None, progress: bool = True, **settings) -> TrainingPath:
    """The subset's parameters and the accuracy at moments of the base training, denser at its start (Figure 1).

    Args:
        net: as it is before training; it is trained in place.
        images: as for `train`.
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
    task = task_of(images)
    per_epoch = steps_per_epoch(len(task.x_train), own.base_batch)
    steps = sorted({round(per_epoch * own.base_epochs * (i / (moments - 1)) ** 2) for i in range(moments)})
    theta, accuracy = torch.empty(len(steps), sub.numel, device=device), torch.empty(len(steps), device=device)
    net.to(device)

    def look(step: int) -> None:
        if step + 1 in steps:
            i = steps.index(step + 1)
            theta[i] = sub.flatten(net)
            outputs = task.predictor(net, sub, device)(theta[i : i + 1])
            accuracy[i] = task.judged(outputs, outputs).score[0]

    look(-1)
    train(net, task, after=look, buffers={"theta": theta, "accuracy": accuracy}, checkpoint=checkpoint, device=device,
          progress=progress, **settings)
    return TrainingPath([s / per_epoch for s in steps], theta.cpu(), accuracy.cpu())
