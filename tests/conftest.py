"""Annotated shapes and types of the whole package are checked at run time, in every test."""

from pathlib import Path

import pytest
from jaxtyping import config, install_import_hook

# All but `recipe`, which holds no tensors and checks (and converts) every value by itself.
PACKAGE = Path(__file__).parent.parent / "pdiff_lib"
MODULES = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "recipe"}
install_import_hook([f"pdiff_lib.{name}" for name in MODULES], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)  # xdist reads the mark in the same hook
def pytest_collection_modifyitems(items):
    """Under pytest-xdist (--dist=loadgroup) a file's tests share a worker, and their fixtures; notebooks run where there is time."""
    for item in items:
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def unchecked():
    """No such checks, as for a user: for the library's own messages about wrong shapes."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
