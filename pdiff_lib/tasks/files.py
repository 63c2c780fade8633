"""Images on one's own disk: Parquet files and folders of class folders, found and checked before any is decoded."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from pdiff_lib.tasks.decode import FORMATS, decode

MOST_BYTES = 2**30  # of one file of an image
# A Parquet file that goes beyond these is refused if it also has more rows than bytes, or unpacks to 100 times its bytes.
MOST_ROWS, MOST_UNPACKED = 10_000_000, 2**28
# What other programs leave in folders, beside all that starts with a dot.
SYSTEM = {"__macosx", "__pycache__", "@eadir", "@tmp", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
          "lost+found", "system volume information", "thumbs.db", "desktop.ini"}
# Of these the decoder says by name that it does not take them, instead of leaving them out silently.
_UNREAD = (".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".svg", ".tga", ".ico", ".eps", ".exr", ".hdr", ".dcm", ".dng")


class Split(NamedTuple):
    """One split before any image is decoded."""

    labels: np.ndarray  # int64 [N]
    image: Callable[[int], Tensor]  # row -> uint8 [C h w]
    classes: tuple[str, ...]  # () where the source names none
    where: Callable[[int], str]  # row -> its place in words


def folder(place: Path, *names: str) -> Split:
    """The first of the folders `names` that is there: a folder per class, images in it at any depth.

    Hidden and system files and folders (`SYSTEM`) are left out at every depth, as are files whose names do not end as an
    image's. Links are followed within `place`.

    Raises:
        ValueError: no such folder, a class without images, a link that leads out of `place` or back to where it is.
    """
    found = [place / name for name in names if (place / name).is_dir()]
    if not found:
        raise ValueError(f"folder {place}: expected a folder {' or '.join(names)} with one folder per class in it")
    Image.init()
    endings = tuple(end for end, kind in Image.EXTENSION.items() if kind in FORMATS) + _UNREAD
    root = os.path.realpath(place)
    top = _inside(str(found[0]), root)
    classes = sorted(entry.name for entry in _entries(str(found[0])) if os.path.isdir(entry))
    files, labels = [], []
    for label, name in enumerate(classes):
        # By folder, then by name.
        images = sorted(_images(os.path.join(found[0], name), root, (root, top), endings), key=os.path.split)
        if not images:
            raise ValueError(f"folder {found[0]}: expected images in every class folder, found none in {name!r}")
        files += images
        labels += [label] * len(images)
    if not classes:
        raise ValueError(f"folder {found[0]}: expected one folder of images per class, found none")

    def image(row: int) -> Tensor:
        if os.path.getsize(files[row]) > MOST_BYTES:
            raise ValueError(f"{files[row]}: {os.path.getsize(files[row])} bytes, expected at most {MOST_BYTES} of an image")
        return decode(Path(files[row]).read_bytes(), files[row])

    return Split(np.asarray(labels), image, tuple(classes), files.__getitem__)


def _entries(place: str) -> Iterator[os.DirEntry]:
    for entry in os.scandir(place):
        if entry.name[0] != "." and entry.name.lower() not in SYSTEM:
            if not os.path.exists(entry):
                raise ValueError(f"{entry.path} is a link to nowhere: expected files and folders")
            yield entry


def _images(place: str, root: str, above: tuple[str, ...], endings: tuple[str, ...]) -> Iterator[str]:
    real = _inside(place, root)
    if real in above:
        raise ValueError(f"{place} is a link back to {real}: expected no folder that holds itself")
    for entry in _entries(place):
        if os.path.isdir(entry):
            yield from _images(entry.path, root, (*above, real), endings)
        elif entry.name.lower().endswith(endings):
            if entry.is_symlink():
                _inside(entry.path, root)
            if not os.path.isfile(entry):  # reading a pipe would wait for ever
                raise ValueError(f"{entry.path} is no regular file: expected an image")
            yield entry.path


def _inside(path: str, root: str) -> str:
    """The path without links; refuses one that leads out of the data set, as that would read what nobody named."""
    real = os.path.realpath(path)
    if os.path.commonpath([real, root]) != root:
        raise ValueError(f"{path} is a link to {real}: expected links to lead to files inside the data set's folder {root} "
                         "(copy the files into it)")
    return real


def parquet(file: str) -> Split:
    """The columns `image` (struct with `bytes`) and `label` (whole numbers), as Hugging Face writes them.

    Images are read by pages and rows, so that the memory does not have to hold the file. A path beside the bytes is not
    followed.

    Raises:
        ValueError: no such file, other columns or metadata, a label that is no class number, or a file that would unpack
            to many times its size.
    """
    if not os.path.isfile(file):
        raise ValueError(f"Parquet file {file!r}: there is no such file")
    try:
        table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)  # else all of a column is read at once
        schema = table.schema_arrow
        columns = {field.name: field.type for field in schema}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a Parquet file ({error})") from error
    image, label = columns.get("image", pa.null()), columns.get("label", pa.null())
    if not (schema.names.count("image") == schema.names.count("label") == 1 and pa.types.is_integer(label)
            and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
            and (pa.types.is_binary(image.field("bytes").type) or pa.types.is_large_binary(image.field("bytes").type))):
        raise ValueError(f"{file} has the columns {', '.join(f'{field.name}: {field.type}' for field in schema)}: expected "
                         "image: struct<bytes: binary, path> and label: int64 (or other whole numbers)")
    _check_size(file, table.metadata)
    try:
        column = table.read(columns=["label"])["label"]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    row = pc.index(column.is_null(), True).as_py() if column.null_count else -1
    if row < 0:
        labels = column.to_numpy()
        bad = (labels < 0) | (labels > np.iinfo(np.int64).max)
        row = int(bad.argmax()) if bad.any() else -1
    if row >= 0:
        raise ValueError(f"{file}, row {row}: label {column[row]}, expected a class number from 0")
    read = _reader(file, table)

    def where(row: int) -> str:
        return f"{file}, row {row}"

    return Split(labels.astype(np.int64), lambda row: decode(read(row), where(row)), _class_names(file, schema), where)


def _check_size(file: str, metadata: pq.FileMetaData) -> None:
    size = os.path.getsize(file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in ("image.bytes", "label"))
    if metadata.num_rows > max(MOST_ROWS, size) or unpacked > max(MOST_UNPACKED, 100 * size):
        raise ValueError(f"{file}: {size:,} bytes that hold {metadata.num_rows:,} rows and unpack to {unpacked:,} bytes: "
                         f"expected at most {max(MOST_ROWS, size):,} rows and {max(MOST_UNPACKED, 100 * size):,} bytes")


def _reader(file: str, table: pq.ParquetFile) -> Callable[[int], bytes | None]:
    """row -> the bytes of its image; fast where rows are asked for in their order, as `sources.decode_all` does."""
    batches, start, batch = iter(()), 0, []

    def read(row: int) -> bytes | None:
        nonlocal batches, start, batch
        try:
            if row < start or not len(batch):
                batches, start, batch = table.iter_batches(64, columns=["image.bytes"]), 0, []
            while row >= start + len(batch):
                start, batch = start + len(batch), pc.struct_field(next(batches)["image"], "bytes")
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise ValueError(f"{file}, row {row}, cannot be read ({error})") from error
        return batch[row - start].as_py()

    return read


def _class_names(file: str, schema: pa.Schema) -> tuple[str, ...]:
    """What Hugging Face's metadata calls the classes."""
    try:
        names = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for key in ("info", "features", "label", "names"):
            names = names.get(key, {})
        names = names or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class names {str(names)[:80]}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata `huggingface` has another form ({error}): expected JSON with a list of texts "
                         "at info, features, label, names") from error
    return tuple(names)
