"""decode.py: every format and depth against its own pixels; orientation; what is refused before it is unpacked."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_data import encode, pair

from pdiff_lib.tasks import data, decode, sources

RNG = np.random.default_rng(0)
GREY16, COLOUR16 = (RNG.integers(0, 2**16, shape, dtype=np.uint16) for shape in ((8, 10), (8, 10, 3)))
GREY, COLOUR = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((8, 10), (8, 10, 3)))


def saved(image, kind, **kwargs):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def tiff(x, bits=16, form=1, photometric=1, order="<"):
    """A TIFF of one uncompressed strip, of any kind of numbers (form 1: unsigned, 2: signed, 3: floats)."""
    pixels, (h, w, s) = x.astype(x.dtype.newbyteorder(order)).tobytes(), (*x.shape, 1)[:3]
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 273: 0, 277: s, 278: h, 279: len(pixels), 339: form}
    at = 8 + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    for tag, value in tags.items():
        if tag in (258, 339) and s > 1:
            entries += struct.pack(order + "HHII", tag, 3, s, at + len(extra))
            extra += struct.pack(order + "H", value) * s
        else:
            entries += struct.pack(order + "HHII", tag, 4, 1, at + 4 * s if tag == 273 else value)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + extra.ljust(4 * s, b"\0") + pixels


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(w, h, depth, colour, pixels=b"", before=b"", after=b""):
    """A PNG from its parts; pixels with a filter byte before each row."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(pixels)) + after + chunk(b"IEND", b"")


def png16(x, **kwargs):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    return png(x.shape[1], x.shape[0], 16, 2 if x.shape[2:] == (3,) else 0, rows, **kwargs)


def pixels(content):
    """int64 [h w C]."""
    return decode.decode(content, "here").permute(1, 2, 0).numpy().astype(np.int64)


# ---------------------------------------------------------------- one meaning for every format

@pytest.mark.parametrize("content", [
    png16(GREY16), saved(GREY16, "TIFF"), saved(GREY16, "TIFF", compression="tiff_lzw"), tiff(GREY16), tiff(GREY16, order=">"),
    saved(Image.frombytes("I;16B", (10, 8), GREY16.astype(">u2").tobytes()), "TIFF"), saved(GREY16, "PPM"),
    b"P2 10 8 65535\n" + b" ".join(b"%d" % value for value in GREY16.flat), saved(GREY16, "JPEG2000", irreversible=False),
    tiff(65535 - GREY16, photometric=0)],
    ids=["PNG", "TIFF", "TIFF lzw", "TIFF II", "TIFF MM", "TIFF I;16B", "PGM", "plain PGM", "JPEG 2000", "TIFF white is 0"])
def test_16_bit_grey_is_its_value_by_257_in_every_format(content):
    got = pixels(content)
    assert got.shape == (8, 10, 1) and np.abs(got[..., 0] - GREY16 / 257).max() <= 1
    assert np.array_equal(got, pixels(png16(GREY16)))


@pytest.mark.parametrize("content", [png16(COLOUR16), tiff(COLOUR16, photometric=2), tiff(COLOUR16, photometric=2, order=">"),
                                     b"P6 10 8 65535\n" + COLOUR16.astype(">u2").tobytes()],
                         ids=["PNG", "TIFF II", "TIFF MM", "PPM"])
def test_16_bit_colour_too(content):
    assert np.abs(pixels(content) - COLOUR16 / 257).max() <= 1


@pytest.mark.parametrize("x", [GREY16[..., None], COLOUR16], ids=["grey", "colour"])
def test_16_bit_with_transparency(x):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.dstack([x, GREY16]))
    assert np.array_equal(pixels(png(10, 8, 16, 4 if x.shape[2] == 1 else 6, rows)), pixels(png16(x)))


@pytest.mark.parametrize("highest", [1, 15, 255, 1023, 4095, 65535])
def test_a_pgm_of_any_depth_fills_0_to_255(highest):
    x = RNG.integers(0, highest + 1, (8, 10))
    content = b"P5 10 8 %d\n" % highest + x.astype(">u2" if highest > 255 else np.uint8).tobytes()
    assert np.abs(pixels(content)[..., 0] - x * 255 / highest).max() <= 1


def test_a_tiff_of_12_bits_fills_0_to_255():
    x = (GREY16 >> 4).astype(int)
    digits = "".join(f"{value:03x}" for value in x.flat)
    content = bytearray(tiff(np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(8, 15), bits=12))
    at = content.index(struct.pack("<HHI", 256, 4, 1)) + 8
    content[at:at + 4] = struct.pack("<I", 10)  # 10 pixels in 15 bytes
    assert np.abs(pixels(bytes(content))[..., 0] - x * 255 / 4095).max() <= 1


@pytest.mark.parametrize("content", [
    tiff((GREY / 255).astype(np.float32), 32, 3), tiff(GREY.astype(np.float16), 16, 3), tiff(GREY.astype(np.float64), 64, 3),
    tiff(COLOUR.astype(np.float32), 32, 3, 2), saved((GREY / 255).astype(np.float32), "PPM"), tiff(GREY.view(np.int8), 8, 2),
    tiff(GREY16.view(np.int16), 16, 2), tiff(GREY16.astype(np.uint32), 32), tiff(GREY16.astype(np.int32), 32, 2)],
    ids=["float", "half", "double", "float RGB", "PFM", "int8", "int16", "uint32", "int32"])
def test_numbers_without_a_known_range_are_refused(content):
    with pytest.raises(ValueError, match="x.tif: this image .*whole, unsigned numbers of at most 16 bits"):
        decode.decode(content, "x.tif")


TRANSPARENT = np.dstack([COLOUR, RNG.integers(0, 256, (8, 10), dtype=np.uint8)])
PALETTE = Image.fromarray(COLOUR).quantize(16)


@pytest.mark.parametrize("kind, kwargs", [("PNG", {}), ("TIFF", {}), ("TIFF", dict(compression="tiff_deflate")), ("BMP", {}),
                                          ("JPEG2000", {}), ("WEBP", dict(lossless=True, exact=True))])
def test_transparency_is_dropped(kind, kwargs):
    assert np.array_equal(pixels(saved(TRANSPARENT, kind, **kwargs)), COLOUR)
    if kind in ("PNG", "TIFF", "JPEG2000"):
        got = pixels(saved(np.dstack([GREY, TRANSPARENT[..., 3]]), kind, **kwargs))
        assert np.array_equal(got, GREY[..., None])


@pytest.mark.parametrize("kind, kwargs", [("PNG", {}), ("PNG", dict(transparency=3)), ("GIF", {}),
                                          ("GIF", dict(transparency=3)), ("PNG", dict(transparency=bytes(range(16)))),
                                          ("TIFF", {}), ("BMP", {})])
def test_a_palette_is_its_colours(kind, kwargs):
    assert np.array_equal(pixels(saved(PALETTE, kind, **kwargs)), np.asarray(PALETTE.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit_and_grey_are_one_channel(kind):
    assert np.array_equal(pixels(saved(GREY > 128, kind))[..., 0], (GREY > 128) * 255)
    assert np.array_equal(pixels(saved(GREY, kind)), GREY[..., None])


def test_grey_gifs_and_colour_gifs_have_the_same_channels():
    for x in (GREY > 128, GREY, COLOUR):
        assert pixels(saved(x, "GIF")).shape == (8, 10, 3)


@pytest.mark.parametrize("mode, kind, kwargs", [
    ("CMYK", "JPEG", dict(quality=100)), ("CMYK", "TIFF", {}), ("YCbCr", "TIFF", {}), ("YCbCr", "JPEG", dict(quality=100)),
    ("RGB", "AVIF", dict(quality=100, subsampling="4:4:4"))])
def test_other_colour_spaces(mode, kind, kwargs):
    smooth = np.dstack([np.tile(np.linspace(low, 200, 16), (16, 1)) for low in (20, 60, 100)]).astype(np.uint8)
    assert np.abs(pixels(saved(Image.fromarray(smooth).convert(mode), kind, **kwargs)) - smooth).max() <= 4


@pytest.mark.parametrize("kind, kwargs", [("GIF", {}), ("WEBP", dict(lossless=True)), ("PNG", {}), ("TIFF", {}), ("MPO", {}),
                                          ("AVIF", dict(quality=100, subsampling="4:4:4"))])
def test_the_first_frame_or_page_counts(tmp_path, kind, kwargs):
    frames = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (200, 90, 10)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **kwargs)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.abs(pixels(content) - 200).max() <= 1
    for part in ("train", "test"):  # whatever it is called, among others
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.jpg").write_bytes(content)
        (tmp_path / part / "a" / "1.png").write_bytes(saved(frames[1], "PNG"))
    assert (data.load(str(tmp_path)).x_train[:, 0, 0, 0].int() - torch.tensor([200, 90])).abs().max() <= 1


# ---------------------------------------------------------------- orientation

COLOURS = [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [90, 90, 90], [0, 0, 0]]]
SHAPES = np.kron(COLOURS, np.ones((8, 8, 1))).astype(np.uint8)
# The standard's words: where row 0 and column 0 of what is stored belong.
UPRIGHT = {1: SHAPES, 2: SHAPES[:, ::-1], 3: SHAPES[::-1, ::-1], 4: SHAPES[::-1], 5: SHAPES.swapaxes(0, 1),
           6: np.rot90(SHAPES, -1), 7: np.rot90(SHAPES, 2).swapaxes(0, 1), 8: np.rot90(SHAPES, 1)}
SAVED = {"JPEG": dict(quality=100, subsampling=0), "PNG": {}, "WEBP": dict(lossless=True), "TIFF": {},
         "AVIF": dict(quality=100, subsampling="4:4:4")}


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_stand_upright_in_every_format(kind, orientation):
    got = pixels(saved(SHAPES, kind, exif=exif(orientation), **SAVED[kind]))
    assert got.shape == UPRIGHT[orientation].shape and np.abs(got - UPRIGHT[orientation]).max() < 30


def xmp(orientation):
    return (f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
            f'tiff:Orientation="{orientation}"/></x:xmpmeta>').encode()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_orientation_wherever_it_is_written():
    turned = exif(6).tobytes().removeprefix(b"Exif\0\0")
    assert np.array_equal(pixels(png16(GREY16, before=chunk(b"eXIf", turned))), np.rot90(pixels(png16(GREY16)), -1))
    assert np.array_equal(pixels(png16(GREY16, after=chunk(b"eXIf", turned))), np.rot90(pixels(png16(GREY16)), -1))
    assert np.array_equal(pixels(saved(GREY16, "TIFF", exif=exif(6))), np.rot90(pixels(png16(GREY16)), -1))
    for kind in ("JPEG", "WEBP"):
        assert np.abs(pixels(saved(SHAPES, kind, xmp=xmp(8), **SAVED[kind])) - UPRIGHT[8]).max() < 30
    for wrong in (0, 9, 77):
        assert np.abs(pixels(saved(SHAPES, "JPEG", exif=exif(wrong), quality=100, subsampling=0)) - SHAPES).max() < 30
    plain = saved(SHAPES, "JPEG", **SAVED["JPEG"])
    broken = plain[:2] + b"\xff\xe1\x00\x16Exif\0\0MM\0*\xff\xff\xff\xff\1\2\3\4\5\6" + plain[2:]
    assert np.array_equal(pixels(broken), pixels(plain))


def test_photographs_of_torchvisions_sets_stand_upright_too(tmp_path, monkeypatch):
    photograph = Image.open(io.BytesIO(saved(SHAPES, "JPEG", exif=exif(6), quality=100, subsampling=0))).convert("RGB")

    class Fake(list):
        _labels, classes = [0], ["one"]

    monkeypatch.setattr(torchvision.datasets, "Flowers102", lambda **kwargs: Fake([(photograph, 0)]))
    got = data.load("flowers", root=tmp_path, size=16).x_train[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - UPRIGHT[6][4:-4]).max() < 30


# ---------------------------------------------------------------- bombs, and what is no image

def patched(content, mark, offset, form, *values):
    """The content with numbers overwritten at an offset from a mark."""
    start = content.index(mark) + offset
    return content[:start] + struct.pack(form, *values) + content[start + struct.calcsize(form):]


def bomb(kind):
    """A small file that says it has 50,000 x 50,000 pixels."""
    sides, turned = (50_000, 50_000), {"exif": exif(6)} if "EXIF" in kind else {}
    if kind.startswith("PNG"):
        return png(*sides, 8, 2, bytes(1000), chunk(b"eXIf", exif(6).tobytes()[6:]) if turned else b"")
    if kind == "TIFF":
        wide = patched(tiff(GREY, 8), struct.pack("<HHI", 256, 4, 1), 8, "<I", sides[0])
        return patched(wide, struct.pack("<HHI", 257, 4, 1), 8, "<I", sides[1])
    if kind == "TIFF tile":
        entries = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: sides[0], 323: sides[1], 324: 134, 325: 1000}
        listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
        return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4) + zlib.compress(bytes(10**6))
    frames = dict(save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    return {"JPEG": lambda: patched(saved(COLOUR, "JPEG", **turned), b"\xff\xc0", 5, ">HH", *sides),
            "WEBP": lambda: patched(saved(COLOUR, "WEBP", **frames), b"VP8X", 12, "6s", (49_999).to_bytes(3, "little") * 2),
            "GIF": lambda: patched(saved(PALETTE, "GIF"), b"GIF8", 6, "<HH", *sides),
            "GIF frame": lambda: patched(saved(PALETTE, "GIF"), b",\0\0\0\0", 5, "<HH", *sides),
            "BMP": lambda: patched(saved(COLOUR, "BMP"), b"BM", 18, "<II", *sides),
            "PPM": lambda: b"P6 50000 50000 255\n" + bytes(100),
            "plain PGM": lambda: b"P2 50000 50000 255\n0 0 0",
            "JPEG2000": lambda: patched(saved(COLOUR, "JPEG2000"), b"ihdr", 4, ">II", *sides)}[kind.removesuffix(" EXIF")]()


@pytest.mark.parametrize("kind", ["PNG", "PNG EXIF", "JPEG", "JPEG EXIF", "WEBP", "GIF", "GIF frame", "TIFF", "TIFF tile",
                                  "BMP", "PPM", "plain PGM", "JPEG2000"])
def test_too_many_pixels_are_refused_before_they_are_unpacked(tmp_path, monkeypatch, kind):
    def unpacked(*_):
        raise AssertionError("unpacked")

    name = pair(tmp_path, [(bomb(kind), 0)], [(encode(COLOUR), 0)])
    for module, function in ((decode, "_by_torchvision"), (decode, "_by_pillow"), (Image.Image, "load")):
        monkeypatch.setattr(module, function, unpacked)
    with pytest.raises(ValueError, match="set-train.parquet, row 0: this image has too many pixels.* at most 89,478,485"):
        data.load(name, size=8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"])
def test_the_limit_holds_to_the_pixel(monkeypatch, kind):
    content = saved(COLOUR, kind)
    monkeypatch.setattr(decode, "MOST_PIXELS", 80)
    assert pixels(content).shape == (8, 10, 3)
    monkeypatch.setattr(decode, "MOST_PIXELS", 79)
    with pytest.raises(ValueError, match=r"here: this image has too many pixels \(10x8\): expected at most 79"):
        pixels(content)


@pytest.mark.parametrize("kwargs", [{}, dict(progressive=True), dict(comment=b"\xff\xc0\0\x11\x08\0\1\0\1"),
                                    dict(icc_profile=bytes(70_000)), dict(quality=5, optimize=True), dict(exif=exif(1))])
def test_sizes_read_from_the_bytes_are_pillows(kwargs):
    for x in (GREY, COLOUR, np.zeros((300, 7), np.uint8)):
        content = saved(x, "JPEG", **kwargs)
        assert decode._bare_size(content) == (None if "exif" in kwargs else Image.open(io.BytesIO(content)).size)
        assert decode._bare_size(content[:20]) is None


def test_texts_and_profiles_that_unpack_to_much_are_not_unpacked():
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(10**8)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="here: this image is broken or missing .*too large"):
        pixels(png(4, 4, 8, 0, bytes(20), text))
    assert pixels(png(4, 4, 8, 0, bytes(20) + bytes(10**7))).shape == (4, 4, 1)  # more pixels than the header says
    assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    tracemalloc.stop()


def test_formats_that_are_programs_or_have_no_pixels_are_refused(monkeypatch):
    content = saved(COLOUR, "EPS")
    monkeypatch.setattr("subprocess.Popen", None)
    for content in (content, saved(COLOUR, "PDF"), saved(COLOUR, "ICO"), saved(COLOUR, "TGA"), b"<svg/>", b"", None):
        with pytest.raises(ValueError, match=r"x: this image is broken or missing.*JPEG, PNG"):
            decode.decode(content, "x")


def test_a_narrow_image_is_not_resized_to_more_pixels_than_the_limit(tmp_path):
    name = pair(tmp_path, [(encode(np.zeros((1, 30_000), np.uint8)), 0)], [(encode(GREY), 0)])
    with pytest.raises(ValueError, match="train.parquet, row 0: 1x30000 pixels with the shorter side brought to 64 would be"):
        data.load(name, size=64)


def test_more_than_the_memory_is_said_in_words():
    with pytest.raises(ValueError, match="data 'photographs': 1000000000 images of 3x4096x4096 are 50331648 GB"):
        sources._room("photographs", 10**9, 3, 4096)
