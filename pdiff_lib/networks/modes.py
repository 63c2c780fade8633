"""A network's modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(net: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode; afterwards each of its modules is in the mode it was in (a frozen layer may be in another than
    the rest)."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield net.eval() if any(modes.values()) else net  # setting a mode takes longer than looking at it
    finally:
        for module, mode in modes.items():
            if module.training != mode:
                module.training = mode
