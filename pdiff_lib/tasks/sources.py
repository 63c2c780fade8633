"""Where images come from: scikit-learn, torchvision, Parquet files, folders; found, checked and decoded, uint8."""

import difflib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from pdiff_lib.base.known import KNOWN, Known, root_of as root_of
from pdiff_lib.tasks import files
from pdiff_lib.tasks.decode import MOST_PIXELS, upright
from pdiff_lib.tasks.files import Split


def find(name: str, size: int | None, root: Path, download: bool) -> tuple[str, list[Split], int | None]:
    """What `name` means (see `data.load`).

    Returns:
        The source in words, its training and test split, and the channels where the name decides them.

    Raises:
        ValueError: unknown name, or files that do not hold what they should.
        RuntimeError: the data set is not there and cannot be downloaded.
    """
    known = KNOWN.get(name)
    stored = [str(root / f"{name}-{part}.parquet") for part in ("train", "test")]
    channels = known.channels if known else None
    if name == "digits":
        return "scikit-learn digits", _digits(), channels
    if name and any(map(os.path.exists, stored)):
        return _parquets(stored), [files.parquet(file) for file in stored], channels
    if known:
        return f"torchvision {known.cls}", _download(name, size, root, download), channels
    if name.endswith(".parquet"):
        both = re.split(r"(?<=\.parquet)\s*,\s*", name.strip())  # names of folders may hold commas
        if len(both) != 2:
            raise ValueError(f"data {name!r}: expected two Parquet files, TRAIN.parquet,TEST.parquet")
        return _parquets(both), [files.parquet(file) for file in both], channels
    if name and Path(name).is_dir():
        place = Path(name)
        splits = [files.folder(place, "train"), files.folder(place, "test", "val")]
        return f"folder {place.resolve().name}", splits, channels
    names = ["digits", *KNOWN]
    close = difflib.get_close_matches(name, names, n=3)
    raise ValueError(f"data {name!r} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} "
                     f"Expected {', '.join(names)}, TRAIN.parquet,TEST.parquet, or an existing folder")


def _parquets(both: list[str]) -> str:
    # Without folders: this text ends up in records, which are shared.
    return f"Parquet files {', '.join(Path(file).name for file in both)}"


def _digits() -> list[Split]:
    from sklearn.datasets import load_digits  # here, as importing it takes more than a second

    bunch = load_digits()
    x = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    # RandomState, whose numbers NumPy promises never to change, so that this split stays the same everywhere.
    order = np.random.RandomState(0).permutation(len(x))
    return [Split(bunch.target[rows].astype(np.int64), x[rows].__getitem__, tuple(map(str, bunch.target_names)),
                  "digit {}".format) for rows in (order[:400], order[400:])]


def _download(name: str, size: int | None, root: Path, download: bool) -> list[Split]:
    known = KNOWN[name]
    if known.side is None and size is None:
        raise ValueError(f"size = None: the images of {name} differ in size; expected the side in pixels to fit")
    # ImageNet cannot be downloaded by torchvision, and fills its folder with class folders.
    place = {"root": root / name} if name == "imagenet" else {"root": root, "download": download}
    try:
        both = [getattr(torchvision.datasets, known.cls)(**place, **kwargs) for kwargs in (known.train, known.test)]
    except Exception as error:
        raise RuntimeError(
            f"data {name!r} is not in {root} and could not be had from {known.host} ({type(error).__name__}: {error}). "
            f"Fetch it on a connected machine, or put {name}-train.parquet and {name}-test.parquet there") from error
    return [_from_torchvision(known, dataset, part) for dataset, part in zip(both, ("training", "test"))]


def _from_torchvision(known: Known, dataset: object, part: str) -> Split:
    # torchvision's sets keep labels and pixels under several names
    labels = np.asarray(next(getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)))
    if labels.dtype.kind not in "iu":
        raise ValueError(f"torchvision {known.cls}: labels of type {labels.dtype}, expected class numbers from 0")
    classes = [c if isinstance(c, str) else c[0] for c in getattr(dataset, "classes", ())]  # ImageNet: synonyms
    if hasattr(dataset, "data"):
        x = torch.as_tensor(dataset.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
        image = x.__getitem__
    else:
        def image(row: int) -> Tensor:
            picture = dataset[row][0]
            return upright(TF.pil_to_tensor(picture), picture)
    return Split(labels.astype(np.int64), image, tuple(classes) or tuple(map(str, range(known.classes))),
                 f"torchvision {known.cls}, {part} image {{}}".format)


def classes_of(name: str, train: Split, test: Split) -> tuple[str, ...]:
    """The names of the classes (their numbers where the source names none); refuses splits that do not agree."""
    if not len(train.labels) or not len(test.labels):
        raise ValueError(f"data {name!r} has {len(train.labels)} training and {len(test.labels)} test images: expected "
                         "at least one of each")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or "the same in another order"
        raise ValueError(f"data {name!r}: the classes of training and test images differ: {odd}")
    lowest, highest = (int(pick([pick(split.labels) for split in (train, test)])) for pick in (np.min, np.max))
    if lowest < 0:
        raise ValueError(f"data {name!r}: label {lowest}, expected class numbers from 0")
    if train.classes:
        if highest >= len(train.classes):
            raise ValueError(f"data {name!r}: label {highest}, expected less than the {len(train.classes)} named classes")
        return train.classes
    used = set(np.unique(train.labels).tolist())
    mend = ("Expected the numbers 0, 1, 2, ... without a gap: number the classes anew and leave out images to be ignored, "
            "or name the classes in the Parquet files (metadata `huggingface`)")
    if missing := max(used) + 1 - len(used):
        unused = (label for label in range(max(used)) if label not in used)
        found = f"training labels go up to {max(used)}, but no image has {_few(unused, missing)}"
        raise ValueError(f"data {name!r}: {found}. {mend}")
    if strange := sorted(set(np.unique(test.labels).tolist()) - used):
        raise ValueError(f"data {name!r}: no training image has the test labels {_few(strange, len(strange))}. {mend}")
    return tuple(map(str, range(len(used))))


def _few(numbers: Iterable[int], count: int) -> str:
    return ", ".join(map(str, itertools.islice(numbers, 10))) + (f" and {count - 10:,} more" if count > 10 else "")


def subset_of(name: str, part: str, labels: np.ndarray, n: int, seed: int) -> np.ndarray:
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


def decode_all(name: str, splits: list[Split], rows: list[np.ndarray], size: int | None,
               channels: int | None) -> UInt8[Tensor, "N C H W"]:
    """The chosen images of both splits: as they are if all are squares of one size, else brought to `size`."""
    jobs = [(split, int(row)) for split, part in zip(splits, rows) for row in part]
    given, fit, out = channels, False, None
    for i, (split, row) in enumerate(tqdm(jobs, desc=f"loading {name}", disable=len(jobs) <= 5000)):
        image = split.image(row)
        channels = channels or image.shape[0]
        if image.shape[0] != channels and given is None:
            raise ValueError(f"{split.where(row)}: data {name!r} mixes grey and colour images (row {row}): expected channels "
                             "= 1 or 3")
        if image.shape[0] == 3 and channels == 1:
            image = TF.rgb_to_grayscale(image)
        h, w = image.shape[1:]
        if not fit and (h != w or out is not None and h != out.shape[-1]):
            if size is None:
                raise ValueError(f"data {name!r}: size = None, but the images differ in size or are not square "
                                 f"({split.where(row)}: {h}x{w}); expected the side in pixels to fit them to")
            fit = True
            if out is not None:  # all were alike so far
                done, out = out[:i], _room(name, len(jobs), channels, size)
                for k in range(i):
                    out[k] = _fit(done[k], size)
        if fit and size * size * max(h, w) > MOST_PIXELS * min(h, w):
            raise ValueError(f"{split.where(row)}: {h}x{w} pixels with the shorter side brought to {size} would be more than "
                             f"{MOST_PIXELS:,}: expected sides that differ less")
        image = _fit(image, size) if fit else image
        out = _room(name, len(jobs), channels, image.shape[-1]) if out is None else out
        out[i] = image  # a grey image fills all channels
    return out


def _room(name: str, n: int, channels: int, side: int) -> UInt8[Tensor, "N C s s"]:
    try:
        return torch.empty(n, channels, side, side, dtype=torch.uint8)
    except RuntimeError as error:
        size = f"{n * channels * side**2 / 1e9:.0f} GB"
        raise ValueError(f"data {name!r}: {n} images of {channels}x{side}x{side} are {size}, more than the memory: expected a "
                         "smaller size, or fewer images") from error


def _fit(image: UInt8[Tensor, "C h w"], size: int) -> UInt8[Tensor, "C s s"]:
    """The shorter side brought to `size`, then the middle square."""
    return TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])
