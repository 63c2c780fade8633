"""meshes.py: bodies whose solid part is known, whole and with holes, and files that are none."""

import sys

import numpy as np
import pytest
import torch

from device import DEVICE
from pdiff_lib.base.recipe import Data, Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.tasks import fields, meshes

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("igl")
CORNER = np.ones(3) / 3**0.5  # where the sphere has its hole: its bounding box stays
SETTINGS = {"task": "fields", "field_kind": "mesh", "field_points": 2000, "field_test_points": 20_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes: spheres (one of them with a hole), and a box that is no cube."""
    place = tmp_path_factory.mktemp("bodies")
    (place / "round").mkdir()
    (place / "boxes").mkdir()
    sphere = trimesh.creation.icosphere(4, radius=3)
    sphere.apply_translation([5, 0, 0])
    sphere.export(place / "round" / "sphere.ply")
    open_ = sphere.copy()
    open_.update_faces((open_.triangles_center - [5, 0, 0]) @ CORNER < 2.7)
    open_.export(place / "round" / "open.obj")
    trimesh.creation.box((1, 2, 4)).export(place / "boxes" / "box.stl")
    (place / "notes.txt").write_text("no mesh")
    return place


def task(folder, **changes) -> fields.Fields:
    return fields.Fields(Data(**{**SETTINGS, "dataset": str(folder), **changes}))


@pytest.fixture(scope="module")
def made(folder) -> fields.Fields:
    return task(folder)


def test_a_subfolder_is_a_class_and_every_file_an_object(made):
    o = made.objects
    assert sorted(o.names) == ["boxes/box.stl", "round/open.obj", "round/sphere.ply"] and o.classes == ("boxes", "round")
    assert [o.classes[i] for i in o.labels] == [name.split("/")[0] for name in o.names]
    assert o.points.shape == (3, 4000, 3) and o.values.dtype == torch.bool and o.d == 3 and o.fitted == 2


@pytest.mark.parametrize("name, volume", [("round/sphere.ply", 4 / 3 * np.pi * 0.95**3), ("boxes/box.stl", (2 * 0.95) ** 3 / 8)])
def test_the_inside_has_its_volume_in_the_cube(made, name, volume):
    share = made.objects.test_values[made.objects.names.index(name)].double().mean()
    assert share == pytest.approx(volume / 8, abs=4 * (volume / 8 / 20_000) ** 0.5)


def test_a_hole_changes_little_but_at_the_hole(made):
    o = made.objects
    whole, holed = (o.test_values[o.names.index(f"round/{name}")] for name in ("sphere.ply", "open.obj"))
    changed = o.test_points[whole != holed] @ torch.tensor(CORNER).float()
    assert 0 < len(changed) < 0.03 * whole.sum() and changed.min() > 0.8 * 0.95


def test_half_of_the_points_are_uniform_and_half_near_the_surface(made):
    radius = made.objects.points[made.objects.names.index("round/sphere.ply")].norm(dim=1)
    spread, close = radius.split(2000)
    assert ((close - 0.95).abs() < 5 * meshes.SIGMA).all() and (close - 0.95).std() == pytest.approx(meshes.SIGMA, rel=0.1)
    assert (spread < 0.95).float().mean() == pytest.approx(4 / 3 * np.pi * 0.95**3 / 8, abs=0.05)
    inside = made.objects.values[made.objects.names.index("round/sphere.ply")]
    assert torch.equal(inside[(radius - 0.95).abs() > 0.005], (radius < 0.95)[(radius - 0.95).abs() > 0.005])


def test_points_on_a_surface_are_spread_by_area():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [3, 0, 5], [0, 3, 5]])
    points = meshes.near(vertices, torch.tensor([[0, 1, 2], [3, 4, 5]]), 20_000, torch.Generator().manual_seed(0))
    large = points[points[:, 2] > 2.5]
    assert len(large) / len(points) == pytest.approx(0.9, abs=0.01)
    torch.testing.assert_close(large.mean(dim=0), torch.tensor([1.0, 1, 5]), atol=0.03, rtol=0)


def test_points_are_kept_and_a_second_look_reads_no_mesh(folder, tmp_path, monkeypatch):
    settings, store = Data(**{**SETTINGS, "dataset": str(folder)}), Store(tmp_path)
    first = fields.Fields(settings, store)
    monkeypatch.setattr(trimesh, "load", lambda *_, **__: pytest.fail("read again"))
    assert fields.Fields(settings, store).digest == first.digest


def test_a_field_of_a_body_is_fitted_and_judged(folder, tmp_path):
    e = Experiment(Recipe.of(**SETTINGS, dataset=str(folder), network="field-24-24", pretrained=False, subset="all", zoo_mode="independent",
                             zoo_start="first", k_checkpoints=2, base_epochs=20, base_batch=200, base_optimizer="adam", base_lr=1e-2,
                             base_weight_decay=0.0), Store(tmp_path), device=DEVICE, progress=False)
    assert e.task.fidelity(e.predictions(ORIGINAL)).diagonal().min() > 0.9 and e.task.score.name == "IoU"
    torch.testing.assert_close(e.judged(ORIGINAL).score, e.task.fidelity(e.predictions(ORIGINAL))[:, 2])
    assert len(list((tmp_path / "shape").glob("*.safetensors"))) == 3


def broken(place, name):
    """A file that is no body, and what is said of it."""
    file = place / name
    if name == "text.ply":
        file.write_text("this is no mesh")
    elif name == "none.obj":
        file.write_text("# nothing\n")
    elif name == "flat.obj":
        file.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    elif name == "inward.stl":
        mesh = trimesh.creation.box((1, 1, 1))
        mesh.invert()
        mesh.export(file)
    elif name == "missing.off":
        file.write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 1\n3 0 1 7\n")


@pytest.mark.parametrize("name, message", [
    ("text.ply", r"mesh text.ply (cannot be read|is empty)"), ("none.obj", r"mesh none.obj (cannot be read|is empty)"),
    ("flat.obj", "mesh flat.obj is flat"), ("inward.stl", "mesh inward.stl is empty: none of 20000 points"),
    ("missing.off", r"mesh missing.off (cannot be read|is broken)")])
def test_a_file_that_is_no_body_is_named(tmp_path, name, message):
    broken(tmp_path, name)
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "sound.stl")
    with pytest.raises(ValueError, match=message):
        task(tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "nowhere"}, "dataset 'nowhere' is no folder"), ({"train_images": 4}, "holds 3 meshes .*: expected at least 5, 4 for"),
    ({"test_images": 3}, "expected at least 4, 1 for training and 3"), ({"image_channels": 1}, "image_channels = 1")])
def test_what_is_no_folder_of_bodies_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        task(folder, **changes)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds 0 meshes"):
        task(tmp_path)


@pytest.mark.parametrize("library", ["trimesh", "igl"])
def test_a_missing_library_names_the_extra(folder, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"not installed: expected the extra, pip install 'pdiff-lib\[shapes\]'"):
        task(folder)
