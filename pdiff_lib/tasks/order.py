"""In which order training visits its items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pdiff_lib.base import training


def epoch_order(n: int, epoch: int, seed: int) -> Int64[Tensor, "n"]:
    """The order in which one epoch visits n items: a function of (seed, epoch) alone, so that a resumed run repeats.

    >>> epoch_order(5, epoch=3, seed=0).equal(epoch_order(5, epoch=3, seed=0))
    True
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])  # neighbours become unrelated
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def steps_per_epoch(n: int, batch: int) -> int:
    """Steps in an epoch over n items; an incomplete last batch is left out."""
    return n // min(batch, n)


class Picks:
    """The items of each step, for networks that are trained together.

    Args:
        n: items there are.
        batch: items per step, at most n.
        seeds: one per network.
        stream: what else the order depends on.
        device: where the indices are wanted.

    Attributes:
        per_epoch: steps in an epoch.
    """

    def __init__(self, n: int, batch: int, seeds: Sequence[int], stream: str, device: torch.device):
        self.n, self.batch, self.device = n, min(batch, n), device
        self.seeds = [training.seed_for(seed, stream) for seed in seeds]
        self.per_epoch = steps_per_epoch(n, batch)
        self._orders: dict[int, Tensor] = {}

    def __call__(self, step: int, part: slice) -> Int64[Tensor, "m B"]:
        """Indices of the items of a step, for a slice of the networks."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = torch.stack([epoch_order(self.n, epoch, seed) for seed in self.seeds]).to(self.device)
        return self._orders[epoch][part, at * self.batch : (at + 1) * self.batch]
