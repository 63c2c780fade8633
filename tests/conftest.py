"""Annotated shapes and types of the whole package are checked at run time, in every test."""

from pathlib import Path

import pytest
from jaxtyping import config, install_import_hook

# All but `recipe`, which holds no tensors and checks (and converts) every value by itself.
PACKAGE = Path(__file__).parent.parent / "pdiff_lib"
MODULES = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "recipe"}
install_import_hook([f"pdiff_lib.{name}" for name in MODULES], "beartype.beartype")


@pytest.fixture
def unchecked():
    """No such checks, as for a user: for the library's own messages about wrong shapes."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
