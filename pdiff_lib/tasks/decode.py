"""Encoded images as uint8 tensors: one meaning for every file format; the size is read before anything is unpacked."""

import io
import math
import struct

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

# No others of Pillow's: some have no meaning as pixels, and one (EPS) starts another program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
MOST_PIXELS = 89_478_485  # above which Pillow warns of a decompression bomb: 256 MiB in colour
_MEANT = f"expected one of {', '.join(FORMATS)} with whole, unsigned numbers of at most 16 bits per channel"
_ORIENTATION, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _TILE = 274, 262, 258, 339, (322, 323)  # tags of TIFF and EXIF
_FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}  # from 5 on: after a transposition


def decode(data: bytes | None, where: str) -> UInt8[Tensor, "C h w"]:
    """One image, with the same meaning in every format (`FORMATS`), whichever library reads it.

    Args:
        data: the file's bytes.
        where: what errors call the image.

    Returns:
        One channel for grey images (of one bit to 16, with or without transparency), three for all others, a palette
        included (but BMP's grey palette, which is its only way to be grey). Numbers of more than 8 bits are brought to
        0..255: of 16 bits value / 257, to within one level. Transparency is dropped: the colours below it count. Of an
        animation or of several pages the first. Turned as the EXIF (or XMP) orientation says: upright, as viewers show it.

    Raises:
        ValueError: broken, missing or of more than `MOST_PIXELS` pixels (found before it is unpacked); another format; or
            numbers without a known range: floats, signed, or of more than 16 bits.
    """
    picture = _opened(data or b"", where)
    try:
        try:
            plain = picture is None or picture.format in ("PNG", "JPEG", "MPO")
            image = _by_torchvision(data) if plain else _by_pillow(picture)
        except RuntimeError:  # a kind of PNG or JPEG that only Pillow knows, or a broken one
            image = _by_pillow(picture or Image.open(io.BytesIO(data), formats=FORMATS))
        return image if picture is None else upright(image, picture)
    except Exception as error:
        raise ValueError(f"{where}: this image is broken or missing ({error})") from error


def upright(image: UInt8[Tensor, "C h w"], picture: Image.Image) -> UInt8[Tensor, "C a b"]:
    """The image turned and mirrored as the EXIF orientation of its picture says; as it is where there is none."""
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that cannot be read says nothing, and Pillow fails on it in many ways
        return image
    if orientation not in _FLIPS:
        return image
    return (image.transpose(1, 2) if orientation > 4 else image).flip(_FLIPS[orientation])


def _opened(data: bytes, where: str) -> Image.Image | None:
    """The picture before it is unpacked, None where its bytes alone will do; refuses what `decode` does not take."""
    if not data:
        raise ValueError(f"{where}: this image is broken or missing: it has no bytes (no path is followed); {_MEANT}")
    try:
        sides, picture, whole = _bare_size(data), None, True
        if sides is None:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            tags = getattr(picture, "tag_v2", {})  # a TIFF's
            sides = max((picture.size, [int(tags.get(tag, 0)) for tag in _TILE]), key=math.prod)
            whole = picture.mode != "F" and (picture.mode != "I" or picture.format == "PPM")  # a PPM's are of 16 bits
            whole = whole and set(tags.get(_SAMPLE_FORMAT, (1,))) == {1}
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{where}: this image has too many pixels: expected at most {MOST_PIXELS:,} ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{where}: this image is broken or missing, or of another kind: {_MEANT}") from error
    except Exception as error:
        raise ValueError(f"{where}: this image is broken or missing ({error})") from error
    if sides[0] * sides[1] > MOST_PIXELS:
        raise ValueError(f"{where}: this image has too many pixels ({sides[0]}x{sides[1]}): expected at most {MOST_PIXELS:,}")
    if not whole:
        raise ValueError(f"{where}: this image holds floats, signed numbers, or numbers of more than 16 bits: {_MEANT}")
    return picture


def _bare_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG or a JPEG that has no orientation; None: Pillow is to look at it."""
    # Pillow's `open` would take twice as long as decoding a small image.
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        marks = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
        return None if any(mark in data for mark in marks) else struct.unpack(">II", data[16:24])
    at, size = 2, None
    while data[:2] == b"\xff\xd8" and data[at:at + 1] == b"\xff" and at + 9 <= len(data):
        kind = data[at + 1]
        if kind == 0xDA:  # the scan begins
            return size
        if kind < 0xC0 or 0xD0 <= kind <= 0xD9 or kind in (0xE1, 0xFF):  # EXIF or XMP, or not a segment
            return None
        if kind < 0xD0 and kind not in (0xC4, 0xC8, 0xCC):  # a frame
            size = int.from_bytes(data[at + 7:at + 9]), int.from_bytes(data[at + 5:at + 7])
        at += 2 + int.from_bytes(data[at + 2:at + 4])
    return None


def _by_torchvision(data: bytes) -> UInt8[Tensor, "C h w"]:
    """Half of Pillow's time."""
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # Of a PNG with a palette (colour type 3, byte 25), UNCHANGED would give the numbers of the palette's entries.
    palette = data[:4] == b"\x89PNG" and data[25:26] == b"\x03"
    image = decode_image(buffer, ImageReadMode.RGB if palette else ImageReadMode.UNCHANGED)
    if image.shape[0] in (2, 4):  # transparency, or CMYK
        image = decode_image(buffer, ImageReadMode.RGB if image.shape[0] == 4 else ImageReadMode.GRAY)
    return image if image.dtype == torch.uint8 else TF.to_dtype(image, torch.uint8, scale=True)


def _by_pillow(picture: Image.Image) -> UInt8[Tensor, "C h w"]:
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # `convert` would cut these at 255
        tags = getattr(picture, "tag_v2", {})
        x = np.asarray(picture).astype(np.int32) >> tags.get(_BITS, (16,))[0] - 8
        return torch.from_numpy((255 - x if tags.get(_PHOTOMETRIC) == 0 else x).astype(np.uint8))[None]
    grey = picture.mode in ("1", "L", "LA") and picture.format != "GIF"
    return TF.pil_to_tensor(picture.convert("L" if grey else "RGB"))
