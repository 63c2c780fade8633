"""Drawing latents by kernel density estimates, one per latent dimension, and choosing among what was drawn (SANE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pdiff_lib.base import recipe
from pdiff_lib.base.recipe import setting
from pdiff_lib.generators.diffusion import randn

Judge = Callable[[Float[Tensor, "m D"]], Float[Tensor, "m"]]  # of raw vectors, larger is better; on validation items
CHUNK = 256  # networks that are decoded and judged together


@dataclasses.dataclass(frozen=True)
class Sampling(recipe.Section):
    """How latents are drawn; nothing that is trained depends on it. `sampling`: see `sample`. `dimensions`: see `draw`. `share`: of
    the originals, and of what BOOT draws, that densities are fitted to, the best first. `bandwidth`: standard deviation of the
    kernels, in units of the latent. `candidates`: drawn per network that is wanted, in each round. `rounds`: of BOOT."""

    sampling: str = setting("KDE30", choices=("KDE30", "SUB", "BOOT"))
    dimensions: str = setting("independent", choices=("independent", "fixed"))
    share: float = setting(0.3, 1e-9, 1.0)
    bandwidth: float = setting(0.2, 0.0)
    candidates: int = setting(50, 1)
    rounds: int = setting(3, 1)


def draw(z: Float[Tensor, "K L"], n: int, bandwidth: float, dimensions: str = "independent",
         generator: torch.Generator | None = None) -> Float[Tensor, "n L"]:
    """Samples of L Gaussian kernel density estimates, one per dimension.

    Args:
        z: what they are fitted to.
        n: how many.
        bandwidth: standard deviation of each kernel.
        dimensions: "independent": each dimension draws its own kernel and its own noise, so that a sample mixes the latents of up
            to L networks. "fixed": each dimension draws with the same seed, and so gets the same kernel and the same noise: a
            sample is the latent of **one** network, shifted by one number in all dimensions.
        generator: of the random numbers; on the CPU it gives the same ones whatever the device.

    Raises:
        ValueError: another way of drawing.

    Source: S_KDE of Schuerholt et al. 2022. "fixed" is what the released samplers of 2022 and of SANE do: `random_state=42` is
        handed to scikit-learn's `KernelDensity.sample` anew for each dimension (theirs is 42 in every call; here each sample draws its
        own from the generator).

    >>> z = torch.tensor([[0., 10.], [1., 11.]]); (draw(z, 4, 0.1, "fixed").diff(dim=1) - 10).abs().max() < 1e-5
    tensor(True)
    """
    if dimensions not in ("independent", "fixed"):
        raise ValueError(f"dimensions is {dimensions!r}: expected 'independent' or 'fixed'")
    where, own = generator.device if generator else z.device, z.shape[1] if dimensions == "independent" else 1
    picks = torch.randint(len(z), (n, own), generator=generator, device=where).to(z.device)
    return z.gather(0, picks.expand(-1, z.shape[1])) + bandwidth * randn((n, own), z.device, generator)


def scores(judge: Judge, theta: Float[Tensor, "M D"]) -> Float[Tensor, "M"]:
    """What the judge says, where the vectors are.

    Raises:
        ValueError: not a number for each vector, or one that is NaN or infinite (it would be sorted among the best).
    """
    score = torch.as_tensor(judge(theta)).detach().to(theta.device)
    if score.shape != theta.shape[:1]:
        raise ValueError(f"the judge gave shape {list(score.shape)} for {len(theta)} vectors: expected [{len(theta)}]")
    if not torch.isfinite(score).all():
        raise ValueError(f"{int((~torch.isfinite(score)).sum())} of {len(score)} scores are NaN or infinite: expected finite numbers, "
                         "larger for a better network")
    return score.float()


def best(score: Float[Tensor, "M"], share: float) -> Int64[Tensor, "_"]:
    """Which are the best `share` of all, at least two, the best first."""
    return score.argsort(descending=True, stable=True)[:max(2, round(share * len(score)))]


def sample(z: Float[Tensor, "K L"], n: int, settings: Sampling, decode: Callable[[Float[Tensor, "M L"]], Float[Tensor, "M D"]],
           judge: Judge | None = None, generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
    """Raw vectors from latents, in one of three ways.

    - "KDE30": as they are drawn.
    - "SUB" (subsampled): n times `candidates` are drawn together, the best n of them all are kept, the best first. Their latents are in
      memory together.
    - "BOOT" (bootstrapped): `rounds` times as many; the densities of a round are those of the best `share` of the round before,
      and the best n of the last round are kept.

    Args:
        z: the latents of the originals that the first densities are fitted to.
        n: how many.
        settings: of `Sampling`.
        decode: latents to raw vectors.
        judge: of raw vectors; for "SUB" and "BOOT".
        generator: of the random numbers.

    Raises:
        ValueError: no judge where one is needed, or what `scores` refuses.

    Source: Schuerholt et al. 2024 and its released samplers, which draw a given number in all instead of one per network that is
        wanted. Their bootstrapped one returns the first n of the last round, in the order in which they were drawn.
    """
    if settings.sampling == "KDE30":
        return decode(draw(z, n, settings.bandwidth, settings.dimensions, generator))
    if judge is None:
        raise ValueError(f"sampling is {settings.sampling!r} and judge is None: expected a judge to choose by")
    for _ in range(settings.rounds if settings.sampling == "BOOT" else 1):
        drawn = draw(z, n * settings.candidates, settings.bandwidth, settings.dimensions, generator)
        score = torch.cat([scores(judge, decode(part)) for part in drawn.split(CHUNK)])
        z = drawn[best(score, settings.share)]
    return decode(drawn[score.argsort(descending=True, stable=True)[:n]])
