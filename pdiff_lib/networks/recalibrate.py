"""Running statistics of batch norms computed anew for each of many networks, from training images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from pdiff_lib.base import training, vectors
from pdiff_lib.networks.classifiers import copied
from pdiff_lib.networks.subset import Subset, with_statistics

BATCH = 256  # images at a time, at most


def recalibrated(net: nn.Module, sub: Subset, theta: Float[vectors.Array, "M D"], x: Shaped[Tensor, "N ..."], *,
                 prepare: Callable[[Tensor], Tensor] | None = None, device: torch.device | str | None = None,
                 progress: bool = False) -> Float[Tensor, "M E"]:
    """Each vector, followed by the running statistics that its network has over some images.

    Args:
        net: the network; it is not changed.
        sub: which of its numbers the vectors hold.
        theta: raw.
        x: at least 2 training images, not augmented.
        prepare: as for `evaluate.Evaluator`.
        device: where to compute; None: where the network is.
        progress: show a bar.

    Returns:
        [M E] vectors of `subset.with_statistics(net, sub)`, on the CPU: means over batches of (nearly) equal size of the batch's
        mean and variance. Not finite where a network's numbers overflow on its way.

    Raises:
        ValueError: fewer than 2 images, a network without running statistics, what `vectors.vectors` refuses.

    Source: `torch.optim.swa_utils.update_bn` (the networks of an average, of SWAG), here for generated ones.
    """
    theta, whole = vectors.vectors(theta, sub.numel), with_statistics(net, sub)
    if len(x) < 2:
        raise ValueError(f"{len(x)} images: expected at least 2, to have a variance")
    device = next(net.parameters()).device if device is None else training.device_of(device)
    net, found = copied(net).to(device), torch.empty(len(theta), whole.numel)
    x = [part.to(device) for part in x.chunk(-(-len(x) // BATCH))]
    batches = [prepare(part) if prepare else part for part in x]
    with training.precision(device), training.seeded(0):  # a network with dropout draws
        for row, vector in enumerate(tqdm(theta, desc="recalibrating", unit="network", leave=False, disable=not progress)):
            update_bn(batches, sub.load(net, vector))
            found[row] = whole.flatten(net).cpu()
    return found
