"""What many parameter vectors give for the same images, of networks that are no classifiers: what is frozen is computed once per batch of
images, the rest once per vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from pdiff_lib.base import training
from pdiff_lib.base.kept import Kept
from pdiff_lib.base.vectors import vectors as as_vectors
from pdiff_lib.networks.capture import Split
from pdiff_lib.networks.subset import Subset

Finish = Callable[[dict[str, Tensor], Tensor, Int64[Tensor, "B"]], Shaped[Tensor, "B ..."]]


class Shared:
    """Calls give [M N ...] on the CPU, for vectors [M D]; what is frozen stays in memory between calls, as far as that goes.

    Args:
        part: of the network, cut in two.
        sub: what the vectors hold.
        images: indices of items -> what `part` takes, on the device.
        n: how many items there are.
        batch: items at a time, always as many (the last one is repeated): a capture holds for one size.
        finish: (parameters, what `part.rest` gave, indices of items) -> what is kept of it, a row per item, on the CPU.
        device: where to compute.
        progress: show a bar.
    """

    def __init__(self, part: Split, sub: Subset, images: Callable[[Int64[Tensor, "B"]], Tensor], n: int, batch: int, finish: Finish,
                 device: torch.device, progress: bool = False):
        self.part, self.sub, self.images, self.finish, self.device, self.progress = part, sub, images, finish, device, progress
        self.n, self.batch, self.kept = n, batch_of(n, batch), Kept(device, None)

    def _items(self, start: int) -> Int64[Tensor, "B"]:
        return torch.arange(start, start + self.batch).clamp(max=self.n - 1)

    def _boundary(self, start: int) -> tuple[Tensor, ...]:
        if start not in self.kept:
            found = self.part.frozen(self.images(self._items(start)))
            if not (self.kept or self.kept.room(sum(t.nbytes for t in found) * -(-self.n // self.batch))):
                return found
            self.kept[start] = found
        return self.kept[start]

    @torch.no_grad()
    def __call__(self, theta: Float[Tensor, "M D"]) -> Shaped[Tensor, "M N ..."]:
        rows = []
        params = [self.sub.unflatten(v) for v in as_vectors(theta, self.sub.numel, device=self.device)]
        with training.precision(self.device):
            for start in tqdm(range(0, self.n, self.batch), desc="evaluating", unit="batch", leave=False, disable=not self.progress):
                boundary, items = self._boundary(start), self._items(start)
                given = [self.finish(own, self.part.rest(own, boundary), items) for own in params]
                rows.append(torch.stack(given)[:, :self.n - start])
        return torch.cat(rows, dim=1)


def batch_of(n: int, most: int) -> int:
    """Items at a time, at most so many, so that batches are as alike as they can be.

    >>> batch_of(100, 64), batch_of(5, 64)
    (50, 5)
    """
    return -(-n // -(-n // most))
