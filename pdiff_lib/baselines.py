"""What p-diff is compared with. Each learns from `theta [K D]` with `fit` and gives raw vectors with `sample`.

A method of your own is a class with these two verbs; `experiment.Experiment.add` puts it beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pdiff_lib import subset
from pdiff_lib.diffusion import randn


class Baseline:
    """Remembers the checkpoints; `fit` refuses what cannot be a zoo."""

    def fit(self, theta: Float[Tensor, "K D"]) -> Baseline:
        """Learn from raw checkpoints.

        Raises:
            ValueError: fewer than two vectors, not [K D], or NaN among the numbers.
        """
        subset.check(theta, at_least=2)
        self.theta = theta
        return self

    def _integers(self, n: int, high: int, generator: torch.Generator | None) -> Int64[Tensor, "n"]:
        where = generator.device if generator else self.theta.device
        return torch.randint(high, (n,), generator=generator, device=where).to(self.theta.device)


class Noise(Baseline):
    """A random original plus Gaussian noise, tensor by tensor in units of that tensor's own standard deviation.

    Args:
        scale: s of the N(0, s^2) added to the standardised tensor.
        sizes: lengths of the tensors; None: the vector as one tensor.

    Source: Figure 4 (METHOD "From checkpoints to vectors").
    """

    def __init__(self, scale: float, sizes: Sequence[int] | None = None):
        self.scale, self.sizes = scale, sizes

    def fit(self, theta: Float[Tensor, "K D"]) -> Noise:
        """As `Baseline.fit`; also refuses `sizes` that do not add up to D."""
        super().fit(theta)
        subset.Standardiser(theta, self.sizes)
        return self

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """n noise-added originals."""
        theta = self.theta[self._integers(n, len(self.theta), generator)]
        sizes = list(self.sizes or (theta.shape[1],))
        std = torch.cat([p.std(dim=1, keepdim=True, correction=0).expand_as(p) for p in theta.split(sizes, dim=1)], dim=1)
        return theta + self.scale * std * randn(theta.shape, theta.device, generator)


class WeightAverage(Baseline):
    """The mean of the originals, which the paper calls "ensemble"; every sample is the same vector."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """The mean, n times."""
        return self.theta.mean(dim=0).expand(n, -1).clone()


class Interpolation(Baseline):
    """A point on the line between two different random originals, uniform along it."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """n interpolated vectors."""
        where = generator.device if generator else self.theta.device
        weight = torch.rand(n, 1, generator=generator, device=where).to(self.theta.device)
        first = self._integers(n, len(self.theta), generator)
        second = (first + 1 + self._integers(n, len(self.theta) - 1, generator)) % len(self.theta)
        return torch.lerp(self.theta[first], self.theta[second], weight)


class Gaussian(Baseline):
    """N(mean, covariance) of the originals, rank K-1: exact without ever forming the [D D] covariance."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """n draws."""
        mean = self.theta.mean(dim=0)
        weights = randn((n, len(self.theta)), self.theta.device, generator) / (len(self.theta) - 1) ** 0.5
        return mean + weights @ (self.theta - mean)
