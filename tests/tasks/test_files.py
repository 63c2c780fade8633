"""files.py: which files of a folder are images and of which class; Parquet files that are large, odd or broken."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data import ROWS, encode, pair, picture, write_parquet

from pdiff_lib.tasks import data, files


def folders(place, classes=("ant", "bee"), images=2):
    """train/ and test/ with small images, each of its own; returns what `load` is asked for."""
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            (place / part / name).mkdir(parents=True)
            for i in range(images):
                (place / part / name / f"{i}.png").write_bytes(encode(picture(10 * label + i)))
    return str(place)


# ---------------------------------------------------------------- folders: what counts

CLUTTER = [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found", ".Trash-1000", "$RECYCLE.BIN", "#recycle",
           "System Volume Information", "__pycache__", ".AppleDouble", ".thumbnails"]


@pytest.mark.parametrize("clutter", CLUTTER)
def test_hidden_and_system_folders_are_neither_classes_nor_images(tmp_path, clutter):
    name = folders(tmp_path / "set")
    want = data.load(name).digest
    for part in ("train", "test"):
        for place in (tmp_path / "set", tmp_path / "set" / part, tmp_path / "set" / part / "ant",
                      tmp_path / "set" / part / "ant" / "deeper" / "still"):
            (place / clutter / "inside").mkdir(parents=True, exist_ok=True)
            for file in (place / clutter / "x.png", place / clutter / "inside" / "x-checkpoint.png"):
                file.write_bytes(encode(picture(99)))
    images = data.load(name)
    assert images.classes == ("ant", "bee") and images.digest == want


def test_hidden_and_system_files_are_no_images(tmp_path):
    name = folders(tmp_path)
    want = data.load(name).digest
    for file in ("._0.png", ".hidden.png", "Thumbs.db", "desktop.ini", ".DS_Store", "labels.txt", "README"):
        (tmp_path / "train" / "ant" / file).write_bytes(b"not an image")
        (tmp_path / "train" / file).write_bytes(b"not a class")
    assert data.load(name).digest == want


def test_only_the_names_below_the_data_set_count(tmp_path):
    name = folders(tmp_path / ".cache" / "lost+found" / "set")
    assert data.load(name).num_classes == 2


def test_images_of_every_ending_and_depth_are_found_in_one_order(tmp_path):
    name = folders(tmp_path, images=0)
    endings = {"a.PNG": "PNG", "b.gif": "GIF", "c.jp2": "JPEG2000", "d.JPeG": "PNG", "deep/e.pgm": "PPM",
               "deep/er/f.tif": "TIFF", "g.webp": "WEBP", "deep/h.jfif": "JPEG"}
    for part in ("train", "test"):
        for label in ("ant", "bee"):
            (tmp_path / part / label / "deep" / "er").mkdir(parents=True)
            for i, (file, kind) in enumerate(endings.items()):
                flat = np.full((8, 8, 3) if kind != "PPM" else (8, 8), 20 * i, np.uint8)
                (tmp_path / part / label / file).write_bytes(encode(flat, kind))
    got = data.load(name, channels=3)
    assert got.y_train.tolist() == [0] * 8 + [1] * 8
    assert got.x_train[:8, 0, 0, 0].tolist() == [0, 20, 40, 60, 120, 80, 140, 100]  # as torchvision's ImageFolder: by folder


@pytest.mark.parametrize("file", ["x.heic", "x.svg", "x.psd", "x.jxl", "x.png"])
def test_images_that_cannot_be_read_are_not_left_out_silently(tmp_path, file):
    name = folders(tmp_path)
    (tmp_path / "train" / "bee" / file).write_bytes(b"....ftypheic....")
    with pytest.raises(ValueError, match=f"bee.{file}: this image is broken .* of another kind: expected one of JPEG"):
        data.load(name)


def test_a_class_without_images_is_named(tmp_path):
    name = folders(tmp_path)
    (tmp_path / "train" / "cow" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "train" / "cow" / ".ipynb_checkpoints" / "x.png").write_bytes(encode(picture(0)))
    with pytest.raises(ValueError, match="train: expected images in every class folder, found none in 'cow'"):
        data.load(name)


@pytest.mark.parametrize("name", ["a b", "..", "it's", 'say "x"', "$(touch x)", "a,b", "x.parquet", "ünï", "-n", ";", "{}%s"])
def test_any_name_of_a_folder_works(tmp_path, monkeypatch, name):
    place = tmp_path / "here" / "below" / name
    folders(place, classes=("a b", "it's $(x) {}"))
    monkeypatch.chdir(tmp_path / "here" / "below")
    pairs = [f"{name}/{part} 1.parquet" for part in ("train", "test")]
    for file in pairs:
        write_parquet(file, *zip(*ROWS))
    if name != "x.parquet":  # that ending means files
        images = data.load(name)
        assert images.classes == ("a b", "it's $(x) {}") and images.source == f"folder {place.resolve().name}"
    assert len(data.load(", ".join(pairs)).x_train) == 9


# ---------------------------------------------------------------- folders: links and pipes

def test_links_inside_the_data_set_are_followed(tmp_path):
    name = folders(tmp_path / "set")
    want = data.load(name).digest
    for part in ("train", "test"):
        raw = tmp_path / "set" / "raw" / part
        raw.mkdir(parents=True)
        (tmp_path / "set" / part / "bee").rename(raw / "bee")
        (tmp_path / "set" / part / "bee").symlink_to(os.path.join("..", "raw", part, "bee"))
        (tmp_path / "set" / part / "ant" / "1.png").rename(raw / "1.png")
        (tmp_path / "set" / part / "ant" / "1.png").symlink_to(raw / "1.png")
    assert data.load(name).digest == want
    (tmp_path / "elsewhere").symlink_to(tmp_path / "set")  # what was given may be a link itself
    assert data.load(str(tmp_path / "elsewhere")).digest == want


@pytest.mark.parametrize("link", ["train/bee/0.png", "train/bee", "train/bee/deep/er", "train", "test"])
def test_links_that_lead_out_are_refused_by_name(tmp_path, link):
    name = folders(tmp_path / "set")
    outside = tmp_path / "set-outside"  # which begins as the set's own path does
    folders(outside)
    place = tmp_path / "set" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(tmp_path / "old")
    place.symlink_to(outside / ("train/bee/0.png" if link.endswith("png") else "train/bee" if "bee" in link else link))
    with pytest.raises(ValueError, match=f"{link} is a link to {outside}.*expected links to lead to files inside"):
        data.load(name)


@pytest.mark.parametrize("target", [".", "..", "../..", "../bee/again"])
def test_links_in_a_circle_are_refused(tmp_path, target):
    name = folders(tmp_path)
    (tmp_path / "train" / "bee" / "again").symlink_to(target)
    with pytest.raises(ValueError, match="again is a link (back to .*: expected no folder that holds itself|to nowhere)"):
        data.load(name)


@pytest.mark.parametrize("place", ["train/cow", "train/bee/x.png"])
def test_links_to_nowhere_are_refused(tmp_path, place):
    name = folders(tmp_path)
    (tmp_path / place).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{place} is a link to nowhere"):
        data.load(name)


def test_a_pipe_is_not_waited_for_and_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    name = folders(tmp_path)
    os.mkfifo(tmp_path / "train" / "bee" / "x.png")
    with pytest.raises(ValueError, match="x.png is no regular file"):
        data.load(name)
    (tmp_path / "train" / "bee" / "x.png").unlink()
    with open(tmp_path / "train" / "bee" / "x.png", "wb") as file:
        file.truncate(2**30 + 1)  # holds nothing on the disk
    with pytest.raises(ValueError, match="x.png: 1073741825 bytes, expected at most 1073741824"):
        data.load(name)


# ---------------------------------------------------------------- Parquet

def test_rows_are_read_in_any_order_and_over_groups_and_batches(tmp_path):
    images = [encode(np.full((4, 4), i, np.uint8)) for i in range(200)]
    write_parquet(tmp_path / "whole.parquet", images, [0] * 200)
    pq.write_table(pq.read_table(tmp_path / "whole.parquet"), tmp_path / "groups.parquet", row_group_size=37)
    for file in ("whole.parquet", "groups.parquet"):
        split = files.parquet(str(tmp_path / file))
        for row in (0, 5, 199, 198, 64, 63, 100, 0):
            assert (split.image(row) == row).all()


def test_the_memory_does_not_hold_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 2**16, dtype=np.uint8).tobytes()
    cells = pa.array([{"bytes": encode(np.full((4, 4), i, np.uint8)) + noise} for i in range(256)])  # PNGs, more after them
    pq.write_table(pa.table({"image": cells, "label": [0] * 256}), tmp_path / "x.parquet", row_group_size=16)
    del cells
    before, peak, split = pa.total_allocated_bytes(), 0, files.parquet(str(tmp_path / "x.parquet"))
    for row in range(256):
        assert (split.image(row) == row).all()
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 2**23  # half of the file


def test_files_that_unpack_to_much_more_than_they_are_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_UNPACKED", 10**6)
    table = pa.table({"image": pa.array([{"bytes": bytes(5 * 10**7)}]), "label": [0]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    with pytest.raises(ValueError, match="x.parquet: .* that hold 1 rows and unpack to 50,.* expected at most .* 1,000,000"):
        files.parquet(str(tmp_path / "x.parquet"))
    monkeypatch.setattr(files, "MOST_ROWS", 10_000)
    rows = pa.table({"image": pa.array([{"bytes": b"x"}] * 20_000), "label": [0] * 20_000})
    pq.write_table(rows, tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="y.parquet: .* bytes that hold 20,000 rows .* expected at most 10,000 rows"):
        files.parquet(str(tmp_path / "y.parquet"))


def test_many_alike_images_are_no_bomb(tmp_path):
    name = pair(tmp_path, ROWS[:1] * 1500, ROWS[:1])
    assert len(data.load(name).x_train) == 1500


def test_a_path_without_bytes_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encode(picture(0)))
    cells = [{"bytes": encode(picture(1)), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.png")}]
    for part in ("train", "test"):
        pq.write_table(pa.table({"image": pa.array(cells), "label": [0, 0]}), tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match="train.parquet, row 1: this image is broken or missing: it has no bytes"):
        data.load(f"{tmp_path}/train.parquet,{tmp_path}/test.parquet")


@pytest.mark.parametrize("cell", [{"bytes": "text"}, {"bytes": [1, 2]}, {"bytes": 7}, {"path": "x.png"}, b"bytes", "x.png"])
def test_images_in_other_columns_are_refused(tmp_path, cell):
    pq.write_table(pa.table({"image": pa.array([cell]), "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet has the columns image: .*: expected image: struct<bytes: binary"):
        files.parquet(str(tmp_path / "x.parquet"))


def test_large_binary_columns_are_read(tmp_path):
    cells = pa.array([{"bytes": encode(picture(1))}], pa.struct([("bytes", pa.large_binary())]))
    pq.write_table(pa.table({"image": cells, "label": [0]}), tmp_path / "x.parquet")
    assert torch.equal(files.parquet(str(tmp_path / "x.parquet")).image(0).permute(1, 2, 0), torch.from_numpy(picture(1)))


def named(names):
    return json.dumps({"info": {"features": {"label": {"names": names}}}})


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"info": 3}', '{"info": {"features": []}}', "\xff", "[" * 100_000,
                                  named("ab"), named([1, 2]), named({"0": "a"})])
def test_broken_metadata_is_named(tmp_path, text):
    write_parquet(tmp_path / "x.parquet", [ROWS[0][0]], [0])
    table = pq.read_table(tmp_path / "x.parquet").replace_schema_metadata({"huggingface": text.encode("latin-1")})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: its metadata `huggingface` has another form .*expected JSON"):
        files.parquet(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("text", ["{}", '{"info": {}}', '{"info": {"features": {"label": {"_type": "Value"}}}}', named([])])
def test_metadata_without_names(tmp_path, text):
    write_parquet(tmp_path / "x.parquet", [ROWS[0][0]], [0])
    table = pq.read_table(tmp_path / "x.parquet").replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "x.parquet")
    assert files.parquet(str(tmp_path / "x.parquet")).classes == ()


def test_a_file_that_is_broken_anywhere_is_named(tmp_path):
    rows = [(encode(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)), i % 2) for i in range(50)]
    good = pair(tmp_path, rows, rows).split(",")
    whole = (tmp_path / "set-train.parquet").read_bytes()
    named = 0
    for at in (*range(4, len(whole), len(whole) // 40), len(whole) - 20, len(whole) - 6, whole.rindex(b"label")):
        (tmp_path / "set-train.parquet").write_bytes(whole[:at] + bytes(b ^ 0xA5 for b in whole[at:at + 9]) + whole[at + 9:])
        try:
            data.load(",".join(good))
        except ValueError as error:
            assert "set-train.parquet" in str(error)
            named += 1
    assert named > 20
    (tmp_path / "set-train.parquet").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="set-train.parquet is not a Parquet file"):
        data.load(",".join(good))


def test_columns_twice_are_refused(tmp_path):
    columns = [pa.array([{"bytes": ROWS[0][0]}]), pa.array([0]), pa.array([1])]
    pq.write_table(pa.Table.from_arrays(columns, ["image", "label", "label"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet has the columns"):
        files.parquet(str(tmp_path / "x.parquet"))


def test_a_file_without_rows_is_refused(tmp_path):
    for part, rows in (("a", ROWS), ("b", [])):
        write_parquet(tmp_path / f"{part}.parquet", [image for image, _ in rows], [label for _, label in rows])
    with pytest.raises(ValueError, match="b.parquet' has 9 training and 0 test images"):
        data.load(f"{tmp_path}/a.parquet,{tmp_path}/b.parquet")
