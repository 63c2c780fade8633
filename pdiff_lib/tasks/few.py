"""A few vectors of a small network over few images: the plain way, with nothing made ready for more.

Copying a network, trying it on one image and counting what is frozen takes as long as some of its forward passes (3 to 43 ms:
tests/benchmarks/README.md), which is a part of an evaluation that counts where there are few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pdiff_lib.networks.capture import classes_of, tried
from pdiff_lib.networks.modes import evaluating
from pdiff_lib.networks.subset import Subset, tensors_of

VECTORS, IMAGES = 2, 256  # at most so many of either: no capture spares more than it costs
SMALL = ((1_000_000, 128), (100_000, 1024))  # or a network of fewer numbers, and at most so many forward passes of an image
TINY = 2**15  # numbers in a network that does not fill a core


def are_few(net: nn.Module, vectors: int, images: int) -> bool:
    """Whether so little is asked for; decided by counts alone, so that the same calls take the same way each time."""
    if vectors <= VECTORS and images <= IMAGES:
        return True
    numbers = sum(p.numel() for p in net.parameters())
    return any(numbers < most and vectors * images <= passes for most, passes in SMALL)


@torch.no_grad()
def scores(net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: Shaped[Tensor, "N C H W"],
           prepare: Callable[[Tensor], Tensor] | None = None) -> Float[Tensor, "M N classes"]:
    """Class scores by the whole network, once per vector; `net` is left as it was.

    Raises:
        ValueError: the network does not take the images, or gives no scores.
    """
    tensors, found = tensors_of(net), []
    before = {name: tensors[name].data for name in sub.names}
    with evaluating(net):
        images = prepare(x) if prepare else x
        try:
            for vector in theta:  # `torch.func.functional_call` would walk through all of the network for each
                _hold(tensors, sub.unflatten(vector))
                found.append(net(images) if found else tried(net, x, lambda: images, net))
                classes_of(net, found[-1])
        finally:
            _hold(tensors, before)
    return torch.stack(found)


def _hold(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].data = value.to(tensors[name].dtype)


def is_small(net: nn.Module) -> bool:
    """Whether several vectors at once are faster on a CPU: measured on MLPs; a vmap over convolutions is a slow grouped one."""
    return sum(p.numel() for p in net.parameters()) <= TINY and not any(isinstance(m, nn.Conv2d) for m in net.modules())
