"""Image classification: trained by cross-entropy on augmented images, judged by the share of test images that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer, Shaped
from torch import Tensor, nn

from pdiff_lib import networks
from pdiff_lib.base import recipe, training
from pdiff_lib.base.score import ACCURACY
from pdiff_lib.networks import capture, rewrites, weights
from pdiff_lib.networks.subset import Subset
from pdiff_lib.tasks import data, evaluate, order
from pdiff_lib.tasks.task import BatchOf, Judged, Predictor, Task

START = 1000  # test images at most on which weights that are given are judged


class Feed:
    """Training images and their labels by index: all on the device where they take at most half of its free memory, else in
    pinned memory of the host, from which each batch is copied while the device works.

    Attributes:
        where: the device on which indices are expected.
    """

    def __init__(self, images: data.Images, device: torch.device):
        self.device = self.where = device
        self.x, self.y = images.x_train, images.y_train
        if device.type == "cuda" and self.x.nbytes > training.free_memory(device) // 2:
            self.where = torch.device("cpu")
            self.x, self.y = self.x.pin_memory(), self.y.pin_memory()
        else:
            self.x, self.y = self.x.to(device), self.y.to(device)

    def __len__(self) -> int:
        return len(self.x)

    def __call__(self, pick: Int64[Tensor, "*shape"]) -> tuple[Shaped[Tensor, "*shape C H W"], Int64[Tensor, "*shape"]]:
        """Images and labels, on the device."""
        x, y = self.x[pick], self.y[pick]
        if self.where == self.device:
            return x, y
        return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))


class Classification(Task):
    """Labelled images.

    Args:
        source: the recipe's settings (what `dataset` may be: see `data.load`), or images that are loaded already.

    Attributes:
        images: the images, their labels and classes.
    """

    score = ACCURACY

    def __init__(self, source: recipe.Data | data.Images):
        if isinstance(source, recipe.Data):
            source = data.load(source.dataset, size=source.image_size, channels=source.image_channels or None,
                               train_images=source.train_images, test_images=source.test_images, seed=source.data_seed)
        if not isinstance(source, data.Images):
            raise ValueError(f"dataset {source.name!r} has several objects in an image: expected task 'detection' or 'segmentation'")
        self.images, self.name = source, recipe.short(source.name)
        self.x_train, self.y_train, self.x_test, self.y_test = source.x_train, source.y_train, source.x_test, source.y_test
        self.shape = source.channels, source.size, source.size

    @property
    def title(self) -> str:
        return f"{self.name} at {self.images.size} px"

    @property
    def code(self) -> tuple[Any, ...]:
        return (Feed, Classification.batches, Classification.criterion, Task.loss, data.Images.augment_many, data._random_crop, order,
                training)

    @property
    def judging(self) -> tuple[Any, ...]:
        return capture, rewrites, evaluate

    @property
    def training_digest(self) -> str:
        return self.images.training_digest

    @property
    def digest(self) -> str:
        return self.images.digest

    def prepared(self, items: Shaped[Tensor, "n C h w"]) -> Float[Tensor, "n C s s"]:
        return self.images.prepare(items)

    def scaled(self, mean: Sequence[float], std: Sequence[float]) -> Classification:
        return Classification(self.images.scaled(mean, std))

    @property
    def example(self) -> Float[Tensor, "1 C s s"]:
        return torch.zeros(1, *self.shape)

    def network(self, base: recipe.Base) -> nn.Module:
        """See `networks.create`; weights for other classes are taken without their head where a training follows."""
        return networks.create(base.network, self.images.num_classes, self.images.channels, self.images.size, base.pretrained,
                               base.weights or None, seed=base.seed, new_head=base.base_epochs > 0)

    def check(self, net: nn.Module) -> None:
        networks.check(net, self.shape)

    def batches(self, seeds: Sequence[int], batch: int, base: recipe.Base, device: torch.device, stream: str) -> tuple[BatchOf, int]:
        """Augmented training images and their labels."""
        feed = Feed(self.images, device)
        picks = order.Picks(len(feed), batch, seeds, stream, feed.where)

        def batch_of(step: int, part: slice) -> tuple[Tensor, Tensor]:
            x, y = feed(picks(step, part))
            return self.images.augment_many(x, [training.seed_for(seed, stream, step) for seed in seeds[part]], base.flip,
                                            (base.crop_scale, 1.0)), y

        return batch_of, picks.per_epoch

    def criterion(self, outputs: Float[Tensor, "B classes"], wanted: Int64[Tensor, "B"]) -> Float[Tensor, ""]:
        return F.cross_entropy(outputs, wanted)

    def predictor(self, net: nn.Module, sub: Subset, device: torch.device, progress: bool = False) -> Predictor:
        """Classes [M N], by `evaluate.Evaluator`."""
        evaluator = evaluate.Evaluator(net, sub, self.images.x_test, prepare=self.images.prepare, device=device, progress=progress)
        dtype = torch.int16 if self.images.num_classes < 2**15 else torch.int32
        return lambda theta: evaluator.predict(theta).to(dtype)

    def warned(self, outputs: Integer[Tensor, "M N"]) -> Integer[Tensor, "M N"]:
        return evaluate.no_class_warned(outputs)

    def rehearse(self, net: nn.Module, sub: Subset, device: torch.device) -> None:
        evaluate.rehearse(net, sub, self.shape, device)

    def judged(self, outputs: Integer[Tensor, "M N"], originals: Tensor | None = None, items: Tensor | None = None) -> Judged:
        """Accuracy, and which images have another class than their own."""
        wrong = self._wrong(outputs)
        wrong = wrong if items is None else wrong[:, items]
        return Judged(evaluate.accuracy(wrong), wrong)

    def _wrong(self, outputs: Integer[Tensor, "M N"]) -> Tensor:
        return outputs != self.y_test.cpu()

    def summary(self, outputs: Integer[Tensor, "M N"], originals: Tensor | None = None, seed: int = 0) -> dict[str, float | int]:
        return evaluate.summary(self._wrong(outputs), seed)

    def start(self, net: nn.Module, sub: Subset, device: torch.device) -> dict[str, Tensor]:
        """How many of at most `START` test images the network gets right."""
        y = self.y_test
        pick = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:START]  # stored by class, often
        wrong = evaluate.wrong(net, sub, sub.flatten(net)[None], self.x_test[pick], y[pick], prepare=self.images.prepare, device=device)
        return {"right": (~wrong).sum(), "images": torch.tensor(len(pick))}

    def say_start(self, kept: dict[str, Tensor], source: str) -> None:
        y = self.y_test
        weights.judge(int(kept["right"]), int(kept["images"]), float(y.bincount().max() / len(y)), source, self.images.scale)


def task_of(source: data.Images | Task) -> Task:
    """The task itself, or that of classifying these images."""
    return source if isinstance(source, Task) else Classification(source)
