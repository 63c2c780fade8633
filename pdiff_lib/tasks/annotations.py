"""Scenes of one's own: images with boxes (and masks) in COCO's format, or in a folder of Pascal VOC."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from pdiff_lib.base.extras import extra
from pdiff_lib.tasks.decode import decode

NOTHING, NOT_COUNTED = -1, 255  # the class of no object; what masks say of pixels that are not judged
VOC_BORDER = 255  # what Pascal VOC's masks say of pixels that do not count


class Picture(NamedTuple):
    """An image that is annotated, before it is decoded."""

    file: Path
    objects: list[tuple[tuple[float, float, float, float], str, bool]]  # left, top, right, lower edge in pixels; class; not counted
    mask: Callable[[tuple[int, int], tuple[str, ...]], Tensor] | None  # (height, width), classes -> UInt8 [h w]


Part = tuple[UInt8[Tensor, "N 3 s s"], Float[Tensor, "N O 6"], UInt8[Tensor, "N a a"]]


def load(name: str, size: int, train_images: int, test_images: int, seed: int) -> tuple[Any, ...]:
    """Annotated images, each brought into a square: scaled to fit, in its middle, on black.

    Args:
        name: TRAIN.json,TEST.json in COCO's format ("instances"; images beside the file or in `images/`, or where `file_name` leads from
            there), or a folder as Pascal VOC has it (Annotations/, JPEGImages/, ImageSets/Main/train.txt and val.txt, and
            SegmentationClass/ where there are masks).
        size: side in pixels.
        train_images, test_images: how many, at random; 0: all.
        seed: of these.

    Returns:
        Images [N 3 s s], objects [N O 6] (as `scenes.Scenes` has them) and masks [N s s] ([N 0 0]: none) for training, the same for
        testing, and the names of the classes: those of training, sorted as the file has them (COCO) or by name.

    Raises:
        ValueError: no such file or folder, no image with an object, a box outside its image or without an area, an object without a known
            class, a mask of another size than its image.
    """
    both = [part.strip() for part in name.split(".json,")]
    if len(both) == 2 and name.endswith(".json"):
        read = [_coco(Path(file)) for file in (both[0] + ".json", both[1])]
    elif Path(name).is_dir() and (Path(name) / "Annotations").is_dir():
        read = [_voc(Path(name), part) for part in ("train", "val")]
    else:
        raise ValueError(f"data {name!r}: expected 'scenes', 'scenes:OBJECTS@PHOTOGRAPHS', TRAIN.json,TEST.json (COCO's format), or a folder of "
                         "Pascal VOC with Annotations/ in it")
    classes = read[0][1]
    if odd := [c for c in read[1][1] if c not in classes]:
        raise ValueError(f"data {name!r}: class {odd[0]!r} of the test images is not among the training images' ({len(classes)}: "
                         f"{', '.join(classes[:5])}, ...)")
    parts = []
    for (pictures, _), n, part in zip(read, (train_images, test_images), ("train", "test")):
        if n > len(pictures):
            raise ValueError(f"{part}_images = {n}: data {name!r} has {len(pictures)} that are annotated")
        order = np.sort(np.random.RandomState(seed).permutation(len(pictures))[:n or len(pictures)])
        parts += _decoded([pictures[i] for i in order], size, classes)
    return (*parts, classes)


def coco() -> ModuleType:
    """The library that reads COCO's masks and computes its AP.

    Raises:
        ValueError: it is not installed.
    """
    return extra("faster_coco_eval", "faster-coco-eval", "COCO's masks and AP need", "vision")


def _checked(picture: Picture, width: int | float, height: int | float) -> Picture:
    for box, label, _ in picture.objects:
        x0, y0, x1, y1 = box
        # COCO's own files round outwards, by less than a pixel.
        if not (-1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1):
            raise ValueError(f"{picture.file.name}: box {[round(v, 2) for v in box]} of {label!r}: expected left < right and top < bottom within "
                             f"0 to {width:g} and 0 to {height:g}, the image's sides")
    return picture


def _coco(file: Path) -> tuple[list[Picture], tuple[str, ...]]:
    try:
        held = json.loads(file.read_text())
        images, notes, categories = held["images"], held["annotations"], held["categories"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.name}: expected a JSON file with images, annotations and categories (COCO's format): "
                         f"{type(error).__name__}: {error}") from error
    if not images or not notes:
        raise ValueError(f"{file.name} has {len(images)} images and {len(notes)} annotations: expected at least one of each")
    names = {c["id"]: c["name"] for c in categories}
    found: dict[int, list] = {image["id"]: [] for image in images}
    for note in notes:
        if note["category_id"] not in names:
            raise ValueError(f"{file.name}: annotation {note.get('id')} has category {note['category_id']!r}, which has no name there: expected "
                             f"one of {sorted(names)[:10]}")
        if note["image_id"] not in found:
            raise ValueError(f"{file.name}: annotation {note.get('id')} belongs to image {note['image_id']!r}, which is not there")
        found[note["image_id"]].append(note)
    pictures = []
    for image in images:
        if not (mine := found[image["id"]]):
            continue
        path = next((p for p in (file.parent / image["file_name"], file.parent / "images" / image["file_name"]) if p.exists()), None)
        if path is None:
            raise ValueError(f"{file.name}: no image {image['file_name']!r} beside the file, nor in images/")
        objects = [((x, y, x + w, y + h), names[n["category_id"]], bool(n.get("iscrowd", 0))) for n in mine for x, y, w, h in [n["bbox"]]]
        shapes = [(n.get("segmentation"), names[n["category_id"]], bool(n.get("iscrowd", 0))) for n in mine]
        mask = (lambda sides, classes, shapes=shapes: _drawn(shapes, sides, classes)) if all(shape for shape, _, _ in shapes) else None
        pictures.append(_checked(Picture(path, objects, mask), image["width"], image["height"]))
    return pictures, tuple(names.values())


def _drawn(shapes: list[tuple], sides: tuple[int, int], classes: tuple[str, ...]) -> UInt8[Tensor, "h w"]:
    """A mask from COCO's polygons and run lengths; smaller objects before larger ones, what is not counted behind all."""
    rle, drawn = coco().mask, []
    for shape, label, crowd in shapes:
        runs = rle.frPyObjects(shape, *sides)
        one = torch.from_numpy(rle.decode(rle.merge(runs) if isinstance(runs, list) else runs)).bool()
        if one.shape != sides:
            raise ValueError(f"a mask of {list(one.shape)} pixels on an image of {list(sides)}: expected the same")
        drawn.append((crowd, int(one.sum()), one, NOT_COUNTED if crowd else 1 + classes.index(label)))
    out = torch.zeros(sides, dtype=torch.uint8)
    for _, _, one, value in sorted(drawn, key=lambda d: (not d[0], -d[1])):
        out[one] = value
    return out


def _voc(place: Path, part: str) -> tuple[list[Picture], tuple[str, ...]]:
    from xml.etree import ElementTree

    listed = place / "ImageSets" / "Main" / f"{part}.txt"
    if not listed.is_file():
        raise ValueError(f"folder {place.name}: no ImageSets/Main/{part}.txt, which says which images are for "
                         f"{'training' if part == 'train' else 'testing'}")
    pictures = []
    for stem in listed.read_text().split():
        file = place / "Annotations" / f"{stem}.xml"
        try:
            tree = ElementTree.parse(file).getroot()
            sides = [float(tree.find(f"size/{side}").text) for side in ("width", "height")]
            objects = [(tuple(float(o.find(f"bndbox/{edge}").text) - shift for edge, shift in (("xmin", 1), ("ymin", 1), ("xmax", 0), ("ymax", 0))),
                        (o.find("name").text or "").strip(), bool(int(o.findtext("difficult", "0")))) for o in tree.findall("object")]
        except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name}: expected an annotation of Pascal VOC (size, and objects with name and bndbox): "
                             f"{type(error).__name__}: {error}") from error
        if any(not label for _, label, _ in objects):
            raise ValueError(f"{file.name}: an object without a name: expected the name of its class")
        drawn = place / "SegmentationClass" / f"{stem}.png"
        pictures.append(_checked(Picture(place / "JPEGImages" / f"{stem}.jpg", objects, _painted(drawn) if drawn.is_file() else None), *sides))
    if not any(p.objects for p in pictures):
        raise ValueError(f"{listed.name} of folder {place.name} lists {len(pictures)} images without an object: expected at least one with some")
    return pictures, tuple(sorted({label for p in pictures for _, label, _ in p.objects}))


def _painted(file: Path) -> Callable[[tuple[int, int], tuple[str, ...]], Tensor]:
    """The mask in a PNG file with a palette: 0 for none, then the classes by name, as Pascal VOC numbers its twenty."""
    from PIL import Image

    def mask(sides: tuple[int, int], classes: tuple[str, ...]) -> UInt8[Tensor, "h w"]:
        found = torch.from_numpy(np.array(Image.open(file)))
        if found.shape != sides:
            raise ValueError(f"{file.name} has {list(found.shape)} pixels: expected {list(sides)}, the sides of its image")
        if odd := [int(v) for v in found.unique() if v > len(classes) and v != VOC_BORDER]:
            raise ValueError(f"{file.name} holds class {odd[0]}: expected 0 to {len(classes)}, or {VOC_BORDER} for pixels that do not count")
        return found

    return mask


def _decoded(pictures: list[Picture], size: int, classes: tuple[str, ...]) -> Part:
    most = max(len(p.objects) for p in pictures)
    masked = all(p.mask is not None for p in pictures)
    x, y = torch.zeros(len(pictures), 3, size, size, dtype=torch.uint8), torch.zeros(len(pictures), most, 6)
    masks = torch.zeros(len(pictures), *[size if masked else 0] * 2, dtype=torch.uint8)
    y[..., 4] = NOTHING
    for i, picture in enumerate(tqdm(pictures, desc="loading annotated images", disable=len(pictures) <= 500)):
        image = decode(picture.file.read_bytes(), str(picture.file.name))
        image = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
        h, w = image.shape[1:]
        _checked(picture, w, h)
        scale = size / max(h, w)
        inner = [max(1, round(scale * side)) for side in (h, w)]
        top, left = ((size - side) // 2 for side in inner)
        part = F.interpolate(image[None].float(), inner, mode="bilinear", antialias=True)[0].round().clamp(0, 255)
        x[i, :, top:top + inner[0], left:left + inner[1]] = part
        for j, (box, label, ignored) in enumerate(picture.objects):
            edges = torch.tensor(box) * torch.tensor([inner[1] / w, inner[0] / h] * 2) + torch.tensor([left, top] * 2)
            y[i, j] = torch.tensor([*edges.clamp(0, size), classes.index(label), float(ignored)])
        if masked:
            mask = picture.mask((h, w), classes)
            masks[i, top:top + inner[0], left:left + inner[1]] = F.interpolate(mask[None, None].float(), inner, mode="nearest-exact")[0, 0]
    return x, y, masks
