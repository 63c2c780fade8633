"""nbformat, imported without what takes seconds and serves nothing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

GRAMMAR = "rfc3987_syntax"  # of IRIs, which jsonschema builds when it is imported where it is installed: 2 s, and notebooks hold none


def nbformat() -> ModuleType:
    """The module, imported as papermill and plotly do, but without that grammar: jsonschema does without where it is missing, and then lets pass any
    text as an IRI. Whoever imports the grammar itself gets it."""
    hidden = GRAMMAR not in sys.modules
    if hidden:
        sys.modules[GRAMMAR] = None
    try:
        return importlib.import_module("nbformat")
    finally:
        if hidden:
            del sys.modules[GRAMMAR]
