"""The data sets that are known by name, and where they are on this machine: all without opening one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Known(NamedTuple):
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
KNOWN = {
    "cifar10": Known("CIFAR10", *_BY_FLAG, 10, 32, 3, "cs.toronto.edu", "cifar-10-batches-py"),
    "cifar100": Known("CIFAR100", *_BY_FLAG, 100, 32, 3, "cs.toronto.edu", "cifar-100-python"),
    "stl10": Known("STL10", *_BY_SPLIT, 10, 96, 3, "ai.stanford.edu", "stl10_binary"),
    "mnist": Known("MNIST", *_BY_FLAG, 10, 28, 1, "ossci-datasets.s3.amazonaws.com", "MNIST/raw"),
    "fashion-mnist": Known("FashionMNIST", *_BY_FLAG, 10, 28, 1, "fashion-mnist.s3-website.eu-central-1.amazonaws.com", "FashionMNIST/raw"),
    "svhn": Known("SVHN", *_BY_SPLIT, 10, 32, 3, "ufldl.stanford.edu", "train_32x32.mat"),
    "flowers": Known("Flowers102", *_BY_SPLIT, 102, None, 3, "robots.ox.ac.uk", "flowers-102"),
    "pets": Known("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, 37, None, 3, "robots.ox.ac.uk",
                  "oxford-iiit-pet"),
    "food101": Known("Food101", *_BY_SPLIT, 101, None, 3, "data.vision.ee.ethz.ch", "food-101"),
    "imagenet": Known("ImageNet", {"split": "train"}, {"split": "val"}, 1000, None, 3,
                      "image-net.org, by hand into <root>/imagenet", "imagenet/train"),
}


def root_of(root: str | Path | None) -> Path:
    """The folder of the downloads: the one given, $PDIFF_DATA, or one in the user's cache."""
    return Path(root or os.environ.get("PDIFF_DATA") or "~/.cache/pdiff_lib/data").expanduser()


def catalogue(root: str | Path | None = None) -> list[dict]:
    """What `data.load` knows by name: rows of name, classes, source, image_size, present (bool) and where (path, or "")."""
    root = root_of(root)
    rows = [dict(name="digits", classes=10, source="scikit-learn", image_size="8x8", present=True,
                 where="scikit-learn"),
            dict(name="scenes", classes=10, source="digits on scikit-learn's photographs; scenes:OBJECTS@PHOTOGRAPHS of others",
                 image_size="any", present=True, where="made here")]
    for name, known in KNOWN.items():
        stored = all((root / f"{name}-{part}.parquet").exists() for part in ("train", "test"))
        where = f"{root / name}-*.parquet" if stored else str(root / known.marker)
        present = stored or (root / known.marker).exists()
        rows.append(dict(name=name, classes=known.classes, source=f"torchvision {known.cls} ({known.host})",
                         image_size=f"{known.side}x{known.side}" if known.side else "varies", present=present,
                         where=where if present else ""))
    return rows
