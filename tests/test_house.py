"""The package as a house: its wings, its face, and that moving code loses nothing that was computed before."""

import ast
import importlib
import inspect
import json
import operator
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pdiff_lib
from pdiff_lib.base import runs
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.experiment import Experiment

PACKAGE = Path(pdiff_lib.__file__).parent
# What each wing may import, beside itself (pdiff_lib/README.md). What is on top may import all but the explorers and batches.
MAY = {
    "base": set(),
    "networks": {"base"},
    "tasks": {"base", "networks"},
    "zoos": {"base", "networks", "tasks"},
    "generators": {"base"},
    "measures": {"base", "networks"},
    "batches": {"base", "top"},  # `pdiff generate` walks the line, from inside its function
    "drawing": {"base", "networks"},
    "top": {"base", "networks", "tasks", "zoos", "generators", "measures", "drawing"},
    "explorers": {"base", "networks", "tasks", "generators", "measures", "drawing", "top"},
}
TOP = {file.stem for file in PACKAGE.glob("[a-z]*.py")}


def imports(file: Path) -> set[str]:
    """Full names of the package's modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pdiff_lib":
            assert node.level == 0
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if (PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").is_file() or
                      (PACKAGE.parent / Path(*name.split("."))).is_dir() else node.module for name in inner}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pdiff_lib"}
    return found


def wing(name: str) -> str:
    """The wing of a module, `top` for one that is in none."""
    part = name.split(".")[1]
    return "top" if part in TOP else part


def modules() -> dict[str, Path]:
    return {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in PACKAGE.rglob("*.py") if f.parent != PACKAGE
            or f.stem != "__init__"}


def test_a_wing_imports_what_it_may_know():
    seen = {name: {wing(other) for other in imports(file)} for name, file in modules().items()}
    assert set(map(wing, seen)) == set(MAY)
    assert {name: extra for name, knows in seen.items() if (extra := knows - MAY[wing(name)] - {wing(name)})} == {}


def test_the_library_names_modules_where_they_are():
    for name, file in modules().items():
        for other in imports(file):
            assert "." in other and other.split(".")[1] not in pdiff_lib.FACE.keys() - {"networks"}, (name, other)


def test_no_two_modules_import_each_other():
    arrows = {name.removesuffix(".__init__"): {o for o in imports(file)} for name, file in modules().items()}
    while leaves := [name for name, others in arrows.items() if not others & arrows.keys() - {name}]:
        for name in leaves:
            del arrows[name]
    assert arrows == {}  # what is left is in a circle, or leads into one


def test_a_module_can_be_held_in_ones_head():
    assert {name: n for name, file in modules().items() if (n := len(file.read_text().splitlines())) > 300} == {}


def test_short_names_are_the_modules_themselves():
    names = [file.stem for file in PACKAGE.glob("*/*.py") if file.stem != "__init__"]
    assert sorted(set(names)) == sorted(names)  # or a short name would mean two things
    for name in pdiff_lib.FACE:
        full = importlib.import_module(pdiff_lib.FACE[name])
        assert importlib.import_module(f"pdiff_lib.{name}") is getattr(pdiff_lib, name) is full
        assert full.__name__ == full.__spec__.name == pdiff_lib.FACE[name]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pdiff_lib.nothing
    with pytest.raises(ModuleNotFoundError, match="pdiff_lib.nothing"):
        importlib.import_module("pdiff_lib.nothing")


def test_a_short_name_runs_as_a_program():
    command = [sys.executable, "-m", "pdiff_lib.cli", "data"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("digits")


def test_the_face_is_what_it_was():
    """Functions, classes, methods and the names of their arguments in the flat library that came before the wings, as the
    README, the notebooks and users call them: all are there under the same short names (`None`: an attribute)."""
    for module, names in json.loads((Path(__file__).parent / "face.json").read_text()).items():
        found = importlib.import_module(f"pdiff_lib.{module}")
        for name, arguments in names.items():
            thing = operator.attrgetter(name)(found)
            if arguments is not None:
                now = list(inspect.signature(inspect.unwrap(thing)).parameters)
                assert [a for a in now if a in arguments] == arguments, (module, name)


def test_the_package_alone_imports_nothing_heavy():
    code = "import sys, pdiff_lib; print(sorted({'torch', 'timm', 'plotly', 'pandas', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Of these, commit 5812c0a (the last of the flat library) left the stages that lie in tests/stages.
THEN = {"dataset": "digits", "image_size": 32, "train_images": 100, "test_images": 100, "network": "hyperrep-cnn", "pretrained": False,
        "base_epochs": 1, "base_batch": 50, "subset": "*bias", "k_checkpoints": 4, "zoo_batch": 16, "crop_scale": 0.6, "flip": False,
        "ae_channels": [2, 2], "latent_dim": 4, "ae_steps": 3, "denoiser_channels": [2, 2, 2], "diffusion_steps": 3, "T": 10,
        "samples": 4, "noise_scales": [0.05], "vae_steps": 3}


def test_stages_from_before_the_move_are_found(tmp_path, monkeypatch):
    """Fails where code of training or of a method has changed: then stages that users have are computed anew. If that is meant,
    take the row of that stage out of `moved.json` and its file out of tests/stages; if not, it is a bug."""
    kept = Path(__file__).parent / "stages"
    shutil.copytree(kept, tmp_path / "stages")
    e = Experiment(Recipe.of(**THEN), runs.Store(tmp_path / "stages"), device="cpu", progress=False)
    e.add("vae", e.vae())
    monkeypatch.setattr(runs, "write", lambda path, *_: pytest.fail(f"computed again: {path}"))
    found = {"network": e.net.state_dict(), "zoo": {"theta": e.zoo.theta},
             "autoencoder": {"z": e.fitted("p-diff").z}, "generated": {"theta": e.theta("p-diff")}}
    e.theta("vae")
    for stage, tensors in found.items():
        files = [runs.read(file)[0] for file in (kept / stage).glob("*.safetensors")]
        assert any(all(torch.equal(file.get(name, file.get(f"net.{name}")), t) for name, t in tensors.items()) for file in files), stage


def test_where_modules_lie_is_no_part_of_their_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, line in {"here": "from pdiff_lib.base import runs", "there": "from pdiff_lib import data, runs", "other": "import os"}.items():
        (tmp_path / f"{name}.py").write_text(f"{line}\nx = 1\n")
    here, there, other = (runs.code_digest(importlib.import_module(name)) for name in ("here", "there", "other"))
    assert here == there != other
