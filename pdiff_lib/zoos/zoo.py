"""Checkpoints of one subset, and their file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdiff_lib.base import runs, vectors
from pdiff_lib.networks import weights
from pdiff_lib.networks.subset import Subset


@dataclass(frozen=True)
class Zoo:
    """Checkpoints of one subset.

    Attributes:
        theta: [K D], raw, on the CPU, in the order of training.
        names, shapes: of the subset they belong to.
        losses: [K], the training loss at each step; empty when unknown.

    Raises:
        ValueError: what `vectors.vectors` refuses, or vectors of another length than the shapes have.
    """

    theta: Float[vectors.Array, "K D"]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    losses: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        numel = Subset(self.names, self.shapes).numel
        object.__setattr__(self, "theta", vectors.vectors(self.theta, numel, device="cpu"))

    def save(self, path: str | Path) -> None:
        """One safetensors file, atomically."""
        note = {"names": list(self.names), "shapes": [list(s) for s in self.shapes]}
        runs.write(Path(path), {"theta": self.theta, "losses": self.losses}, note)


def load(path: str | Path, sub: Subset | None = None) -> Zoo:
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
                             "of your own with zoo.of(files, net, sub)")
    tensors, note = runs.read(Path(path))
    if not {"names", "shapes"} <= note.keys() or "theta" not in tensors:
        raise ValueError(f"{path} holds {weights.some(tensors)}: expected a zoo (theta with names and shapes)")
    zoo = Zoo(tensors["theta"], tuple(note["names"]), tuple(map(tuple, note["shapes"])), tensors["losses"])
    if sub is not None and (zoo.names, zoo.shapes) != (sub.names, sub.shapes):
        raise ValueError(f"{path} is a zoo of {len(zoo.names)} tensors with {zoo.theta.shape[1]} numbers "
                         f"({zoo.names[0]}, ...): expected {len(sub.names)} with {sub.numel} ({sub.names[0]}, ...)")
    return zoo
