"""What a small classifier sees in images, and by that how far sets of images are from real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from pdiff_lib.base import training
from pdiff_lib.base.runs import Checkpoint
from pdiff_lib.tasks import order

FEATURES = 32  # numbers that are seen in an image
STEPS, BATCH, LR = 400, 64, 2e-3  # of the training, at least; every image is seen three times
AT_ONCE = 512  # images


class Classifier(nn.Module):
    """Two convolutions and two linear layers; features are what the first of these gives, standardised over the training images. Initial weights
    are always the same, and it works on the CPU, so that all devices judge alike.

    Args:
        shape: (C, s, s) of the images.
        classes: how many.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        c, s, _ = shape
        with training.seeded(0):
            self.body = nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                                      nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (s // 4) ** 2, FEATURES))
            self.head = nn.Linear(FEATURES, classes)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def forward(self, x: Float[Tensor, "n C s s"]) -> Float[Tensor, "n classes"]:
        return self.head(self.body(x).relu())

    @torch.no_grad()
    def seen(self, x: Float[Tensor, "n C s s"]) -> Float[Tensor, "n F"]:
        """The features of images."""
        return torch.cat([(self.body(part) - self.mean) / self.std for part in x.split(AT_ONCE)])

    def learn(self, x: Float[Tensor, "n C s s"], y: Int64[Tensor, "n"], checkpoint: Checkpoint | None = None) -> None:
        """Train it, in place."""
        picks = order.Picks(len(x), BATCH, [0], "classifier", x.device)

        def loss_at(i: int) -> Tensor:
            (chosen,) = picks(i, slice(0, 1))
            return F.cross_entropy(self(x[chosen]), y[chosen])

        training.loop(loss_at, max(STEPS, 3 * picks.per_epoch), {"classifier": self.train()}, torch.optim.AdamW(self.parameters(), lr=LR),
                      checkpoint=checkpoint, desc="training the classifier whose features are compared")
        std, mean = torch.std_mean(self.seen(x), dim=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))


def frechet(sets: Float[Tensor, "M N F"], real: Float[Tensor, "R F"]) -> Float64[Tensor, "M"]:
    """Frechet distance (squared) between Gaussians with the means and covariances of each set and of the real features: what FID is with
    the features of one Inception network. Few features bias it upwards: compare sets of one size.

    Args:
        sets: features of N images each, at least 2.
        real: features of R real images, at least 2.

    Returns:
        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), with the covariances' N - 1 in the denominator; NaN for sets that are not finite.

    Source: Heusel et al. 2017, Eq. 6.
    """
    _check(sets, real)
    finite = torch.isfinite(sets).flatten(1).all(dim=1)
    given = sets.double().where(finite[:, None, None], 0.0)
    (mean, cov), (real_mean, real_cov) = _moments(given), _moments(real.double())
    values, vectors = torch.linalg.eigh(real_cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S'^(1/2): S S' has the eigenvalues of S'^(1/2) S S'^(1/2), which is symmetric
    cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum(dim=-1)
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + real_cov.trace()
    return ((mean - real_mean).square().sum(dim=-1) + trace - 2 * cross).where(finite, torch.nan)


def kid(sets: Float[Tensor, "M N F"], real: Float[Tensor, "R F"]) -> Float64[Tensor, "M"]:
    """Kernel distance: the unbiased estimate of the squared maximum mean discrepancy under the kernel (x . y / F + 1)^3, over all images at
    once. About 0 for images of one distribution, also below. Arguments as `frechet`; NaN for sets that are not finite.

    Source: Binkowski et al. 2018, Section 4 (KID, there with Inception's features).
    """
    _check(sets, real)
    finite = torch.isfinite(sets).flatten(1).all(dim=1)
    given, real = sets.double().where(finite[:, None, None], 0.0), real.double()
    n, r = given.shape[1], len(real)
    own, theirs = _kernel(given, given), _kernel(real, real)
    own = (own.sum(dim=(1, 2)) - own.diagonal(dim1=1, dim2=2).sum(dim=1)) / (n * (n - 1))
    return (own + (theirs.sum() - theirs.trace()) / (r * (r - 1)) - 2 * _kernel(given, real).mean(dim=(1, 2))).where(finite, torch.nan)


def _check(sets: Tensor, real: Tensor) -> None:
    if min(sets.shape[1], len(real)) < 2:
        raise ValueError(f"features of {sets.shape[1]} images and of {len(real)} real ones: expected at least 2 of each")


def _moments(x: Float64[Tensor, "*M N F"]) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=-2)
    centred = x - mean[..., None, :]
    return mean, centred.mT @ centred / (x.shape[-2] - 1)


def _kernel(a: Float64[Tensor, "*A N F"], b: Float64[Tensor, "*B R F"]) -> Float64[Tensor, "*A N R"]:
    return (a @ b.mT / a.shape[-1] + 1) ** 3
