"""A second way to a zoo: K networks trained independently of each other, each from its own initial weights on its own
order of batches, all together (Table 7; Schuerholt et al. 2022).

The parameters of the networks are stacked, [K ...] per tensor, and one optimizer steps the stacks: AdamW, Adam and SGD with
momentum treat every number by itself, so network k ends where `zoo.train` would have left it (up to rounding). What couples
the numbers of a tensor (clipping by norm, LAMB) would couple the networks, and must not be added to `training.OPTIMIZERS`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from pdiff_lib import networks
from pdiff_lib.base import recipe, training
from pdiff_lib.base.runs import Checkpoint, Store, tensor_digest
from pdiff_lib.networks import capture, subset
from pdiff_lib.tasks import data
from pdiff_lib.tasks.classification import task_of
from pdiff_lib.tasks.order import steps_per_epoch
from pdiff_lib.tasks.task import Task
from pdiff_lib.zoos.zoo import Zoo

KINDS = {"independent": "independent networks", "common": "networks from one start", "first": "networks from the first one"}  # by `start`
CHUNK = 50  # networks per stage, at least: what is stacked together, and what a kill between two stages does not lose


def collect(images: data.Images | Task, k: int, *, start: str = "independent", store: Store | None = None, chunk: int | None = None,
            at_once: int | None = None, device: str | torch.device | None = None, progress: bool = True, **settings) -> Zoo:
    """K independently initialised and trained networks as a zoo of all their parameters.

    Network i is `networks.create` with the seed s_i = `training.seed_for(seed, "population", i)`, trained as `zoo.train`
    trains with that seed, for what `Task.of_members` says: more networks are these and others.

    Args:
        images: to classify; or any other task.
        k: how many networks, at least 2.
        start: see `initial`.
        store: keeps each chunk (stage "population") and lets a killed training resume; None keeps nothing.
        chunk: networks that are trained together; memory for parameters, gradients and optimizer depends on it. None: 50, or as
            many as share one vmap where these are more.
        at_once: as for `train`.
        device: to train on; None: CUDA when there is one.
        progress: show a bar per chunk.
        settings: any of `recipe.Base`; no `pretrained` and no `weights`, from which all networks would start alike.

    Returns:
        `theta` [K D] of the subset "all"; `losses` [K]: of each network, the mean over the steps of its last epoch.

    Raises:
        ValueError: fewer than two networks, networks with running statistics, weights to start from, or images that
            they do not take.
        FloatingPointError: a loss became infinite or NaN.

    Source: the populations of Table 7; initial weights are PyTorch's.
    """
    (base,) = recipe.split(settings, recipe.Base)
    if k < 2 or (chunk is not None and chunk < 1):
        raise ValueError(f"k = {k} networks in chunks of {chunk}: expected at least 2, in chunks of at least 1")
    device, store, task = training.device_of(device), store or Store(None), task_of(images)
    first = create(task, base, 0)
    check(first, base)
    chunk = chunk or max(CHUNK, _at_once(first, device))
    alone = int(start == "first")  # the others wait for it
    members = [torch.arange(1)] * alone + list(torch.arange(alone, k).split(chunk))
    how = {"store": store, "device": device, "progress": progress}
    parts = [_stage(task, base, part.tolist(), initial(task, base, part.tolist(), start, **how), k, store, at_once, device, progress)
             for part in members]
    theta, losses = (torch.cat([part[name] for part in parts]) for name in ("theta", "losses"))
    sub = subset.select(first, "all")
    return Zoo(theta, sub.names, sub.shapes, losses)


def _stage(task: Task, base: recipe.Base, members: Sequence[int], nets: Sequence[nn.Module], k: int, store: Store, at_once: int | None,
           device: torch.device, progress: bool) -> dict[str, Tensor]:
    """Some networks of a population, kept."""
    sub, task = subset.select(nets[0], "all"), task.of_members(members)
    key = {"images": task.training_digest, "start": tensor_digest(torch.stack([sub.flatten(net) for net in nets])),
           "members": [members[0], members[-1]], "device": device.type, **dataclasses.asdict(base), **networks.code_key(base.network)}

    def compute(checkpoint: Checkpoint) -> dict[str, Tensor]:
        losses = train(nets, task, [member_seed(base.seed, i) for i in members], at_once=at_once, checkpoint=checkpoint,
                       device=device, progress=progress, desc=f"networks {members[0] + 1} to {members[-1] + 1} of {k}",
                       **dataclasses.asdict(base))
        last = losses[:, -steps_per_epoch(len(task.x_train), base.base_batch):]
        return {"theta": torch.stack([sub.flatten(net) for net in nets]), "losses": last.mean(dim=1)}

    return store.stage("population", key, compute, code=(create, member_seed, train, _gradients, *task.code))


def member_seed(seed: int, i: int) -> int:
    """The seed of network i of a population: of its initial weights, its batches and their augmentation."""
    return training.seed_for(seed, "population", i)


def create(images: data.Images | Task, base: recipe.Base, i: int) -> nn.Module:
    """Network i of a population, untrained."""
    own = dataclasses.replace(base, seed=member_seed(base.seed, i), pretrained=False, weights="")
    return task_of(images).network(own)


def initial(images: data.Images | Task, base: recipe.Base, members: Sequence[int], start: str = "independent", *,
            store: Store | None = None, device: str | torch.device | None = None, progress: bool = True) -> list[nn.Module]:
    """Networks of a population as their training begins.

    Args:
        images: as for `collect`.
        base: settings of the training.
        members: their numbers.
        start: "independent": each has initial weights of its own (`create`); "common": all have those of network 0; "first": all but
            network 0 have those that it was trained to (which is a stage of its own).
        store, device, progress: as for `collect`.

    Raises:
        ValueError: another start.

    Source: Erkoc et al. 2023 (HyperDiffusion): "first".
    """
    if start not in KINDS:
        raise ValueError(f"start is {start!r}: expected one of {', '.join(map(repr, KINDS))}")
    if start == "independent":
        return [create(images, base, i) for i in members]
    nets = [create(images, base, 0) for _ in members]
    if start == "first" and any(members):
        sub = subset.select(nets[0], "all")
        first = _stage(task_of(images), base, [0], [create(images, base, 0)], 1, store or Store(None), None, training.device_of(device), progress)
        for i, net in zip(members, nets):
            if i:
                sub.load(net, first["theta"][0])
    return nets


def check(net: nn.Module, base: recipe.Base) -> None:
    """Refuse what cannot be a member of a population.

    Raises:
        ValueError: a network with running statistics, or weights that all members would start from.
    """
    if base.pretrained or base.weights:
        raise ValueError(f"pretrained = {base.pretrained} and weights = {base.weights!r}: expected False and '', as networks "
                         "that start from the same weights are not independent")
    running = [name for name, module in net.named_modules() if getattr(module, "running_mean", None) is not None]
    if running:
        some = ", ".join(running[:3]) + ", ..." * (len(running) > 3)
        raise ValueError(f"{base.network} keeps running statistics ({some}), which each network of a population has its own "
                         "of and a vector of parameters does not hold: expected a network without batch norm, such as "
                         "hyperrep-cnn or a mini")


def train(nets: Sequence[nn.Module], images: data.Images | Task, seeds: Sequence[int], *, at_once: int | None = None,
          moments: Int64[Tensor, "K S"] | None = None, path: Float[Tensor, "K S D"] | None = None,
          checkpoint: Checkpoint | None = None, device: str | torch.device | None = None, progress: bool = True,
          desc: str = "", **settings) -> Float[Tensor, "K steps"]:
    """Train networks of one kind together, in place: each as `zoo.train` would with its own seed.

    Args:
        nets: the networks, each with its initial weights.
        images: as for `collect`.
        seeds: of each network's batches and augmentation.
        at_once: networks that share one vmap; None: what is fastest (`_at_once`). Memory for activations depends on it: where it
            does not suffice, half as many are taken.
        moments: for each network the steps after which it is kept (0: as it starts), rising; None: none are.
        path: [K S D] on the device; filled in place with the networks at these moments, all of their parameters.
        checkpoint: where the state of an unfinished training is kept.
        device: to train on; None: CUDA when there is one. The networks themselves stay where they are.
        progress: show a bar.
        desc: its text.
        settings: any of `recipe.Base` (its `seed` is not used).

    Returns:
        The loss of each network at each step. The networks are left in eval mode.

    Raises:
        ValueError: not one seed per network, networks of several kinds, or images that they do not take.
    """
    (base,) = recipe.split(settings, recipe.Base)
    kinds = {tuple((n, tuple(p.shape)) for n, p in net.named_parameters()) for net in nets}
    if len(kinds) != 1 or len(seeds) != len(nets) or (at_once is not None and at_once < 1):
        raise ValueError(f"{len(nets)} networks of {len(kinds)} kinds, {len(seeds)} seeds, at_once = {at_once}: expected "
                         "networks of one kind, a seed for each, at_once at least 1")
    device = training.device_of(device)
    task = task_of(images)
    task.check(nets[0])
    net = copy.deepcopy(nets[0]).to(device).train()
    names = [n for n, _ in net.named_parameters()]
    initial, _ = stack_module_state([m.train() for m in nets])
    stacks = nn.ParameterList(initial[n].detach().to(device) for n in names)
    optimizer = training.OPTIMIZERS[base.base_optimizer](
        stacks.parameters(), lr=base.base_lr, weight_decay=base.base_weight_decay)
    batch_of, per_epoch = task.batches(seeds, base.base_batch, base, device, "train")
    curves = torch.zeros(per_epoch * base.base_epochs, len(nets), device=device)
    order = [names.index(name) for name in subset.select(nets[0], "all").names]

    def keep(step: int) -> None:
        rows, columns = (moments == step).nonzero(as_tuple=True)
        if len(rows):
            with torch.no_grad():
                path[rows, columns] = torch.cat([stacks[i][rows.to(device)].flatten(1) for i in order], dim=1)

    if moments is not None:
        keep(0)
    gradients = _gradients(net, names, task.example.to(device), task.criterion)
    at_once = at_once or _at_once(net, device)
    parts = _parts(len(nets), at_once)

    def loss_at(i: int) -> Tensor:
        nonlocal at_once, parts
        try:
            steps = [gradients([p.detach()[part] for p in stacks], *batch_of(i, part)) for part in parts]
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            parts = _parts(len(nets), at_once)
            return loss_at(i)
        curves[i] = torch.cat([values for _, values in steps])
        # Linear in the stacks, with the value and the gradient of the sum of losses: only one part's graph exists at a time.
        return curves[i].sum() + sum(((p - p.detach()) * torch.cat(g)).sum()
                                     for p, g in zip(stacks, zip(*(g for g, _ in steps))))

    training.loop(loss_at, len(curves), {"population": stacks}, optimizer, checkpoint=checkpoint, tf32=True,
                  buffers={"curves": curves} if path is None else {"curves": curves, "path": path},
                  after=None if moments is None else lambda i: keep(i + 1),
                  desc=desc or f"training {len(nets)} x {base.network}", progress=progress)
    with torch.no_grad():
        for i, member in enumerate(nets):
            for p, stack in zip(member.eval().parameters(), stacks):
                p.copy_(stack[i])
    return curves.T.cpu()


def _parts(networks: int, at_once: int) -> list[slice]:
    return [slice(first, min(first + at_once, networks)) for first in range(0, networks, at_once)]


def _at_once(net: nn.Module, device: torch.device) -> int:
    """Networks per vmap: of small ones many, whose matrix products would not fill even one core. On a CPU a vmap over
    convolutions is a slow grouped convolution (0.3 to 0.8 times as fast as one network after the other), while one over matrix
    products of small batches is 1.3 to 1.4 times as fast, and 18 times for the smallest: tests/benchmarks/bench_population.py."""
    numel = sum(p.numel() for p in net.parameters())
    if device.type == "cuda":
        return max(64, min(4096, 2**25 // numel))
    return 1 if _has(net, nn.Conv2d) else max(16, min(512, 2**20 // numel))


def _has(net: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in net.modules())


def _gradients(net: nn.Module, names: Sequence[str], example: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]):
    """(stacked tensors, x [m B ...], y [m B ...]) -> (gradients, losses [m]) of m networks that take such an item."""

    def loss(tensors, x, y):
        return criterion(functional_call(net, dict(zip(names, tensors)), (x,)), y)

    one = grad_and_value(loss)
    # Pooling and convolutions of one network run faster on a CPU with channels last; layer norms over whole
    # feature maps undo that. A vmap has a layout of its own.
    last = _has(net, nn.Conv2d) and not _has(net, nn.LayerNorm) and example.device.type == "cpu"
    if last:
        with torch.no_grad():  # in eval mode: one image alone is no batch for a batch norm
            last = capture.fast_layout(copy.deepcopy(net).eval(), example) == torch.channels_last

    def gradients(tensors, x, y):
        if len(x) > 1:
            return vmap(one)(tensors, x, y)
        x = x[0].contiguous(memory_format=torch.channels_last) if last else x[0]
        g, value = one([t[0] for t in tensors], x, y[0])
        return [t[None] for t in g], value[None]

    return gradients
