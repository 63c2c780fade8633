"""Annotated images of one's own: COCO's format and Pascal VOC's; what is wrong with them is said, with the file and the value."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pdiff_lib.base.recipe import Recipe
from pdiff_lib.tasks import annotations, detection, scenes

BOX = [4, 2, 10, 6]  # left, top, width, height


def coco(place, **changes):
    """An image of 40 x 20 pixels with one object, which fills its box, and a crowd."""
    place.mkdir(exist_ok=True)
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[2:8, 4:14] = 255
    Image.fromarray(picture).save(place / "a.png")
    x, y, w, h = BOX
    held = {"images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}, {"id": 8, "file_name": "b.png", "width": 4, "height": 4}],
            "categories": [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 17, "bbox": BOX, "iscrowd": 0,
                             "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]},
                            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [30, 10, 8, 8], "iscrowd": 1,
                             "segmentation": [[30, 10, 38, 10, 38, 18, 30, 18]]}]}
    for key, value in changes.items():
        held["annotations"][0][key] = value
    file = place / "notes.json"
    file.write_text(json.dumps(held))
    return file


def test_coco_boxes_and_masks_land_where_the_object_is(tmp_path):
    file = coco(tmp_path)
    found = scenes.load(f"{file},{file}", 80)
    assert found.classes == ("cat", "dog") and found.x_train.shape == (1, 3, 80, 80)  # an image without objects is left out
    left, top, right, low, label, crowd = found.y_train[0, 0].tolist()
    assert [left, top, right, low, label, crowd] == [8, 24, 28, 36, 1, 0]  # twice as large, 20 pixels down
    assert found.y_train[0, 1, 4:].tolist() == [0, 1]
    inside = found.x_train[0, 0, 26:34, 10:26]
    assert inside.min() > 200 and found.x_train[0, 0, 40:, :].max() < 30
    assert (found.masks_train[0, 26:34, 10:26] == 2).all() and (found.masks_train[0, 42:54, 62:74] == scenes.NOT_COUNTED).all()
    assert (found.masks_train[0] == 2).sum() == pytest.approx(240, abs=30) and found.masks_train[0, 0, 0] == 0


def test_without_segmentations_there_are_boxes_and_no_masks(tmp_path):
    file = coco(tmp_path, segmentation=[])
    assert scenes.load(f"{file},{file}", 80).masks_test.shape == (1, 0, 0)


@pytest.mark.parametrize("changes, message", [
    ({"bbox": [35, 2, 10, 6]}, r"a.png: box \[35, 2, 45, 8\] of 'dog': expected .* 0 to 40"), ({"bbox": [4, 2, 0, 6]}, "expected left < right"),
    ({"category_id": 99}, "annotation 1 has category 99, which has no name"), ({"image_id": 1}, "belongs to image 1, which is not there")])
def test_wrong_annotations_name_the_file_and_the_value(tmp_path, changes, message):
    file = coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        scenes.load(f"{file},{file}", 80)


def test_an_empty_file_a_missing_image_and_a_foreign_class_are_refused(tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(ValueError, match="empty.json has 0 images and 0 annotations"):
        scenes.load(f"{empty},{empty}", 80)
    empty.write_text("{")
    with pytest.raises(ValueError, match="expected a JSON file"):
        scenes.load(f"{empty},{empty}", 80)
    first, second = coco(tmp_path / "one"), coco(tmp_path / "two")
    second.write_text(second.read_text().replace('"dog"', '"wolf"'))
    with pytest.raises(ValueError, match="class 'wolf' of the test images"):
        scenes.load(f"{first},{second}", 80)
    (tmp_path / "one" / "a.png").unlink()
    with pytest.raises(ValueError, match="no image 'a.png'"):
        scenes.load(f"{first},{first}", 80)
    with pytest.raises(ValueError, match="train_images = 5: .* has 1"):
        annotations.load(f"{coco(tmp_path / 'three')},{coco(tmp_path / 'three')}", 80, 5, 0, 0)


XML = """<annotation><size><width>40</width><height>20</height></size>
<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>3</ymin><xmax>{xmax}</xmax><ymax>8</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult><bndbox><xmin>31</xmin><ymin>11</ymin><xmax>38</xmax><ymax>18</ymax></bndbox></object></annotation>"""


def voc(place, name="dog", xmax=14, mask=(20, 40), value=2):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main", "SegmentationClass"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(place / "JPEGImages/a.jpg")
    painted = np.zeros(mask, np.uint8)
    painted[2:8, 4:14] = value
    drawn = Image.fromarray(painted, "P")
    drawn.putpalette([level for i in range(256) for level in (i, i, i)])
    drawn.save(place / "SegmentationClass/a.png")
    (place / "Annotations/a.xml").write_text(XML.format(name=name, xmax=xmax))
    for part in ("train", "val"):
        (place / f"ImageSets/Main/{part}.txt").write_text("a\n")
    return str(place)


def test_pascal_voc_counts_pixels_from_one_and_marks_difficult_objects(tmp_path):
    found = scenes.load(voc(tmp_path), 80)
    assert found.classes == ("cat", "dog") and found.y_test[0].tolist() == [[8, 24, 28, 36, 1, 0], [60, 40, 76, 56, 0, 1]]
    assert (found.masks_test[0] == 2).sum() == 240


@pytest.mark.parametrize("how, message", [
    ({"name": ""}, "a.xml: an object without a name"), ({"xmax": 60}, "a.jpg: box .* expected left < right"), ({"xmax": "x"}, "expected an annotation"),
    ({"mask": (10, 40)}, r"a.png has \[10, 40\] pixels: expected \[20, 40\]"), ({"value": 9}, "a.png holds class 9: expected 0 to 2")])
def test_wrong_folders_are_refused(tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        scenes.load(voc(tmp_path, **how), 80)


def test_masks_are_read_as_their_numbers(tmp_path):
    assert torch.equal(scenes.load(voc(tmp_path), 40).masks_train.unique(), torch.tensor([0, 2], dtype=torch.uint8))


def test_without_the_extra_its_name_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ValueError, match=r"faster-coco-eval, which is not installed.*pdiff-lib\[vision\]"):
        detection.Detection(Recipe.of(task="detection", dataset="scenes", image_size=48).data)
    file = coco(tmp_path)
    with pytest.raises(ValueError, match="faster-coco-eval"):
        scenes.load(f"{file},{file}", 80)
