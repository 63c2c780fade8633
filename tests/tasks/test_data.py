"""data.py: every way in, every refusal; prepare and augment against torchvision; what a seed decides."""

import io
import json
import struct
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from pdiff_lib.tasks import data, sources


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", size=16, channels=3)


def picture(seed, h=6, w=6, c=3):
    """uint8 [h w] or [h w c], random."""
    return np.random.default_rng(seed).integers(0, 256, (h, w, c) if c > 1 else (h, w), dtype=np.uint8)


def encode(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(file, images, labels, names=None, kind=pa.int64()):
    table = pa.table({
        "image": pa.array([{"bytes": b, "path": None} for b in images],
                          pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array(labels, kind)})
    if names:
        meta = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(meta)})
    pq.write_table(table, file)


def pair(tmp_path, train, test, name="set", **kwargs):
    """Write two Parquet files of (image bytes, label) and return what `load` is asked for."""
    files = []
    for part, rows in (("train", train), ("test", test)):
        files.append(tmp_path / f"{name}-{part}.parquet")
        write_parquet(files[-1], *zip(*rows), **kwargs)
    return ",".join(map(str, files))


ROWS = [(encode(picture(i)), i % 3) for i in range(9)]


# ---------------------------------------------------------------- digits, normalising, resizing

def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    assert digits.x_train.shape == (400, 3, 8, 8) and digits.x_test.shape == (1397, 3, 8, 8)
    assert digits.x_train.dtype == torch.uint8 and digits.y_train.dtype == torch.int64
    assert (digits.channels, digits.num_classes, digits.size) == (3, 10, 16)
    got = torch.cat([digits.x_train, digits.x_test])[:, 0].double().flatten(1)
    want = torch.from_numpy(load_digits().data) * 255 / 16
    assert torch.allclose(got.sort(0).values, want.sort(0).values, atol=0.5)
    assert torch.cat([digits.y_train, digits.y_test]).bincount().tolist() == np.bincount(load_digits().target).tolist()


def test_grey_is_repeated_and_colour_becomes_luminance(tmp_path, digits):
    assert torch.equal(digits.x_train[:, 0], digits.x_train[:, 2])
    name = pair(tmp_path, ROWS, ROWS)
    grey = data.load(name, channels=1).x_train
    want = torch.from_numpy(np.stack([picture(i) for i in range(9)])).float() @ torch.tensor([0.299, 0.587, 0.114])
    assert (grey[:, 0].float() - want).abs().max() <= 1.05  # cut, not rounded


def test_prepared_training_images_have_mean_0_and_std_1():
    images = data.load("digits")
    x = images.prepare(images.x_train)
    assert x.dtype == torch.float32 and x.shape == (400, 1, 8, 8)
    assert abs(x.mean()) < 1e-5 and abs(x.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize("size", [5, 8, 16, 64])
def test_prepare_resizes_as_torchvision_does(size):
    images = data.load("digits", size=size, train_images=50)
    x = images.x_train.double()
    resized = TF.resize(images.x_test[:20].float(), [size, size], InterpolationMode.BILINEAR, antialias=True)
    want = (resized / 255 - x.mean() / 255) / (x.std(correction=0) / 255)
    assert torch.allclose(images.prepare(images.x_test[:20]), want.float(), atol=1e-4)


def test_a_constant_channel_does_not_divide_by_zero(tmp_path):
    black = [(encode(np.zeros((4, 4, 3), np.uint8)), 0)] * 2
    images = data.load(pair(tmp_path, black, ROWS[:1] * 2, name="black"), size=4)
    assert images.prepare(images.x_train).abs().max() == 0


# ---------------------------------------------------------------- augmentation

def test_the_whole_image_as_crop_is_a_plain_resize():
    x = torch.rand(4, 3, 12, 12)
    for size in (12, 24):
        got = data._random_crop(x, size, torch.rand(5, 4), flip=False, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        want = torch.nn.functional.interpolate(x, (size, size), mode="bilinear")
        assert torch.allclose(got, want, atol=1e-5)


def test_without_crop_and_mirroring_images_stay_as_they_are(digits):
    x = digits.x_train[:6].unflatten(0, (2, 3))
    got = digits.augment_many(x, [1, 2], flip=False, scale=(1.0, 1.0))
    assert torch.equal(got, torch.stack([digits.prepare(part) for part in x]))
    assert not torch.equal(got, digits.augment_many(x, [1, 2], flip=False, scale=(0.9, 1.0)))


def test_flipping_mirrors_about_half_of_the_images():
    x, drawn = torch.rand(200, 1, 6, 6), torch.rand(5, 200, generator=torch.Generator().manual_seed(0))
    got = data._random_crop(x, 6, drawn, flip=True, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    same, mirrored = ((got - y).abs().amax((1, 2, 3)) < 1e-5 for y in (x, x.flip(3)))
    assert (same ^ mirrored).all() and 70 < mirrored.sum() < 130


@pytest.mark.parametrize("h, w", [(32, 32), (32, 48)])
def test_crops_have_the_asked_area_and_shape_and_stay_inside(h, w):
    # Images that hold their own coordinates: the crop's corners can be read off its pixels.
    ys, xs = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    x = torch.stack([ys, xs])[None].expand(2000, -1, -1, -1).clone()
    drawn = torch.rand(5, 2000, generator=torch.Generator().manual_seed(0))
    out = data._random_crop(x, 16, drawn, flip=False, scale=(0.2, 0.5))
    inner = out[:, :, 1:-1, 1:-1]  # the border is clamped to pixel centres
    height = (inner[:, 0, -1, 0] - inner[:, 0, 0, 0]) * 16 / 13
    width = (inner[:, 1, 0, -1] - inner[:, 1, 0, 0]) * 16 / 13
    share, ratio = height * width / (h * w), width / height
    assert 0.19 < share.min() < 0.21 and 0.49 < share.max() < 0.51 and abs(share.mean() - 0.35) < 0.01
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35 and abs(ratio.log().mean()) < 0.02
    middle = out.mean((2, 3)) / torch.tensor([h, w])
    assert (middle.mean(0) - 0.5).abs().max() < 0.02 and middle.min() > 0.15 and middle.max() < 0.85


def test_augment_repeats_by_seed_varies_by_image_and_leaves_the_global_state_alone(digits):
    x = digits.x_train[:1].expand(32, -1, -1, -1)
    before = torch.get_rng_state()
    a, b, c = (digits.augment(x, seed, flip=True) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.shape == (32, 3, 16, 16) and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.cdist(a.flatten(1), a.flatten(1)).fill_diagonal_(9).min() > 0


def test_augment_normalises_as_prepare_does(digits):
    tiny = digits.augment(digits.x_train, 0, flip=True, scale=(0.999, 1.0))
    plain = digits.prepare(digits.x_train)
    assert abs(tiny.mean() - plain.mean()) < 0.05 and abs(tiny.std() - plain.std()) < 0.05


@pytest.mark.parametrize("k, b, size, scale", [(1, 7, 16, (0.08, 1.0)), (3, 32, 16, (0.08, 1.0)), (5, 13, 32, (0.5, 0.9)),
                                               (50, 3, 8, (0.08, 1.0))])
def test_many_batches_at_once_are_each_as_alone(k, b, size, scale):
    images = data.load("digits", size=size, channels=3)
    pick = torch.randint(400, (k, b), generator=torch.Generator().manual_seed(k))
    seeds = [3 + 5 * i for i in range(k)]
    got = images.augment_many(images.x_train[pick], seeds, True, scale)
    assert torch.equal(got, torch.stack([images.augment(images.x_train[p], s, True, scale) for p, s in zip(pick, seeds)]))
    alone = torch.rand(5, b, generator=torch.Generator().manual_seed(seeds[-1]))  # the numbers of one batch and its seed
    want = images._normalise(data._random_crop(images.x_train[pick[-1]].float(), size, alone, True, scale))
    assert torch.equal(got[-1], want)


@pytest.mark.parametrize("k, b, seeds", [(2, 1, 3), (0, 1, 0), (1, 0, 1)])
def test_many_batches_need_a_seed_each(digits, k, b, seeds):
    x = digits.x_train[:1, None].expand(1, 1, 3, 8, 8).repeat(k, b, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{seeds} seeds for {k} batches of {b} images: expected a seed for each"):
        digits.augment_many(x, range(seeds), flip=False)


@pytest.mark.parametrize("y, said", [([0, 1], "2 labels for 3 training images"),
                                     ([0, 1, 2], "training labels from 0 to 2: expected 0 to 1"),
                                     ([0, -1, 1], "training labels from -1 to 1: expected 0 to 1")])
def test_images_made_by_hand_have_a_label_each_that_is_a_class(digits, unchecked, y, said):
    with pytest.raises(ValueError, match=said):
        data.Images("mine", "by hand", digits.x_train[:3], torch.tensor(y), digits.x_test[:2], torch.tensor([0, 1]),
                    ("a", "b"), 8)


def test_mean_and_std_are_copied_to_a_device_once(monkeypatch):
    images, copies = data.load("digits"), []
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args: copies.append(args) or move(x, *args))
    for _ in range(3):
        images.augment(images.prepare(images.x_train[:4]).to(torch.uint8), 0, flip=True)
    moved = [args for args in copies if args == (torch.device("cpu"),)]
    assert len(moved) == 2  # mean and std


@pytest.mark.parametrize("x", [np.zeros((2, 3, 8, 8), np.uint8), [[1, 2]], None, torch.zeros(2, 3, 8, 8, dtype=torch.int16)],
                         ids=["numpy", "list", "None", "int16"])
def test_what_is_no_tensor_of_bytes_is_refused_in_words(digits, unchecked, x):
    for use in (digits.prepare, lambda x: digits.augment(x, 0, False), lambda x: digits.augment_many(x, [0], False)):
        with pytest.raises(ValueError, match=r"expected torch.uint8 \[(K, )?B, 3, h, w\]"):
            use(x)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
                               torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 0, 8, dtype=torch.uint8)],
                         ids=["float", "grey", "no batch", "no pixels"])
def test_other_types_and_channels_are_refused(digits, x):
    with pytest.raises(ValueError, match=r"expected torch.uint8 \[B, 3, h, w\]"):
        digits._check(x)  # directly, as shape checking would stop some of these before `prepare` does


def test_prepare_and_augment_refuse_other_channels(digits):
    grey = digits.x_train[:2, :1]
    for use in (digits.prepare, lambda x: digits.augment(x, 0, flip=False)):
        with pytest.raises(ValueError, match="expected torch.uint8"):
            use(grey)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.1)])
def test_impossible_scales_are_refused(digits, scale):
    with pytest.raises(ValueError, match="expected 0 < smallest"):
        digits.augment(digits.x_train[:2], 0, flip=False, scale=scale)


# ---------------------------------------------------------------- subsets, digest, orders

def test_subsets_keep_the_classes_shares_and_decode_nothing_else(tmp_path):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    rows = sources.subset_of("x", "train", labels, 20, seed=0)
    assert np.abs(np.bincount(labels[rows]) - [12, 6, 2]).max() <= 1 and len(set(rows)) == 20
    assert not np.array_equal(rows, sources.subset_of("x", "train", labels, 20, seed=1))
    broken = [(b"not an image", 0)] * 50
    keep = sources.subset_of("x", "train", np.zeros(51, int), 1, seed=3)[0]
    broken.insert(keep, (encode(picture(1)), 0))
    got = data.load(pair(tmp_path, broken, ROWS[::3]), train_images=1, seed=3)
    assert torch.equal(got.x_train[0].permute(1, 2, 0), torch.from_numpy(picture(1)))


def test_subset_sizes():
    images = data.load("digits", train_images=100, test_images=50)
    assert (len(images.x_train), len(images.y_train), len(images.x_test), len(images.y_test)) == (100, 100, 50, 50)
    assert images.y_train.bincount().min() >= 8
    with pytest.raises(ValueError, match="train_images = 401: data 'digits' has 400"):
        data.load("digits", train_images=401)


@pytest.mark.parametrize("kwargs", [dict(train_images=-1), dict(test_images=-1), dict(channels=2), dict(size=0)])
def test_impossible_settings_are_refused(kwargs):
    with pytest.raises(ValueError, match=" = ".join(map(str, *kwargs.items()))):
        data.load("digits", **kwargs)


def test_digest_changes_with_the_content_alone(tmp_path):
    def loaded(rows=ROWS, file="a", **kwargs):
        return data.load(pair(tmp_path, rows, ROWS, name=file, names=kwargs.pop("names", None)), **kwargs)

    def digest(*args, **kwargs):
        images = loaded(*args, **kwargs)
        assert images.training_digest != images.digest
        trained_on.append(images.training_digest)
        return images.digest

    trained_on = []
    assert len(digest()) == 32
    pixel = picture(0)
    pixel[0, 0, 0] ^= 1
    others = [digest(size=12), digest(channels=1), digest(names=["a", "b", "c"]), digest(train_images=8),
              digest([(encode(pixel), 0), *ROWS[1:]]), digest([(ROWS[0][0], 1), *ROWS[1:]])]
    assert len({digest(), *others}) == 7 == len(set(trained_on))
    assert digest() == digest(file="b")
    fewer = loaded(test_images=8)
    assert fewer.digest != loaded().digest and fewer.training_digest == loaded().training_digest


def test_epoch_order_is_a_permutation_decided_by_seed_and_epoch():
    orders = {(seed, epoch): data.epoch_order(50, epoch, seed) for seed in range(3) for epoch in range(3)}
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 9
    assert torch.equal(orders[1, 2], data.epoch_order(50, 2, 1))


# ---------------------------------------------------------------- Parquet

def test_parquet_round_trip(tmp_path):
    images = data.load(pair(tmp_path, ROWS, ROWS[:4]))
    assert torch.equal(images.x_train.permute(0, 2, 3, 1), torch.from_numpy(np.stack([picture(i) for i in range(9)])))
    assert images.y_test.tolist() == [0, 1, 2, 0] and images.classes == ("0", "1", "2") and images.size == 6
    assert images.source == "Parquet files set-train.parquet, set-test.parquet"  # no folders: records are shared


def test_parquet_class_names_and_known_names(tmp_path):
    pair(tmp_path, ROWS, ROWS, name="cifar10", names=["cat", "dog", "emu"])
    images = data.load("cifar10", root=tmp_path, download=False)
    assert images.classes == ("cat", "dog", "emu") and images.name == "cifar10"
    row = next(row for row in data.catalogue(tmp_path) if row["name"] == "cifar10")
    assert row["present"] and "cifar10" in row["where"]
    (tmp_path / "cifar10-test.parquet").unlink()
    with pytest.raises(ValueError, match="cifar10-test.parquet.*no such file"):
        data.load("cifar10", root=tmp_path, download=False)


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    pair(tmp_path, ROWS, ROWS, name="svhn")
    monkeypatch.setenv("PDIFF_DATA", str(tmp_path))
    assert len(data.load("svhn").x_train) == 9


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"),
                                        ("RGB", "BMP"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP")])
def test_every_kind_of_picture_becomes_one_or_three_channels(tmp_path, mode, kind):
    buffer = io.BytesIO()
    smooth = Image.fromarray(np.tile(np.linspace(60, 200, 16, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    else:
        image = smooth.convert(mode)
    image.save(buffer, kind)
    rows = [(buffer.getvalue(), 0)]
    got = data.load(pair(tmp_path, rows, rows)).x_train
    assert got.dtype == torch.uint8 and got.shape[1] == (3 if mode in ("P", "RGBA", "CMYK", "RGB") else 1)
    want = torch.from_numpy(np.asarray(image.convert("RGB") if mode != "I;16" else smooth)[:, :, 0].copy())
    assert (got[0, 0].float() - want).abs().max() < 10


def test_images_of_different_size_need_a_size_and_are_cropped_in_the_middle(tmp_path):
    wide = picture(50, 6, 10)
    name = pair(tmp_path, [*ROWS, (encode(wide), 1)], ROWS)
    with pytest.raises(ValueError, match=r"differ in size.*row 9: 6x10"):
        data.load(name)
    images = data.load(name, size=6)
    assert torch.equal(images.x_train[9].permute(1, 2, 0), torch.from_numpy(wide[:, 2:8]))
    assert torch.equal(images.x_train[0].permute(1, 2, 0), torch.from_numpy(picture(0)))
    smaller = data.load(name, size=4).x_train  # those before the odd one are resized too
    want = TF.resize(torch.from_numpy(picture(0)).permute(2, 0, 1), [4], antialias=True)
    assert smaller.shape == (10, 3, 4, 4) and torch.equal(smaller[0], want)


def test_mixed_grey_and_colour_needs_channels(tmp_path):
    name = pair(tmp_path, [*ROWS, (encode(picture(3, c=1)), 1)], ROWS)
    with pytest.raises(ValueError, match=r"mixes grey and colour images \(row 9\)"):
        data.load(name)
    assert data.load(name, channels=1).x_train.shape[1] == 1
    got = data.load(name, channels=3).x_train[9]
    assert torch.equal(got, torch.from_numpy(picture(3, c=1)).expand(3, -1, -1))


def test_broken_images_are_named_by_file_and_row(tmp_path):
    jpeg = encode(picture(0, 64, 64), "JPEG")
    for bad in (b"not an image", jpeg[:len(jpeg) // 2], b"", None):
        name = pair(tmp_path, [ROWS[0], (bad, 1)], ROWS[:2])
        with pytest.raises(ValueError, match=r"set-train\.parquet, row 1: this image is broken"):
            data.load(name)


@pytest.mark.parametrize("label", [-1, None])
def test_bad_labels_are_named_by_row(tmp_path, label):
    with pytest.raises(ValueError, match=f"set-train.parquet, row 2: label {label}"):
        data.load(pair(tmp_path, [*ROWS[:2], (ROWS[2][0], label)], ROWS))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"])
def test_labels_of_every_whole_type(tmp_path, kind):
    images = data.load(pair(tmp_path, ROWS, ROWS, kind=getattr(pa, kind)()))
    assert images.y_train.dtype == torch.int64 and images.y_train.tolist() == [0, 1, 2] * 3
    with pytest.raises(ValueError, match="set-train.parquet, row 1: label None"):
        data.load(pair(tmp_path, [ROWS[0], (ROWS[1][0], None)], ROWS, kind=getattr(pa, kind)()))


def test_a_label_that_no_tensor_can_hold(tmp_path):
    with pytest.raises(ValueError, match="row 1: label 18446744073709551615, expected a class number"):
        data.load(pair(tmp_path, [ROWS[0], (ROWS[1][0], 2**64 - 1)], ROWS, kind=pa.uint64()))


@pytest.mark.parametrize("values, kind", [([0.0, 1.0], pa.float64()), ([0.0, float("nan")], pa.float32()),
                                          ([False, True], pa.bool_()), (["0", "1"], pa.string()),
                                          (["a", "b"], pa.dictionary(pa.int32(), pa.string())),
                                          ([[0], [1]], pa.list_(pa.int64()))])
def test_labels_of_other_types_are_refused(tmp_path, values, kind):
    rows = [(ROWS[0][0], value) for value in values]
    with pytest.raises(ValueError, match="set-train.parquet has the columns .*label: .*expected image"):
        data.load(pair(tmp_path, rows, rows, kind=kind))


@pytest.mark.parametrize("labels, said", [
    ([1, 2, 3], "go up to 3, but no image has 0. Expected"),
    ([0, 1, 255], "go up to 255, but no image has 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 243 more. Expected"),
    ([0, 20_000_000, 40_000_000], "go up to 40000000, but no image has 1, 2, .* 10 and 39,999,988 more. Expected"),
    ([0, 2, 5], "no image has 1, 3, 4. Expected")])
def test_unused_class_numbers_are_named(tmp_path, labels, said):
    rows = [(ROWS[0][0], label) for label in labels]
    with pytest.raises(ValueError, match=f"set-train.*{said} the numbers 0, 1, 2, .*huggingface"):
        data.load(pair(tmp_path, rows, rows))


def test_test_labels_that_no_training_image_has(tmp_path):
    shifted = [(image, label + 1) for image, label in ROWS]  # classes from 0 here, from 1 there
    with pytest.raises(ValueError, match="no training image has the test labels 3. Expected"):
        data.load(pair(tmp_path, ROWS, shifted))
    assert data.load(pair(tmp_path, ROWS, ROWS[:2])).num_classes == 3


def test_named_classes_may_have_no_images(tmp_path):
    images = data.load(pair(tmp_path, ROWS[2:3], ROWS[:1], names=list("abcd")))
    assert images.classes == tuple("abcd") and images.y_train.tolist() == [2] and images.y_test.tolist() == [0]


def test_labels_beyond_the_named_classes(tmp_path):
    with pytest.raises(ValueError, match="label 2, expected less than the 2 named classes"):
        data.load(pair(tmp_path, ROWS, ROWS, names=["a", "b"]))


def test_train_and_test_must_name_the_same_classes(tmp_path):
    pair(tmp_path, ROWS, ROWS, name="a", names=["a", "b", "c"])
    pair(tmp_path, ROWS, ROWS, name="b", names=["a", "b", "d"])
    with pytest.raises(ValueError, match=r"classes of training and test images differ: \['c', 'd'\]"):
        data.load(f"{tmp_path}/a-train.parquet,{tmp_path}/b-test.parquet")


def test_parquet_files_that_are_not_there_or_hold_something_else(tmp_path):
    good = pair(tmp_path, ROWS, ROWS).split(",")[0]
    other, text, empty = (tmp_path / f"{n}.parquet" for n in ("other", "text", "empty"))
    pq.write_table(pa.table({"img": [1], "label": [2]}), other)
    text.write_text("hello")
    write_parquet(empty, [], [])
    for file, message in ((tmp_path / "nowhere.parquet", "nowhere.parquet.*no such file"), (text, "not a Parquet file"),
                          (other, "has the columns img: int64, label: int64: expected image"),
                          (empty, "0 test images")):
        with pytest.raises(ValueError, match=message):
            data.load(f"{good},{file}")
    with pytest.raises(ValueError, match="expected two Parquet files"):
        data.load(good)


# ---------------------------------------------------------------- folders and torchvision

@pytest.mark.parametrize("second", ["test", "val"])
def test_folder(tmp_path, second):
    for part in ("train", second):
        for label, c in enumerate(("ant", "bee")):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(picture(10 * label + i)).save(tmp_path / part / c / f"{i}.png")
    images = data.load(str(tmp_path))
    assert images.classes == ("ant", "bee") and images.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(images.x_test[4].permute(1, 2, 0), torch.from_numpy(picture(11)))
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"bee.1\.png: this image is broken"):
        data.load(str(tmp_path))
    (tmp_path / second / "bee").rename(tmp_path / second / "cow")
    with pytest.raises(ValueError, match=r"differ: \['bee', 'cow'\]"):
        data.load(str(tmp_path))


def test_folder_without_its_parts(tmp_path):
    with pytest.raises(ValueError, match="expected a folder train"):
        data.load(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="one folder of images per class"):
        data.load(str(tmp_path))


def test_mnist_in_its_own_format(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    x = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 20, 28, 28) + x.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 20) + bytes(i % 10 for i in range(20)))
    images = data.load("mnist", root=tmp_path, download=False)
    assert np.array_equal(images.x_train[:, 0].numpy(), x) and images.y_test.tolist() == [*range(10)] * 2
    assert images.num_classes == 10 and images.source == "torchvision MNIST"
    assert next(r for r in data.catalogue(tmp_path) if r["name"] == "mnist")["present"]


@pytest.mark.parametrize("name, layout, key", [("cifar10", "NHWC", "targets"), ("stl10", "NCHW", "labels"),
                                               ("svhn", "NCHW", "labels")])
def test_torchvision_sets_in_memory(tmp_path, monkeypatch, name, layout, key):
    side = sources.KNOWN[name].side
    x = np.stack([picture(i, side, side) for i in range(20)])
    asked = []

    def fake(**kwargs):
        asked.append(kwargs)
        return SimpleNamespace(data=x if layout == "NHWC" else x.transpose(0, 3, 1, 2), **{key: [*range(10)] * 2})

    monkeypatch.setattr(torchvision.datasets, sources.KNOWN[name].cls, fake)
    images = data.load(name, root=tmp_path, train_images=10)
    assert images.x_train.shape == (10, 3, side, side) and len(images.x_test) == 20
    assert np.array_equal(images.x_test.permute(0, 2, 3, 1).numpy(), x)
    assert [a["root"] for a in asked] == [tmp_path] * 2 and asked[0] != asked[1] and asked[0]["download"]


@pytest.mark.parametrize("labels, said", [([0, 1, -1], "label -1, expected class numbers from 0"),
                                          ([0, 1, 10], "label 10, expected less than the 10 named classes"),
                                          ([0, 1, 1.5], "labels of type float64, expected class numbers")])
def test_labels_of_torchvision_sets_are_checked_too(tmp_path, monkeypatch, labels, said):
    x = np.stack([picture(i, 32, 32) for i in range(3)])
    fake = SimpleNamespace(data=x.transpose(0, 3, 1, 2), labels=labels)
    monkeypatch.setattr(torchvision.datasets, "SVHN", lambda **kwargs: fake)
    with pytest.raises(ValueError, match=said):
        data.load("svhn", root=tmp_path)


@pytest.mark.parametrize("name, key", [("flowers", "_labels"), ("pets", "_labels"), ("food101", "_labels"),
                                       ("imagenet", "targets")])
def test_torchvision_sets_of_photographs(tmp_path, monkeypatch, name, key):
    known, opened = sources.KNOWN[name], []

    class Fake:
        classes = [(f"class {i}", "synonym") if name == "imagenet" else f"class {i}" for i in range(known.classes)]

        def __init__(self, root, split, **kwargs):
            assert ("download" in kwargs) == (name != "imagenet")
            setattr(self, key, [i % 5 for i in range(20)])

        def __getitem__(self, row):
            opened.append(row)
            return Image.fromarray(picture(row, 20 + row, 30)), row % 5

    monkeypatch.setattr(torchvision.datasets, known.cls, Fake)
    with pytest.raises(ValueError, match=f"size = None: the images of {name} differ"):
        data.load(name, root=tmp_path)
    images = data.load(name, root=tmp_path, size=16, train_images=5, test_images=5)
    assert len(opened) == 10 and images.x_train.shape == (5, 3, 16, 16)
    assert images.y_train.sort().values.tolist() == [0, 1, 2, 3, 4] and images.classes[3] == "class 3"


@pytest.mark.parametrize("name", sources.KNOWN)
def test_sets_that_are_not_there_say_what_to_do(tmp_path, name):
    with pytest.raises(RuntimeError, match=rf"data '{name}' is not in .*put {name}-train\.parquet"):
        data.load(name, size=32, root=tmp_path, download=False)
    assert not next(r for r in data.catalogue(tmp_path) if r["name"] == name)["present"]


@pytest.mark.parametrize("name, message", [("cifar", "did you mean cifar10"), ("/no/such/folder", "Expected digits"),
                                           ("", "Expected digits")])
def test_unknown_names_list_what_is_possible(name, message):
    with pytest.raises(ValueError, match=f"data '{name}' is unknown.*{message}"):
        data.load(name)


def test_catalogue_columns(tmp_path):
    rows = data.catalogue(tmp_path)
    assert {tuple(row) for row in rows} == {("name", "classes", "source", "image_size", "present", "where")}
    assert [row["name"] for row in rows if row["present"]] == ["digits", "scenes"]
