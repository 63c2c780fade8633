"""Scenes that are made here: what boxes, masks and classes say is what is in the picture; training and testing share nothing."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pdiff_lib.tasks import data, scenes
from pdiff_lib.tasks.scenes import NOTHING


@pytest.fixture(scope="module")
def made():
    return scenes.load("scenes", 48, 40, 30, seed=3)


def test_a_box_is_that_of_the_mask_and_holds_one_object(made):
    for y, masks in ((made.y_train, made.masks_train), (made.y_test, made.masks_test)):
        for objects, mask in zip(y, masks):
            there = objects[objects[:, 4] != NOTHING]
            assert 1 <= len(there) <= 4
            assert set(there[:, 4].int().add(1).tolist()) | {0} == set(mask.unique().tolist()) | {0}
            covered = torch.zeros_like(mask, dtype=torch.bool)
            for left, top, right, low, label, ignored in there.int().tolist():
                own = mask[top:low, left:right] == label + 1
                # Tight on each side: there is a pixel of the class in the outermost rows and columns.
                assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any() and not ignored
                covered[top:low, left:right] = True
            assert not (mask != 0)[~covered].any()


def test_objects_are_seen_and_of_the_sizes_that_are_promised(made):
    there = made.y_train[made.y_train[..., 4] != NOTHING]
    sides = (there[:, 2:4] - there[:, :2]).amax(dim=1) / 48
    assert 0.1 < sides.min() and sides.max() < 0.6 and 0.3 < sides.mean() < 0.45
    # An object stands out from what it is on: inside its mask another colour than in a frame around its box.
    differences = []
    for x, mask in zip(made.x_train.float(), made.masks_train):
        differences.append(float((x[:, mask > 0].mean(dim=1) - x[:, mask == 0].mean(dim=1)).abs().mean()))
    assert np.mean(differences) > 20
    assert torch.bincount(there[:, 4].long(), minlength=10).min() > 0  # all classes


def test_the_same_seed_makes_the_same_scenes_and_another_seed_others(made):
    again, other = scenes.load("scenes", 48, 40, 30, seed=3), scenes.load("scenes", 48, 40, 30, seed=4)
    assert all(torch.equal(getattr(made, name), getattr(again, name)) for name in ("x_train", "y_train", "masks_test", "x_test"))
    assert not torch.equal(made.x_train, other.x_train)


def parquet(path, pictures, labels):
    rows = []
    for picture in pictures:
        held = io.BytesIO()
        Image.fromarray(picture).save(held, "PNG")
        rows.append({"bytes": held.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": pa.array(labels, pa.int64())}), path)


def test_objects_and_photographs_from_other_data_sets_by_name_each_split_from_its_own(tmp_path):
    """A set of one's own in the folder of data sets; its training images are bright squares, its test images crosses."""
    square, cross = np.zeros((2, 12, 12), np.uint8)
    square[2:10, 2:10], cross[5:7] = 255, 255
    cross[:, 5:7] = 255
    parquet(tmp_path / "shapes-train.parquet", [square] * 3, [0, 1, 0])
    parquet(tmp_path / "shapes-test.parquet", [cross] * 3, [0, 1, 1])
    for part, level in (("train", 10), ("test", 200)):
        parquet(tmp_path / f"cifar10-{part}.parquet", [np.full((32, 32, 3), level, np.uint8)] * 10, list(range(10)))
    found = scenes.load("scenes:shapes+digits@cifar10", 32, 12, 8, root=tmp_path)
    assert found.classes == ("0", "1", *(f"digits {c}" if c in "01" else str(c) for c in map(str, range(10))))
    assert (found.x_train[:, :, 0, 0] == 10).float().mean() > 0.5 > (found.x_train[:, :, 0, 0] == 200).float().mean()
    assert (found.x_test[:, :, 0, 0] == 200).float().mean() > 0.5
    for y, masks, full in ((found.y_train, found.masks_train, True), (found.y_test, found.masks_test, False)):
        for objects, mask in zip(y, masks):
            for left, top, right, low, label, _ in (o for o in objects.int().tolist() if o[4] in (0, 1)):
                if not (mask[top:low, left:right] == label + 1).all():
                    continue
                assert full  # only a square fills its box
    assert found.y_train[..., 4].max() > 1  # and some digits
    assert data.load("scenes:digits@cifar10", size=32, train_images=2, test_images=2, root=tmp_path).x_test.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name, size, message", [
    ("scenes:@cifar10", 32, "expected 'scenes', or 'scenes:OBJECTS@PHOTOGRAPHS'"), ("scenes:digits@nowhere", 32, "data 'nowhere' is unknown"),
    ("scenes:digitz@photographs", 32, "did you mean digits"), ("scenes", 8, "at least 16"), ("nothing", 32, "expected 'scenes'")])
def test_what_cannot_be_made_is_said(name, size, message):
    with pytest.raises(ValueError, match=message):
        scenes.load(name, size, 2, 2)


def test_mirrored_scenes_keep_boxes_and_masks_on_their_objects(made):
    x, y = scenes.mirrored(0, made.x_train, made.y_train)
    _, masks = scenes.mirrored(0, made.x_train, made.masks_train)
    turned = ~(x == made.x_train).flatten(1).all(dim=1)
    assert 0.2 < turned.float().mean() < 0.8
    assert torch.equal(x[turned], made.x_train[turned].flip(-1)) and torch.equal(masks[turned], made.masks_train[turned].flip(-1))
    for objects, mask in zip(y, masks):
        for left, top, right, low, label, _ in objects[objects[:, 4] != NOTHING].int().tolist():
            own = mask[top:low, left:right] == label + 1
            assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()
