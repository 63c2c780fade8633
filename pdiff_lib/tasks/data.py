"""Images by name, folder or Parquet file, as uint8 tensors; resizing, normalising and augmenting them in batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pdiff_lib.base.known import catalogue as catalogue
from pdiff_lib.tasks import scenes, sources
from pdiff_lib.tasks.order import epoch_order as epoch_order  # part of the module's face


@dataclass(frozen=True, eq=False)
class Images:
    """A data set for classification, kept as it was stored (uint8); `prepare` and `augment` make network inputs of it.

    Attributes:
        name: what `load` was asked for.
        source: where the images come from.
        x_train, x_test: pixels 0..255.
        y_train, y_test: labels 0..num_classes-1.
        classes: their names.
        size: side in pixels of the network inputs.
        mean, std: of the network inputs per channel, for pixels 0..1; (): those of the training images. See `scaled`.

    Raises:
        ValueError: not a label for each image, or a label that is no number of a class.
    """

    name: str
    source: str
    x_train: UInt8[Tensor, "N C H W"]
    y_train: Int64[Tensor, "N"]
    x_test: UInt8[Tensor, "M C H W"]
    y_test: Int64[Tensor, "M"]
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        for part, x, y in (("training", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            if len(x) != len(y):
                raise ValueError(f"{len(y)} labels for {len(x)} {part} images: expected one for each")
            if len(y) and not 0 <= y.min() <= y.max() < len(self.classes):
                raise ValueError(f"{part} labels from {y.min()} to {y.max()}: expected 0 to {len(self.classes) - 1}, as there "
                                 f"are {len(self.classes)} classes")

    def scaled(self, mean: Sequence[float], std: Sequence[float]) -> Images:
        """The same images for a network that was trained on another input scale: (pixel / 255 - mean) / std.

        Args:
            mean, std: per channel, or one for all; of grey images also three, which are averaged (std as variances).

        Raises:
            ValueError: another number of them, or a std that is not above 0.
        """
        given = torch.tensor([list(mean), list(std)], dtype=torch.float64) if len(mean) == len(std) else torch.empty(2, 0)
        fits = given.shape[1] in (1, self.channels) or (given.shape[1], self.channels) == (3, 1)
        if not fits or not ((given >= 0) & (given[1] > 0) & (given[0] <= 1)).all():
            raise ValueError(f"input_mean {list(mean)} and input_std {list(std)}: expected {self.channels} numbers each, one per "
                             "channel, or one; for pixels from 0 to 1, so mean from 0 to 1 and std above 0")
        if self.channels == 1:
            given = torch.stack([given[0].mean(), given[1].square().mean().sqrt()])[:, None]
        own = [tuple(part.expand(self.channels).tolist()) for part in given]
        return replace(self, mean=own[0], std=own[1])

    @property
    def input_scale(self) -> tuple[list[float], list[float]]:
        """Mean and std per channel that `prepare` works with, for pixels from 0 to 1."""
        return tuple((values.flatten() / 255).tolist() for values in self._statistics)

    @property
    def scale(self) -> str:
        """The scale of the network inputs, in words."""
        if not self.mean:
            return "each channel has mean 0 and standard deviation 1 over the training images"
        return "; ".join(f"{name} {', '.join(f'{v:.4g}' for v in values)}" for name, values in
                         (("mean", self.mean), ("std", self.std))) + " of pixels from 0 to 1"

    @property
    def channels(self) -> int:
        """C: 1 or 3."""
        return self.x_train.shape[1]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """32 hex digits that change with any pixel, label, class name or the size (not with `name` and `source`)."""
        return self._digest(self.x_train, self.y_train, self.x_test, self.y_test)

    @cached_property
    def training_digest(self) -> str:
        """`digest`, whatever the test images are: of all that training sees."""
        return self._digest(self.x_train, self.y_train)

    def _digest(self, *tensors: Tensor) -> str:
        scale = [self.mean, self.std] if self.mean else []
        digest = hashlib.blake2b(json.dumps([self.size, self.classes, *scale]).encode(), digest_size=16)
        for x in tensors:
            digest.update(json.dumps([str(x.dtype), *x.shape]).encode())
            digest.update(x.contiguous().numpy())
        return digest.hexdigest()

    @cached_property
    def _statistics(self) -> tuple[Float[Tensor, "C 1 1"], Float[Tensor, "C 1 1"]]:
        """Mean and std of each channel, in pixel units 0..255: of the stored training images, where none are given."""
        if self.mean:
            return tuple(255 * torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        counts = torch.stack([torch.bincount(self.x_train[:, c].flatten(), minlength=256)
                              for c in range(self.channels)]).double()
        share, values = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
        mean = share @ values
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
        # At least one grey level, for channels that are constant.
        return mean.float()[:, None, None], std.clamp(min=1).float()[:, None, None]

    @cached_property
    def _statistics_on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _normalise(self, x: Float[Tensor, "B C s s"]) -> Float[Tensor, "B C s s"]:
        if x.device not in self._statistics_on:  # copied once: a copy in every step would make a GPU wait
            self._statistics_on[x.device] = tuple(value.to(x.device) for value in self._statistics)
        mean, std = self._statistics_on[x.device]
        return (x - mean).div_(std)

    def prepare(self, x: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B C s s"]:
        """Network inputs: resized to `size` (bilinear, antialiased) where needed, normalised (`scale`).

        Args:
            x: images of this data set, on any device; pixels 0..255.

        Returns:
            float32 on the same device; unless a scale is given, each channel has mean 0 and std 1 over the training images,
            before the resizing.

        Raises:
            ValueError: another type or number of channels.
        """
        self._check(x)
        x = x.float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self._normalise(x)

    def augment(self, x: UInt8[Tensor, "B C h w"], generator_seed: int, flip: bool,
                scale: tuple[float, float] = (0.08, 1.0)) -> Float[Tensor, "B C s s"]:
        """Network inputs for training: every image cropped and mirrored at random, resized to `size`, normalised.

        Args:
            x: images of this data set, on any device; pixels 0..255.
            generator_seed: decides everything random (differently on CPU and GPU), so that a resumed run repeats.
            flip: mirror half of the images, left to right.
            scale: smallest and largest share of the image's area that is kept, 0 < smallest <= largest <= 1. From 1 on, and
                without mirroring, images stay as they are.

        Returns:
            float32 on the same device.

        Raises:
            ValueError: another type or number of channels, or an impossible scale.

        Source: RandomResizedCrop and flip of the paper's Table 5, with torchvision's defaults. One difference: a crop
            that would be wider or higher than the image is cut to it, where torchvision draws again.
        """
        self._check(x)
        return self.augment_many(x[None], [generator_seed], flip, scale)[0]

    def augment_many(self, x: UInt8[Tensor, "K B C h w"], seeds: Sequence[int], flip: bool,
                     scale: tuple[float, float] = (0.08, 1.0)) -> Float[Tensor, "K B C s s"]:
        """`augment` of K batches with a seed each, for networks that are trained together, in one pass over all images.

        Args:
            x: a batch of images for each network.
            seeds: one for each batch: `augment_many(x, seeds, ...)[k]` is `augment(x[k], seeds[k], ...)`.
            flip, scale: as in `augment`.

        Returns:
            float32 on the same device.

        Raises:
            ValueError: another type or number of channels, not a seed for each batch, or an impossible scale.
        """
        self._check(x, "K, B")
        if len(seeds) != len(x) or not len(x) or not x.shape[1]:
            raise ValueError(f"{len(seeds)} seeds for {len(x)} batches of {x.shape[1]} images: expected a seed for each of at "
                             "least one batch, and no empty ones")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale = {scale}: expected 0 < smallest <= largest <= 1")
        if scale[0] == 1 and not flip:
            return self.prepare(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        drawn = [torch.rand(5, x.shape[1], generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
                 for seed in seeds]
        out = self._normalise(_random_crop(x.flatten(0, 1).float(), self.size, torch.cat(drawn, 1), flip, scale))
        return out.unflatten(0, x.shape[:2])

    def _check(self, x: Tensor, axes: str = "B") -> None:
        wrong = not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim != axes.count(",") + 4
        if wrong or x.shape[-3] != self.channels or 0 in x.shape[-2:]:
            found = f"type {getattr(x, 'dtype', type(x).__name__)} and shape {list(getattr(x, 'shape', []))}"
            raise ValueError(f"images of {found}: expected torch.uint8 [{axes}, {self.channels}, h, w]")


def _random_crop(x: Float[Tensor, "n C h w"], size: int, drawn: Float[Tensor, "5 n"], flip: bool,
                 scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Float[Tensor, "n C s s"]:
    """Crops decided by five numbers 0..1 for each image: area, ratio of the sides, place (two), mirrored below 1/2."""
    # By hand, as kornia's RandomResizedCrop takes its randomness from the global generator, loops over the images
    # (128 images of 32x32 on 2 cores: 7.6 ms to 32x32 and 21 ms to 64x64; here 0.7 and 9), and in its batched mode
    # resamples half a pixel off.
    b, c, h, w = x.shape
    u_area, u_ratio, u_x, u_y, u_flip = drawn
    area = scale[0] + (scale[1] - scale[0]) * u_area
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u_ratio).exp() * h / w  # in shares of the two sides
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = x.new_zeros(b, 2, 3)  # output coordinates -1..1 -> input coordinates
    theta[:, 0, 0] = torch.where(u_flip < 0.5, -width, width) if flip else width
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * u_x - 1), (1 - height) * (2 * u_y - 1)
    grid = F.affine_grid(theta, [b, c, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def load(name: str, size: int | None = None, channels: int | None = None, train_images: int = 0, test_images: int = 0,
         seed: int = 0, root: str | Path | None = None, download: bool = True) -> Images | scenes.Scenes:
    """Load a data set; of a subset, only its own images are decoded.

    Args:
        name: "digits" (scikit-learn), a name of `catalogue()`, "A-train.parquet,A-test.parquet" (columns `image` and
            `label`, as Hugging Face writes them: see `files.parquet`), or a folder with train/ and test/ or val/ of class
            folders (`files.folder`: without hidden and system folders and files, and nothing outside of it is read).
            What an image file means is the same everywhere (`decode.decode`): the first frame, upright as its EXIF says,
            without transparency, 16 bits as value / 257; floats and more than 89,478,485 pixels are refused. Labels
            are 0, 1, 2, ... without a gap, unless the source names its classes. "scenes", or "scenes:OBJECTS@PHOTOGRAPHS": `scenes.load`.
        size: side in pixels of the network inputs; None: the stored one. Images that differ in size, or are not
            square, are resized and cropped to it on loading: then it must be given.
        channels: 1 (luminance) or 3 (grey repeated); None: the stored ones.
        train_images, test_images: size of a random subset with the classes' shares kept; 0: all.
        seed: of the subsets.
        root: folder of the downloads, and of `<name>-train.parquet` and `<name>-test.parquet`, which come first;
            None: $PDIFF_DATA, else ~/.cache/pdiff_lib/data.
        download: fetch with torchvision what is not there yet.

    Raises:
        ValueError: unknown name, an impossible setting, or files that do not hold what they should.
        RuntimeError: the data set is not there and cannot be downloaded.
    """
    if min(train_images, test_images) < 0 or channels not in (None, 1, 3) or (size is not None and size < 1):
        raise ValueError(f"train_images = {train_images}, test_images = {test_images}, channels = {channels}, size = "
                         f"{size}: expected numbers of images from 0, channels 1, 3 or None, a size from 1 or None")
    if scenes.is_made(name):
        return scenes.load(name, size or 64, train_images, test_images, seed, root, download)
    source, splits, own = sources.find(name, size, sources.root_of(root), download)
    classes = sources.classes_of(name, *splits)
    rows = [sources.subset_of(name, part, split.labels, n, seed)
            for part, split, n in zip(("train", "test"), splits, (train_images, test_images))]
    x = sources.decode_all(name, splits, rows, size, channels or own)
    y = [torch.from_numpy(split.labels[row]) for split, row in zip(splits, rows)]
    x_train, x_test = x.split([len(part) for part in y])
    return Images(name, source, x_train, y[0], x_test, y[1], classes, size or x.shape[-1])
