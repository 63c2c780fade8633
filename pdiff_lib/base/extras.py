"""Packages that only some of the work needs: extras of this one."""

from __future__ import annotations

import importlib
from types import ModuleType


def extra(module: str, package: str, what: str, name: str) -> ModuleType:
    """A module of a package that may not be installed, imported when it is needed.

    Args:
        module: to be imported.
        package: that holds it, as pip knows it.
        what: needs it.
        name: of the extra of this package that installs it.

    Raises:
        ValueError: it is not installed.

    >>> extra("colorsys", "colors", "colours need", "shapes").__name__
    'colorsys'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} {package}, which is not installed: expected the extra, pip install 'pdiff-lib[{name}]'") from error
