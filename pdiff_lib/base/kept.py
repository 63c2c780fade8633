"""Results that are kept in memory between calls: one budget for all of this process, a share of what is free."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from pdiff_lib.base import training

SHARE = 0.25  # of the free memory
_holders: list[weakref.ref[Kept]] = []  # the oldest first


class Kept(dict[int, tuple[Tensor, ...]]):
    """Tensors by number, on one device.

    Args:
        device: where they are.
        limit: bytes that they may take, 0: none; None: what `SHARE` leaves, for which those of older holders are dropped.
    """

    def __init__(self, device: torch.device, limit: int | None):
        super().__init__()
        self.device, self.limit = device, limit
        _holders[:] = [holder for holder in _holders if holder() is not None] + [weakref.ref(self)]

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(t.nbytes for tensors in self.values() for t in tensors)

    def room(self, size: int) -> bool:
        """Whether so many bytes may be kept here; older ones make room."""
        if self.limit is not None:
            return size <= self.limit
        others = [other for other in _full(self.device) if other is not self]
        held = sum(other.nbytes for other in others)
        if size > (budget := SHARE * (training.free_memory(self.device) + held)):
            return False
        for oldest in others:
            if held + size > budget:
                held -= oldest.nbytes
                oldest.clear()
        return True


def _full(device: torch.device) -> list[Kept]:
    return [kept for kept in (holder() for holder in _holders) if kept and kept.device == device]


def drop(device: torch.device) -> bool:
    """Forget everything that is kept on a device; whether there was anything."""
    full = _full(device)
    for kept in full:
        kept.clear()
    return bool(full)
