"""Images by name, folder or Parquet file, as uint8 tensors; resizing, normalising and augmenting them in batches."""

import difflib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm


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
    """

    name: str
    source: str
    x_train: UInt8[Tensor, "N C H W"]
    y_train: Int64[Tensor, "N"]
    x_test: UInt8[Tensor, "M C H W"]
    y_test: Int64[Tensor, "M"]
    classes: tuple[str, ...]
    size: int

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
        digest = hashlib.blake2b(json.dumps([self.size, self.classes]).encode(), digest_size=16)
        for x in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(json.dumps([str(x.dtype), *x.shape]).encode())
            digest.update(x.contiguous().numpy())
        return digest.hexdigest()

    @cached_property
    def _statistics(self) -> tuple[Float[Tensor, "C 1 1"], Float[Tensor, "C 1 1"]]:
        """Mean and std of each channel of the stored training images, in pixel units 0..255."""
        counts = torch.stack([torch.bincount(self.x_train[:, c].flatten(), minlength=256)
                              for c in range(self.channels)]).double()
        share, values = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
        mean = share @ values
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
        # At least one grey level, for channels that are constant.
        return mean.float()[:, None, None], std.clamp(min=1).float()[:, None, None]

    def _normalise(self, x: Float[Tensor, "B C s s"]) -> Float[Tensor, "B C s s"]:
        mean, std = (value.to(x.device) for value in self._statistics)
        return (x - mean).div_(std)

    def prepare(self, x: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B C s s"]:
        """Network inputs: resized to `size` (bilinear, antialiased) where needed, normalised by the training images.

        Args:
            x: images of this data set, on any device; pixels 0..255.

        Returns:
            float32 on the same device; over the training images each channel has mean 0 and std 1 before the resizing.

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
            scale: smallest and largest share of the image's area that is kept, 0 < smallest <= largest <= 1.

        Returns:
            float32 on the same device.

        Raises:
            ValueError: another type or number of channels, or an impossible scale.

        Source: RandomResizedCrop and flip of the paper's Table 5, with torchvision's defaults. One difference: a crop
            that would be wider or higher than the image is cut to it, where torchvision draws again.
        """
        self._check(x)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale = {scale}: expected 0 < smallest <= largest <= 1")
        generator = torch.Generator(x.device).manual_seed(generator_seed)
        return self._normalise(_random_crop(x.float(), self.size, generator, flip, scale))

    def _check(self, x: Tensor) -> None:
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images of type {x.dtype} and shape {list(x.shape)}: expected torch.uint8 "
                             f"[B, {self.channels}, h, w]")


def _random_crop(x: Float[Tensor, "B C h w"], size: int, generator: torch.Generator, flip: bool,
                 scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Float[Tensor, "B C s s"]:
    # By hand, as kornia's RandomResizedCrop takes its randomness from the global generator, loops over the images
    # (128 images of 32x32 on 2 cores: 7.6 ms to 32x32 and 21 ms to 64x64; here 0.7 and 9), and in its batched mode
    # resamples half a pixel off.
    b, c, h, w = x.shape
    u_area, u_ratio, u_x, u_y, u_flip = torch.rand(5, b, generator=generator, device=x.device)
    area = scale[0] + (scale[1] - scale[0]) * u_area
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u_ratio).exp() * h / w  # in shares of the two sides
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = x.new_zeros(b, 2, 3)  # output coordinates -1..1 -> input coordinates
    theta[:, 0, 0] = torch.where(u_flip < 0.5, -width, width) if flip else width
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * u_x - 1), (1 - height) * (2 * u_y - 1)
    grid = F.affine_grid(theta, [b, c, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class _Split(NamedTuple):
    """One split before any image is decoded."""

    labels: np.ndarray  # int64 [N]
    image: Callable[[int], Tensor]  # row -> uint8 [C h w]
    classes: tuple[str, ...]  # () where the source names none


class _Known(NamedTuple):
    """A data set that torchvision can fetch."""

    cls: str
    train: dict
    test: dict
    classes: int
    side: int | None  # None: every image has its own
    channels: int
    host: str
    marker: str  # what torchvision leaves in the root


_BY_SPLIT = {"split": "train"}, {"split": "test"}
_BY_FLAG = {"train": True}, {"train": False}
_KNOWN = {
    "cifar10": _Known("CIFAR10", *_BY_FLAG, 10, 32, 3, "cs.toronto.edu", "cifar-10-batches-py"),
    "cifar100": _Known("CIFAR100", *_BY_FLAG, 100, 32, 3, "cs.toronto.edu", "cifar-100-python"),
    "stl10": _Known("STL10", *_BY_SPLIT, 10, 96, 3, "ai.stanford.edu", "stl10_binary"),
    "mnist": _Known("MNIST", *_BY_FLAG, 10, 28, 1, "ossci-datasets.s3.amazonaws.com", "MNIST/raw"),
    "svhn": _Known("SVHN", *_BY_SPLIT, 10, 32, 3, "ufldl.stanford.edu", "train_32x32.mat"),
    "flowers": _Known("Flowers102", *_BY_SPLIT, 102, None, 3, "robots.ox.ac.uk", "flowers-102"),
    "pets": _Known("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, 37, None, 3, "robots.ox.ac.uk",
                   "oxford-iiit-pet"),
    "food101": _Known("Food101", *_BY_SPLIT, 101, None, 3, "data.vision.ee.ethz.ch", "food-101"),
    "imagenet": _Known("ImageNet", {"split": "train"}, {"split": "val"}, 1000, None, 3,
                       "image-net.org, by hand into <root>/imagenet", "imagenet/train"),
}


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("PDIFF_DATA") or "~/.cache/pdiff_lib/data").expanduser()


def load(name: str, size: int | None = None, channels: int | None = None, train_images: int = 0, test_images: int = 0,
         seed: int = 0, root: str | Path | None = None, download: bool = True) -> Images:
    """Load a data set; of a subset, only its own images are decoded.

    Args:
        name: "digits" (scikit-learn), a name of `catalogue()`, "A-train.parquet,A-test.parquet" (columns `image` and
            `label`, as Hugging Face writes them), or a folder with train/ and test/ or val/ of class folders.
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
    root, known = _root(root), _KNOWN.get(name)
    stored = [str(root / f"{name}-{part}.parquet") for part in ("train", "test")]
    if name == "digits":
        source, splits = "scikit-learn digits", _digits()
    elif known and any(map(os.path.exists, stored)):
        source, splits = f"Parquet files {', '.join(stored)}", [_parquet(file) for file in stored]
    elif known:
        source, splits = f"torchvision {known.cls}", _download(name, size, root, download)
    elif name.endswith(".parquet"):
        files = [part.strip() for part in name.split(",")]
        if len(files) != 2:
            raise ValueError(f"data {name!r}: expected two Parquet files, TRAIN.parquet,TEST.parquet")
        source, splits = f"Parquet files {', '.join(files)}", [_parquet(file) for file in files]
    elif name and Path(name).is_dir():
        source, splits = f"folder {name}", [_folder(Path(name), "train"), _folder(Path(name), "test", "val")]
    else:
        names = ["digits", *_KNOWN]
        close = difflib.get_close_matches(name, names, n=3)
        raise ValueError(f"data {name!r} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} "
                         f"Expected {', '.join(names)}, TRAIN.parquet,TEST.parquet, or an existing folder")
    classes = _classes(name, *splits)
    rows = [_subset(name, part, split.labels, n, seed)
            for part, split, n in zip(("train", "test"), splits, (train_images, test_images))]
    x = _decode_all(name, splits, rows, size, channels or (known.channels if known else None))
    y = [torch.from_numpy(split.labels[row]) for split, row in zip(splits, rows)]
    x_train, x_test = x.split([len(part) for part in y])
    return Images(name, source, x_train, y[0], x_test, y[1], classes, size or x.shape[-1])


def _digits() -> list[_Split]:
    from sklearn.datasets import load_digits  # here, as importing it takes more than a second

    bunch = load_digits()
    x = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    # RandomState, whose numbers NumPy promises never to change, so that this split stays the same everywhere.
    order = np.random.RandomState(0).permutation(len(x))
    return [_Split(bunch.target[rows].astype(np.int64), x[rows].__getitem__, tuple(map(str, bunch.target_names)))
            for rows in (order[:400], order[400:])]


def _download(name: str, size: int | None, root: Path, download: bool) -> list[_Split]:
    known = _KNOWN[name]
    if known.side is None and size is None:
        raise ValueError(f"size = None: the images of {name} differ in size; expected the side in pixels to fit")
    # ImageNet cannot be downloaded by torchvision, and fills its folder with class folders.
    place = {"root": root / name} if name == "imagenet" else {"root": root, "download": download}
    try:
        return [_from_torchvision(getattr(torchvision.datasets, known.cls)(**place, **kwargs))
                for kwargs in (known.train, known.test)]
    except Exception as error:
        raise RuntimeError(
            f"data {name!r} is not in {root} and could not be had from {known.host} ({type(error).__name__}: {error}). "
            f"Fetch it on a connected machine, or put {name}-train.parquet and {name}-test.parquet there") from error


def _from_torchvision(dataset: object) -> _Split:
    # torchvision's sets keep labels and pixels under several names
    labels = next(getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key))
    classes = [c if isinstance(c, str) else c[0] for c in getattr(dataset, "classes", ())]  # ImageNet: synonyms
    if hasattr(dataset, "data"):
        x = torch.as_tensor(dataset.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
        image = x.__getitem__
    else:
        def image(row: int) -> Tensor:
            return TF.pil_to_tensor(dataset[row][0])
    return _Split(np.asarray(labels, dtype=np.int64), image, tuple(classes))


def _folder(folder: Path, *names: str) -> _Split:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise ValueError(f"folder {folder}: expected a folder {' or '.join(names)} with one folder per class in it")
    try:
        dataset = torchvision.datasets.ImageFolder(found[0])
    except FileNotFoundError as error:
        raise ValueError(f"folder {found[0]}: expected one folder of images per class ({error})") from error
    files = [file for file, _ in dataset.samples]
    return _Split(np.asarray(dataset.targets), lambda row: _decode(Path(files[row]).read_bytes(), files[row]),
                  tuple(dataset.classes))


def _parquet(file: str) -> _Split:
    if not os.path.isfile(file):
        raise ValueError(f"Parquet file {file!r}: there is no such file")
    try:
        schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file ({error})") from error
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if not ({"image", "label"} <= set(schema.names) and pa.types.is_struct(schema.field("image").type)
            and schema.field("image").type.get_field_index("bytes") >= 0
            and pa.types.is_integer(schema.field("label").type)):
        raise ValueError(f"{file} has the columns {found}: expected image: struct<bytes, path> and label: int64")
    table = pq.read_table(file, columns=["image", "label"])
    data = pc.struct_field(table["image"], "bytes")
    labels = pc.fill_null(table["label"], -1).to_numpy().astype(np.int64)
    if (labels < 0).any():
        row = int((labels < 0).argmax())
        raise ValueError(f"{file}, row {row}: label {table['label'][row]}, expected a class number from 0")
    meta = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    classes = meta.get("info", {}).get("features", {}).get("label", {}).get("names", ())
    return _Split(labels, lambda row: _decode(data[row].as_py(), f"{file}, row {row}"), tuple(classes))


def _decode(data: bytes | None, where: str) -> UInt8[Tensor, "C h w"]:
    """One image in its own channels (1 or 3); torchvision takes half of Pillow's time but knows fewer formats."""
    try:
        buffer = torch.frombuffer(bytearray(data or b""), dtype=torch.uint8)
        # Of a PNG with a palette (colour type 3, byte 25), UNCHANGED would give the numbers of the palette's entries.
        palette = data[:4] == b"\x89PNG" and data[25:26] == b"\x03"
        image = decode_image(buffer, ImageReadMode.RGB if palette else ImageReadMode.UNCHANGED)
        if image.shape[0] in (2, 4):  # transparency, or CMYK
            image = decode_image(buffer, ImageReadMode.RGB if image.shape[0] == 4 else ImageReadMode.GRAY)
        return TF.to_dtype(image, torch.uint8, scale=True)
    except (RuntimeError, ValueError):
        try:
            image = Image.open(io.BytesIO(data or b""))
            return TF.pil_to_tensor(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
        except Exception as error:
            raise ValueError(f"{where}: this image is broken or missing ({error})") from error


def _classes(name: str, train: _Split, test: _Split) -> tuple[str, ...]:
    if not len(train.labels) or not len(test.labels):
        raise ValueError(f"data {name!r} has {len(train.labels)} training and {len(test.labels)} test images: expected "
                         "at least one of each")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or "the same in another order"
        raise ValueError(f"data {name!r}: the classes of training and test images differ: {odd}")
    highest = int(max(train.labels.max(), test.labels.max()))
    if train.classes and highest >= len(train.classes):
        raise ValueError(f"data {name!r}: label {highest}, expected less than the {len(train.classes)} named classes")
    return train.classes or tuple(map(str, range(highest + 1)))


def _subset(name: str, part: str, labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows of n random images (0: all), in their order; every class keeps its share to within one or two images."""
    if n > len(labels):
        raise ValueError(f"{part}_images = {n}: data {name!r} has {len(labels)}")
    if n == 0:
        return np.arange(len(labels))
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(order[np.argsort((rank + rng.rand(len(labels))) / np.repeat(counts, counts))[:n]])


def _decode_all(name: str, splits: list[_Split], rows: list[np.ndarray], size: int | None,
                channels: int | None) -> UInt8[Tensor, "N C H W"]:
    """The chosen images of both splits: as they are if all are squares of one size, else brought to `size`."""
    jobs = [(split, int(row)) for split, part in zip(splits, rows) for row in part]
    given, fit, out = channels, False, None
    for i, (split, row) in enumerate(tqdm(jobs, desc=f"loading {name}", disable=len(jobs) <= 5000)):
        image = split.image(row)
        channels = channels or image.shape[0]
        if image.shape[0] != channels and given is None:
            raise ValueError(f"data {name!r} mixes grey and colour images (row {row}): expected channels = 1 or 3")
        if image.shape[0] == 3 and channels == 1:
            image = TF.rgb_to_grayscale(image)
        h, w = image.shape[1:]
        if not fit and (h != w or out is not None and h != out.shape[-1]):
            if size is None:
                raise ValueError(f"data {name!r}: size = None, but the images differ in size or are not square (row "
                                 f"{row}: {h}x{w}); expected the side in pixels to fit them to")
            fit = True
            if out is not None:  # all were alike so far
                done, out = out[:i], out.new_empty(len(jobs), channels, size, size)
                for k in range(i):
                    out[k] = _fit(done[k], size)
        image = _fit(image, size) if fit else image
        out = torch.empty(len(jobs), channels, *image.shape[1:], dtype=torch.uint8) if out is None else out
        out[i] = image  # a grey image fills all channels
    return out


def _fit(image: UInt8[Tensor, "C h w"], size: int) -> UInt8[Tensor, "C s s"]:
    """The shorter side brought to `size`, then the middle square."""
    return TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])


def catalogue(root: str | Path | None = None) -> list[dict]:
    """What `load` knows by name: rows of name, classes, source, image_size, present (bool) and where (path, or "")."""
    root = _root(root)
    rows = [dict(name="digits", classes=10, source="scikit-learn", image_size="8x8", present=True,
                 where="scikit-learn")]
    for name, known in _KNOWN.items():
        stored = all((root / f"{name}-{part}.parquet").exists() for part in ("train", "test"))
        where = f"{root / name}-*.parquet" if stored else str(root / known.marker)
        present = stored or (root / known.marker).exists()
        rows.append(dict(name=name, classes=known.classes, source=f"torchvision {known.cls} ({known.host})",
                         image_size=f"{known.side}x{known.side}" if known.side else "varies", present=present,
                         where=where if present else ""))
    return rows


def halves(n: int, seed: int = 0) -> tuple[Int64[Tensor, "S"], Int64[Tensor, "R"]]:
    """Random halves of n test images: one to select the best network on, the other to report its accuracy on.

    Returns:
        Sorted indices of the selecting (n // 2) and of the reporting half; together 0..n-1.
    """
    if n < 2:
        raise ValueError(f"n = {n}: expected at least 2 images")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:n // 2].sort().values, order[n // 2:].sort().values


def epoch_order(n: int, epoch: int, seed: int) -> Int64[Tensor, "n"]:
    """The order in which one epoch visits n images: a function of (seed, epoch) alone, so that a resumed run repeats.

    >>> epoch_order(5, epoch=3, seed=0).equal(epoch_order(5, epoch=3, seed=0))
    True
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])  # neighbours become unrelated
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
