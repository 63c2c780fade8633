"""Neural Network Diffusion (p-diff, arXiv 2402.13144): generate neural-network parameters, and check what they are.

The line that the data takes (README.md beside this file is the map):

    recipe -> task -> network -> subset -> zoo -> generator.fit / .sample -> task's judgement -> measures -> results -> drawing

`experiment.Experiment` walks that line once and keeps every stage (`base.runs`); the notebooks are its face.
Each module has a short name as well, whatever wing it is in: `from pdiff_lib import zoo, pdiff`, `from pdiff_lib.recipe import Recipe`.
Importing the package alone imports nothing of it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

# Short names of the modules in the wings, and of two wings whose packages hand on what their modules hold (so does `networks`).
FACE = {file.stem: f"{__name__}.{file.parent.name}.{file.stem}" for file in Path(__file__).parent.glob("[a-z]*/[a-z]*.py")}
FACE |= {"zoo": f"{__name__}.zoos", "explore": f"{__name__}.explorers"}


def __getattr__(name: str) -> ModuleType:
    if name in FACE:
        return importlib.import_module(FACE[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Face(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`import pdiff_lib.zoo` is `import pdiff_lib.zoos`: the same module, not a second one."""

    def find_spec(self, name, path=None, target=None):
        package, _, short = name.rpartition(".")
        if package == __name__ and short in FACE:
            return importlib.util.spec_from_loader(name, self, origin=importlib.util.find_spec(FACE[short]).origin)
        return None

    def create_module(self, spec):
        module = importlib.import_module(FACE[spec.name.rpartition(".")[2]])
        spec.loader_state = module.__spec__
        return module

    def get_code(self, name):  # for `python -m pdiff_lib.cli`
        full = FACE[name.rpartition(".")[2]]
        return importlib.util.find_spec(full).loader.get_code(full)

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # it stays what it was


sys.meta_path.insert(0, _Face())
