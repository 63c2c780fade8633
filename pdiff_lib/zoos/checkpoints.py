"""Checkpoints of a user's own: found, put in order, read into vectors, with the network around them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib.base.own import Files, find as find
from pdiff_lib.networks import subset, weights
from pdiff_lib.zoos.zoo import Zoo


class Checkpoints(NamedTuple):
    """What files hold, seen from one subset.

    Attributes:
        theta: [K D] the subset's numbers, raw, a row per file in the order of `find`.
        around: what the files hold of the network outside the subset, the same in all of them.
    """

    theta: Float[Tensor, "K D"]
    around: dict[str, Tensor]


def read(files: Sequence[Path], net: nn.Module, sub: subset.Subset, *, whole: bool = False,
         free: Collection[str] = (), progress: bool = True) -> Checkpoints:
    """Read checkpoints (for formats, prefixes and refusals see `weights.fitting`) one after the other: memory holds one file and
    what is kept of it.

    Args:
        files: of `find`.
        net: a network of their kind; it is not changed.
        sub: what the vectors hold.
        whole: the files must hold all of the network, not only the subset.
        free: names outside the subset, of running statistics, say, that may differ between files; when one does, none of
            them is in `around`.
        progress: show a bar.

    Raises:
        ValueError: a file that does not fit, or numbers outside the subset (and `free`) that are not the same in all files.
    """
    expected = net.state_dict()
    tied = _tied(net, sub)
    optional = {k for k in expected if k.endswith(weights.COUNT)}
    needed = {*sub.names, *(expected.keys() - optional - tied - set(free) if whole else ())}
    theta, around, differ = torch.empty(len(files), sub.numel), {}, False
    for i, path in enumerate(tqdm(files, desc="reading checkpoints", leave=False, disable=not progress)):
        state = weights.fitting(path, expected, type(net).__name__, needed=needed)
        theta[i] = sub.flatten(state)
        rest = {k: v for k, v in state.items() if k not in tied and k not in optional}
        around = rest if i == 0 else around
        names = around.keys() ^ rest.keys() | {k for k in around.keys() & rest.keys() if not torch.equal(around[k], rest[k])}
        if other := [k for k in expected if k in names and k not in free]:
            raise ValueError(f"checkpoint {str(path)!r} differs from {str(files[0])!r} outside the subset: {weights.some(other)}: "
                             f"expected the same there in all {len(files)} files, as only the subset is generated{_advice(other)}")
        differ = differ or bool(names)
    return Checkpoints(theta, {k: v for k, v in around.items() if not (differ and k in free)})


def _tied(net: nn.Module, sub: subset.Subset) -> set[str]:
    """The subset's names, and those under which the same tensors stand in a state dict again."""
    state = net.state_dict(keep_vars=True)
    chosen = {id(state[n]) for n in sub.names}
    return {k for k, v in state.items() if id(v) in chosen}


def _advice(names: Sequence[str]) -> str:
    """What to do, when only running statistics differ."""
    if all(n.rpartition(".")[2] in ("running_mean", "running_var") for n in names):
        return ("; running statistics: buffers 'checkpoint' makes each file's own a part of its vector, 'recalibrate' computes "
                "them anew from training images, `weights` names a network whose statistics serve for all")
    return "; a larger subset ('all') takes them in"


def surround(net: nn.Module, sub: subset.Subset, found: Checkpoints) -> nn.Module:
    """The network of the files, in place, in eval mode: what lies around the subset, and the last file's numbers within it."""
    net.load_state_dict(found.around, strict=False)
    return sub.load(net, found.theta[-1]).eval()


def of(files: Files, net: nn.Module, sub: subset.Subset, *, own_statistics: bool = False, progress: bool = True) -> Zoo:
    """Checkpoints of one's own as a zoo.

    Args:
        files: a folder, a pattern or a list (`find`): safetensors, or what `torch.save` wrote of state dicts (`weights.read`);
            complete ones, or of the subset alone. Their order is the zoo's.
        net: their network. It becomes that of the files, in place and in eval mode: what they hold outside the subset, which must be
            the same in all, and the last one's numbers within it. What they do not hold stays as it is.
        sub: what the vectors hold; of `subset.with_statistics`, if each checkpoint has running statistics of its own.
        own_statistics: the network keeps its own running statistics where the files' differ, in place of a refusal.
        progress: show a bar.

    Raises:
        ValueError: what `find` and `read` refuse.
    """
    found = read(find(files), net, sub, progress=progress, free=subset.statistics(net).names if own_statistics else ())
    surround(net, sub, found)
    return Zoo(found.theta, sub.names, sub.shapes, torch.empty(0))
