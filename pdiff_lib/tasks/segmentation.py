"""Semantic segmentation: trained by cross-entropy at every pixel, judged by mIoU, the mean IoU of the classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int32, Int64, UInt8
from torch import Tensor, nn

from pdiff_lib import networks
from pdiff_lib.base import recipe, training
from pdiff_lib.base.score import Score
from pdiff_lib.networks import capture, detectors
from pdiff_lib.networks.subset import Subset
from pdiff_lib.tasks import order, scenes, shared
from pdiff_lib.tasks.evaluate import NO_CLASS
from pdiff_lib.tasks.scenes import NOT_COUNTED
from pdiff_lib.tasks.squares import OnSquares
from pdiff_lib.tasks.task import Judged, Predictor, Task

PIXELS = 20_000  # of the test images, by which wrong predictions are compared
AT_ONCE = 64  # images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's segmenters, for pixels from 0 to 1


class Segmentation(OnSquares):
    """The class of every pixel of scenes, the background being one of C.

    The score is the mean over the classes that the test images hold (background included) of IoU, each over the pixels of all test images
    together. "Wrong" (Eq. 7) are pixels with another class than their own, of 20,000 that are drawn once, as many in each image. Pixels
    that masks leave out (Pascal VOC's borders, COCO's crowds) count nowhere.

    Args:
        data: `dataset` as `scenes.load` takes it, with masks; `image_size`.

    Attributes:
        scenes: images and masks.

    Raises:
        ValueError: a data set without masks, or what `scenes.load` refuses.

    Source: Long et al. 2015 (mean IU). The paper's Table 11 reports mIoU; Eq. 7 of pixels is ours.
    """

    score = Score("mIoU", "%", scale=100.0)

    def __init__(self, data: recipe.Data):
        self.scenes = scenes.load(data.dataset, data.image_size, data.train_images, data.test_images, data.data_seed)
        self.name, self.shape = recipe.short(data.dataset), (3, self.scenes.size, self.scenes.size)
        self.x_train, self.y_train, self.x_test, self.y_test = (
            self.scenes.x_train, self.scenes.masks_train, self.scenes.x_test, self.scenes.masks_test)
        if not all(masks.numel() for masks in (self.y_train, self.y_test)):
            raise ValueError(f"{self.name} has boxes but no masks: expected a data set with both, or task 'detection'")
        self.classes = ("background", *self.scenes.classes)
        self.pixels = _drawn(self.y_test != NOT_COUNTED, PIXELS)
        self._statistics = tuple(torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    @property
    def code(self) -> tuple[Any, ...]:
        return Segmentation, scenes.mirrored, detectors, Task.batches, order, training

    @property
    def judging(self) -> tuple[Any, ...]:
        return Segmentation, _drawn, detectors, capture, shared

    def prepared(self, items: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        mean, std = (value.to(items.device) for value in self._statistics)
        return (items.float() / 255 - mean) / std

    def network(self, base: recipe.Base) -> nn.Module:
        """See `detectors.create`."""
        self.uncropped(base)
        with training.seeded(base.seed):
            return detectors.create(base.network, self.scenes.classes, self.scenes.size, segment=True, pretrained=base.pretrained,
                                    weights=base.weights)

    def criterion(self, outputs: dict[str, Tensor] | Tensor, wanted: UInt8[Tensor, "B s s"]) -> Float[Tensor, ""]:
        """Cross-entropy, the mean over the pixels that count."""
        return F.cross_entropy(scores_of(outputs), wanted.long(), ignore_index=NOT_COUNTED)

    def loss(self, net: nn.Module, batch: int, base: recipe.Base, device: torch.device,
             stream: str) -> tuple[Callable[[int], Tensor], int]:
        """As of any task; images are mirrored at random where `base.flip`. What a segmenter drops at random comes from the step."""
        batch_of, per_epoch = self.batches([base.seed], batch, base, device, stream)
        channels = self._channels(net).to(device)

        def loss_at(i: int) -> Tensor:
            (x,), (y,) = batch_of(i, slice(0, 1))
            seed = training.seed_for(base.seed, stream, i)
            if base.flip:
                x, y = scenes.mirrored(seed, x, y)
            with training.seeded(seed):  # of dropout
                return self.criterion(scores_of(net(self.prepared(x)))[:, channels], y)

        return loss_at, per_epoch

    def _channels(self, net: nn.Module) -> Int64[Tensor, "C"]:
        """Which of the network's scores are those of the classes, the background first."""
        return torch.tensor([0, *net.numbers])

    def predictor(self, net: nn.Module, sub: Subset, device: torch.device, progress: bool = False) -> Predictor:
        """Of each test image [M N 2 C + p]: how many pixels of each class are right, how many are given to each class, and the class of each
        of the p pixels that are drawn (`NO_CLASS` where scores are not finite)."""
        y, pixels = self.y_test.long(), self.pixels

        def counted(scores: Float[Tensor, "B C s s"], items: Int64[Tensor, "B"]) -> Int32[Tensor, "B q"]:
            given, own = _classes(scores), y[items].to(scores.device)
            given_where = torch.where(own == NOT_COUNTED, NO_CLASS, given)
            classes = torch.arange(len(self.classes), device=scores.device)[:, None, None]
            each = given_where[:, None] == classes
            right = (each & (own == given_where)[:, None]).flatten(2).sum(dim=2)
            drawn = given.flatten(1).gather(1, pixels[items].to(scores.device))
            return torch.cat([right, each.flatten(2).sum(dim=2), drawn], dim=1).int().cpu()

        return self._over(self.x_test, net, sub, device, counted, progress)

    def _over(self, x: UInt8[Tensor, "N 3 s s"], net: nn.Module, sub: Subset, device: torch.device, finish: Callable,
              progress: bool = False) -> Predictor:
        net, x = networks.copied(net).to(device).eval().requires_grad_(False), x.to(device)
        batch, channels = shared.batch_of(len(x), AT_ONCE), self._channels(net).to(device)

        def images(items: Int64[Tensor, "B"]) -> Tensor:
            return self.prepared(x[items.to(device)])

        part = capture.split_or_whole(net, sub.names, images(torch.arange(batch)))
        return shared.Shared(part, sub, images, len(x), batch, lambda params, found, items: finish(scores_of(found)[:, channels], items), device,
                             progress)

    def rehearse(self, net: nn.Module, sub: Subset, device: torch.device) -> None:
        self.masks(net, sub, sub.flatten(net).expand(2, -1), self.x_test[:1], device)

    def masks(self, net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: UInt8[Tensor, "n 3 s s"],
              device: torch.device) -> Int64[Tensor, "M n s s"]:
        """The class that the networks of some vectors give to each pixel of any images; `NO_CLASS` where scores are not finite."""
        return self._over(x, net, sub, device, lambda scores, items: _classes(scores).cpu())(theta)

    def warned(self, outputs: Int32[Tensor, "M N q"]) -> Int32[Tensor, "M N q"]:
        bad = (outputs[..., 2 * len(self.classes):] == NO_CLASS).flatten(1).any(dim=1)
        if bad.any():
            warnings.warn(f"{int(bad.sum())} of {len(bad)} networks give scores that are NaN or infinite (first: network {int(bad.nonzero()[0])}): "
                          "their pixels have no class, and count as wrong")
        return outputs

    def iou(self, outputs: Int32[Tensor, "M N q"], items: Int64[Tensor, "n"] | None = None) -> Float64[Tensor, "M C"]:
        """IoU of each class; NaN of those that the test images do not hold.

        Args:
            outputs: as `predictor` gives them.
            items: [n] which images count; None: all.
        """
        items, c = torch.arange(len(self.y_test)) if items is None else items, len(self.classes)
        wanted = torch.bincount(self.y_test[items].flatten().long(), minlength=NOT_COUNTED + 1)[:c].cpu()
        right, given = outputs[:, items, :2 * c].double().sum(dim=1).split(c, dim=1)
        return (right / (given + wanted - right)).where(wanted > 0, torch.nan)

    def judged(self, outputs: Int32[Tensor, "M N q"], originals: Tensor | None = None, items: Int64[Tensor, "n"] | None = None) -> Judged:
        """mIoU, and which of the drawn pixels are wrong."""
        chosen = torch.arange(len(self.y_test)) if items is None else items
        own = self.y_test[chosen].flatten(1).gather(1, self.pixels[chosen])
        drawn = outputs[:, chosen, 2 * len(self.classes):]
        return Judged(self.iou(outputs, items).nanmean(dim=1), (drawn != own).flatten(1))


def scores_of(outputs: dict[str, Tensor] | Tensor) -> Float[Tensor, "B C s s"]:
    """Of torchvision's segmenters their main output."""
    return outputs["out"] if isinstance(outputs, dict) else outputs


def _classes(scores: Float[Tensor, "B C s s"]) -> Int64[Tensor, "B s s"]:
    return torch.where(torch.isfinite(scores).all(dim=1), scores.argmax(dim=1), NO_CLASS)


def _drawn(counted: Tensor, n: int) -> Int64[Tensor, "N p"]:
    """About n pixels in all, as many in each image, of those that count: their places in the flat image."""
    each = min(-(-n // len(counted)), counted[0].numel())
    random = np.random.RandomState(0)
    rows = []
    for i, image in enumerate(counted.flatten(1)):
        places = image.nonzero()[:, 0].numpy()
        if not len(places):
            raise ValueError(f"mask of test image {i} leaves out every pixel: expected some that count")
        rows.append(torch.from_numpy(np.sort(random.choice(places, each, replace=len(places) < each))))
    return torch.stack(rows)
