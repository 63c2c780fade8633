"""Annotated shapes and types of the whole package are checked at run time, in every test."""

import gc
import importlib
import os
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import config, install_import_hook

gc.disable()  # while modules and tests are collected, which all stay: looking for garbage among them is a quarter of the time

# All but `recipe`, which holds no tensors and checks (and converts) every value by itself.
PACKAGE = Path(__file__).parents[1] / "pdiff_lib"
MODULES = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in PACKAGE.rglob("*.py")
           if file.stem not in ("__init__", "recipe")}
install_import_hook(sorted(MODULES), "beartype.beartype")

# Whatever is first imported by a module of the package is compiled anew, as the hook names bytecode otherwise meanwhile.
LARGE = ("torch._dynamo", "torch.export", "torchvision.transforms.v2", "timm", "pandas", "pyarrow.parquet", "sklearn.decomposition",
         "scipy.stats", "plotly.graph_objs._figure", "plotly.subplots", "kaleido", "ipywidgets", "anywidget", "nbformat", "beartype")


def pytest_collection():
    """Not in the process that hands out the tests, which imports none of them."""
    for package in LARGE:
        importlib.import_module(package)


def pytest_collection_finish():
    """From here on garbage is looked for among what tests make alone."""
    gc.freeze()
    gc.enable()


settings.register_profile("busy", deadline=None)  # how long an example takes is up to what else is at work
settings.load_profile("busy")


def pytest_xdist_auto_num_workers():
    """One more than cores: whoever is given the runs of the notebooks waits for processes of their own."""
    return (os.cpu_count() or 1) + 1


# Files that take longest, and wait for processes of their own: they begin, and the many short ones fill up the end.
FIRST = ("test_notebooks.py", "test_browser.py", "test_sweep.py", "test_app.py", "test_gpu.py", "test_cli.py", "test_renderer.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture
def unchecked():
    """No such checks, as for a user: for the library's own messages about wrong shapes."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
