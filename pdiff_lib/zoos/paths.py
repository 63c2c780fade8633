"""Training paths: many networks at several moments of their training, each with its loss on items it was not trained on.

What G.pt learns from (Peebles et al. 2022): pairs of moments of one run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Checkpoint, Store, tensor_digest
from pdiff_lib.networks import subset
from pdiff_lib.tasks import task as tasks
from pdiff_lib.tasks.order import steps_per_epoch
from pdiff_lib.zoos import population


@dataclass(frozen=True)
class Paths:
    """R runs at S moments.

    Attributes:
        theta: [R S D] raw, all of a network's parameters.
        loss: [R S] on the items that were asked for; the task's criterion.
        moments: [R S] steps of training, from 0 to the last.
    """

    theta: Float[Tensor, "R S D"]
    loss: Float[Tensor, "R S"]
    moments: Int64[Tensor, "R S"]


def collect(task: tasks.Task, r: int, moments: int = 50, items: Int64[Tensor, "n"] | None = None, *, first: int = 0,
            start: str = "independent", store: Store | None = None, device: str | torch.device | None = None, progress: bool = True,
            **settings) -> Paths:
    """Train networks of a population (`population.collect`: network i is the same there and here) and keep moments of them.

    Args:
        task: what they are trained for.
        r: how many.
        moments: S, how many of each: the first, the last, and others at random.
        items: which test items the loss is measured on; None: the first half (`tasks.halves`), so that the second half remains
            to report on.
        first: number of the first network.
        start: see `population.initial`.
        store: keeps stages "paths" and lets a killed training resume; None keeps nothing.
        device: to train on; None: CUDA when there is one.
        progress: show bars.
        settings: any of `recipe.Base`, as for `population.collect`.

    Raises:
        ValueError: fewer than two moments or more than there are steps, no network, or what `population.collect` refuses.

    Source: G.pt, Section 3.1: the initial network, 198 at random iterations and the last one; loss here on validation items,
        where theirs is on the test set.
    """
    (base,) = recipe.split(settings, recipe.Base)
    steps = base.base_epochs * steps_per_epoch(len(task.x_train), base.base_batch)
    if r < 1 or not 2 <= moments <= steps + 1:
        raise ValueError(f"{r} runs at {moments} moments of {steps} steps: expected at least 1 run, and from 2 to {steps + 1} moments")
    device, store = training.device_of(device), store or Store(None)
    net = population.create(task, base, 0)
    population.check(net, base)
    items = tasks.halves(len(task.x_test))[0] if items is None else items
    chunk = max(population.CHUNK, population._at_once(net, device))
    parts = [_stage(task, base, part.tolist(), start, moments, steps, items, store, device, progress)
             for part in torch.arange(first, first + r).split(chunk)]
    return Paths(*(torch.cat([part[name] for part in parts]) for name in ("theta", "loss", "moments")))


def _stage(task: tasks.Task, base: recipe.Base, members: list[int], start: str, moments: int, steps: int, items: Tensor, store: Store,
           device: torch.device, progress: bool) -> dict[str, Tensor]:
    """Some runs, kept."""
    nets = population.initial(task, base, members, start, store=store, device=device, progress=progress)
    sub, task = subset.select(nets[0], "all"), task.of_members(members)
    key = {"images": task.digest, "start": tensor_digest(torch.stack([sub.flatten(net) for net in nets])), "moments": moments,
           "items": tensor_digest(items), "members": [members[0], members[-1]], "device": device.type, **dataclasses.asdict(base)}

    def compute(checkpoint: Checkpoint) -> dict[str, Tensor]:
        when = torch.stack([_moments(population.member_seed(base.seed, i), moments, steps) for i in members])
        theta = torch.zeros(len(nets), moments, sub.numel, device=device)
        population.train(nets, task, [population.member_seed(base.seed, i) for i in members], moments=when, path=theta,
                         checkpoint=checkpoint, device=device, progress=progress,
                         desc=f"paths {members[0] + 1} to {members[-1] + 1}", **dataclasses.asdict(base))
        loss = losses(task, nets[0], sub, theta.flatten(0, 1), items, device)
        return {"theta": theta, "loss": loss.unflatten(0, when.shape), "moments": when}

    return store.stage("paths", key, compute, code=(population.create, population.member_seed, population.train,
                                                    population._gradients, _moments, losses, tasks.predict, *task.code))


def _moments(seed: int, moments: int, steps: int) -> Int64[Tensor, "S"]:
    """0, the last step, and others between them at random."""
    g = torch.Generator().manual_seed(training.seed_for(seed, "moments"))
    between = torch.randperm(steps - 1, generator=g)[:moments - 2] + 1
    return torch.cat([torch.tensor([0, steps]), between]).sort().values


@torch.no_grad()
def losses(task: tasks.Task, net: nn.Module, sub: subset.Subset, theta: Float[Tensor, "M D"], items: Int64[Tensor, "n"],
           device: torch.device | str | None = None) -> Float[Tensor, "M"]:
    """The task's criterion of many networks on some test items, on the CPU.

    Args:
        task: with a differentiable criterion over a network's outputs.
        net: the network around the vectors.
        sub: which of its parameters they hold.
        theta: parameter vectors, raw.
        items: indices of test items.
        device: where to compute; None: CUDA when there is one.

    Raises:
        ValueError: what `vectors.vectors` refuses.
    """
    x, y = task.prepared(task.x_test[items]), task.y_test[items]
    at_once = max(1, tasks.NUMBERS_AT_ONCE // (len(items) * 64))
    return torch.cat([torch.func.vmap(task.criterion, in_dims=(0, None))(
        tasks.predict(net, sub, part, x, training.device_of(device)), y) for part in theta.split(at_once)])
