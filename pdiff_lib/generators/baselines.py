"""What p-diff is compared with. Each learns from `theta [K D]` with `fit` and gives raw vectors with `sample`.

A method of your own is a class with these two verbs; `experiment.Experiment.add` puts it beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pdiff_lib.base import vectors
from pdiff_lib.base.vectors import Array
from pdiff_lib.generators.diffusion import randn
from pdiff_lib.generators.methods import unconditional


def gaussian(theta: Float[Array, "K D"], n: int, generator: torch.Generator | None = None,
             scale: float = 1.0) -> Float[Tensor, "n D"]:
    """Draws from N(mean, scale^2 covariance) of vectors: exact without ever forming the [D D] covariance."""
    theta = vectors.vectors(theta, at_least=2)
    mean = theta.mean(dim=0)
    weights = scale * randn((n, len(theta)), theta.device, generator) / (len(theta) - 1) ** 0.5
    return mean + weights @ (theta - mean)


class Baseline:
    """Remembers the checkpoints, as they are when it is fitted; `fit` refuses what cannot be a zoo.

    Attributes:
        single: every sample is the same vector, so that one is enough to be measured.
    """

    single = conditional = False

    def fit(self, theta: Float[Array, "K D"], condition: Tensor | None = None) -> Baseline:
        """Learn from raw checkpoints.

        Raises:
            ValueError: fewer than two vectors, what `vectors.vectors` refuses or the class itself says, or a condition.
        """
        unconditional(self, condition)
        self.theta = vectors.vectors(theta, at_least=2).clone()  # what the caller does to it later is not seen
        self._learn()
        return self

    def sample(self, n: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Float[Tensor, "n D"]:
        """n raw vectors, as the class says.

        Raises:
            ValueError: a condition.
        """
        unconditional(self, condition)
        return self._draw(n, generator)

    def _learn(self) -> None:
        """What there is to check, or to learn, beyond remembering."""

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        raise NotImplementedError

    def _integers(self, n: int, high: int, generator: torch.Generator | None) -> Int64[Tensor, "n"]:
        where = generator.device if generator else self.theta.device
        return torch.randint(high, (n,), generator=generator, device=where).to(self.theta.device)


class Noise(Baseline):
    """A random original plus Gaussian noise, tensor by tensor in units of that tensor's own standard deviation (of a tensor
    without one, such as a single number: `vectors.scales`, that over the checkpoints).

    Args:
        scale: s of the N(0, s^2) added to the standardised tensor.
        sizes: lengths of the tensors; None: the vector as one tensor.

    Source: Figure 4 (METHOD "From checkpoints to vectors").
    """

    def __init__(self, scale: float, sizes: Sequence[int] | None = None):
        self.scale, self.sizes = scale, sizes

    def _learn(self) -> None:
        vectors.Standardiser(self.theta, self.sizes)  # refuses sizes that do not add up to D

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        theta = self.theta[self._integers(n, len(self.theta), generator)]
        sizes, std = list(self.sizes or (theta.shape[1],)), []
        for p, scale in zip(theta.split(sizes, dim=1), vectors.scales(self.theta, sizes)):
            own = p.std(dim=1, keepdim=True, correction=0)
            std.append(torch.where(own > vectors.ROUNDING * p.mean(dim=1, keepdim=True).abs(), own, scale).expand_as(p))
        return theta + self.scale * torch.cat(std, dim=1) * randn(theta.shape, theta.device, generator)


class WeightAverage(Baseline):
    """The mean of the originals, which the paper calls "ensemble"; every sample is the same vector."""

    single = True

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        return self.theta.mean(dim=0).expand(n, -1).clone()


class TensorMeans(Baseline):
    """Every tensor filled with its own mean over its numbers and the originals: the level of each tensor and nothing else.

    Where this is as accurate as the originals, accuracy says nothing about which parameters were generated.

    Args:
        sizes: lengths of the tensors; None: the vector as one tensor.
    """

    single = True

    def __init__(self, sizes: Sequence[int] | None = None):
        self.sizes = sizes

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        return vectors.Standardiser(self.theta, self.sizes).mean.expand(n, -1).clone()


class Fixed(Baseline):
    """A given vector, whatever the originals are: the network before they were fine-tuned from it, say.

    Args:
        vector: [D], raw.
    """

    single = True

    def __init__(self, vector: Float[Array, "D"]):
        self.vector = vectors.vector(vector).clone()

    def _learn(self) -> None:
        vectors.vectors(self.theta, len(self.vector))

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        return self.vector.to(self.theta).expand(n, -1).clone()


class Copy(Baseline):
    """A random original as it is: what a generator that only remembers would give."""

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        return self.theta[self._integers(n, len(self.theta), generator)]


class Interpolation(Baseline):
    """A point on the line between two different random originals.

    Args:
        at: where, from 0 (the first) to 1; None: uniform along the line.

    Raises:
        ValueError: a point that is not on it.
    """

    def __init__(self, at: float | None = None):
        if at is not None and not 0 <= at <= 1:
            raise ValueError(f"at is {at}: expected from 0 to 1, or None")
        self.at = at

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        where = generator.device if generator else self.theta.device
        weight = torch.rand(n, 1, generator=generator, device=where).to(self.theta.device)
        weight = weight if self.at is None else torch.full_like(weight, self.at)
        first = self._integers(n, len(self.theta), generator)
        second = (first + 1 + self._integers(n, len(self.theta) - 1, generator)) % len(self.theta)
        return torch.lerp(self.theta[first], self.theta[second], weight)


class Gaussian(Baseline):
    """N(mean, covariance) of the originals, rank K-1.

    Args:
        scale: of the standard deviations; 1 = as the originals.
    """

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        return gaussian(self.theta, n, generator, self.scale)


class SubsetAverage(Baseline):
    """The mean of `size` different random originals.

    Args:
        size: how many; at most K (`fit` refuses more).
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"size is {size}: expected at least 1 original to average")
        self.size = size

    def _learn(self) -> None:
        vectors.vectors(self.theta, at_least=self.size)

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        where = generator.device if generator else self.theta.device
        chosen = torch.rand(n, len(self.theta), generator=generator, device=where).topk(self.size).indices
        weights = torch.zeros(n, len(self.theta), device=where).scatter_(1, chosen, 1 / self.size)
        return weights.to(self.theta) @ self.theta


class SWAG(Baseline):
    """Gaussian around the average: half its covariance diagonal, half of low rank from the last deviations.

    Args:
        rank: how many of the last checkpoints give the low-rank part; at least two.
        scale: of all standard deviations; 1 = as in the paper.

    Source: Maddox et al. 2019, "A Simple Baseline for Bayesian Uncertainty in Deep Learning", Section 3.3: deviations are
    from the running mean; one checkpoint per step here, not per epoch.
    """

    def __init__(self, rank: int = 20, scale: float = 1.0):
        if rank < 2:
            raise ValueError(f"rank is {rank}: expected at least 2")
        self.rank, self.scale = rank, scale

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        theta, device = self.theta, self.theta.device
        mean, std = theta.mean(dim=0), theta.std(dim=0, correction=0)
        steps = torch.arange(1, len(theta) + 1, device=device)
        running = (theta.double().cumsum(dim=0) / steps[:, None])[-self.rank:]
        last = (theta[-self.rank:] - running).to(theta.dtype)
        diagonal = std * randn((n, theta.shape[1]), device, generator)
        low_rank = randn((n, len(last)), device, generator) @ last / max(len(last) - 1, 1) ** 0.5
        return mean + self.scale * (diagonal + low_rank) / 2**0.5


class LatentKDE(Baseline):
    """S_KDE30: kernel density estimates of the latents of the most accurate originals, one per latent dimension, sampled
    and decoded.

    Args:
        autoencoder: anything with `encode(theta)` and `decode(z)`, already trained.
        accuracy: of the vectors that `fit` gets, one each; fractions.
        share: of them that is kept, the most accurate first; at least two.

    Raises:
        ValueError: a share that is not within (0, 1], accuracies that are not numbers.

    Source: Schuerholt et al. 2022 (S_KDE30 of Table 7): dimensions independent of each other. Gaussian kernels with Scott's
        bandwidth, n^(-1/5) standard deviations; their autoencoder is another one (attention, with a contrastive loss).
    """

    def __init__(self, autoencoder, accuracy: Float[Array, "K"], share: float = 0.3):
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}: expected more than 0 and at most 1")
        self.autoencoder, self.accuracy, self.share = autoencoder, torch.as_tensor(accuracy).detach().clone(), share
        if not torch.isfinite(self.accuracy).all():  # which would be sorted before the best
            raise ValueError(f"{int((~torch.isfinite(self.accuracy)).sum())} of {len(self.accuracy)} accuracies are NaN or "
                             "infinite: expected fractions")

    def _learn(self) -> None:
        if len(self.accuracy) != len(self.theta):
            raise ValueError(f"{len(self.accuracy)} accuracies for {len(self.theta)} vectors: expected one each")
        best = self.accuracy.argsort(descending=True, stable=True)[:max(2, round(self.share * len(self.theta)))]
        self.z = vectors.vectors(self.autoencoder.encode(self.theta[best.to(self.theta.device)])).clone()
        self.bandwidth = self.z.std(dim=0) * len(self.z) ** -0.2

    def _draw(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n D"]:
        where = generator.device if generator else self.z.device
        picks = torch.randint(len(self.z), (n, self.z.shape[1]), generator=generator, device=where).to(self.z.device)
        z = self.z.gather(0, picks) + self.bandwidth * randn(picks.shape, self.z.device, generator)
        return vectors.vectors(self.autoencoder.decode(z), self.theta.shape[1])
