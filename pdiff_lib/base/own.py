"""What a user brings, by its name in a recipe: code as `package.module:function`, and files of checkpoints.

Code is looked for in the working folder, beside the project's notebooks, then wherever Python finds modules.
"""

from __future__ import annotations

import glob
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from pdiff_lib.base.storage import PROJECT

NOTEBOOKS = PROJECT / "notebooks"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # endings of what `torch.save` wrote
SUFFIXES = (".safetensors", *PICKLED)
Files = str | Path | Sequence[str | Path]


def is_name(text: str) -> bool:
    """Whether a text names code.

    >>> is_name("my.networks:small"), is_name("resnet18")
    (True, False)
    """
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None


def load(name: str) -> Any:
    """What a module of one's own holds under a name.

    Raises:
        ValueError: no such name, no such module, one that fails when it is imported, or nothing of that name in it.
    """
    if not is_name(name):
        raise ValueError(f"{name!r}: expected package.module:function")
    module, _, attribute = name.partition(":")
    before = list(sys.path)
    sys.path[:0] = [str(Path.cwd()), str(NOTEBOOKS)]
    try:
        importlib.invalidate_caches()
        found = importlib.import_module(module)
    except Exception as error:  # its code is not ours: anything may go wrong
        raise ValueError(f"{name!r}: module {module} cannot be imported ({type(error).__name__}: {error}): expected one in "
                         f"{Path.cwd()}, beside the notebooks, or installed") from error
    finally:
        sys.path[:] = before
    if not hasattr(found, attribute):
        raise ValueError(f"{name!r}: {found.__file__} has no {attribute!r}")
    return getattr(found, attribute)


def build(name: str, **sizes: int) -> Any:
    """The network that a function of one's own makes for these sizes.

    Raises:
        ValueError: what `load` refuses, or the function failed.
    """
    try:
        function = load(name)
    except ValueError as error:
        raise ValueError(f"network {error}") from error
    try:
        return function(**sizes)
    except Exception as error:  # its code is not ours: anything may go wrong
        wanted = ", ".join(f"{size} = {n}" for size, n in sizes.items())
        raise ValueError(f"network {name!r} cannot be built with {wanted} ({type(error).__name__}: {error})") from error


def modules(name: str) -> list[ModuleType]:
    """The module of a name, and those beside it that it takes things from: its code, for the keys of stages."""
    load(name)
    seen: dict[str, ModuleType] = {}
    _follow(sys.modules[name.partition(":")[0]], seen)
    return [seen[n] for n in sorted(seen)]


def _follow(module: ModuleType, seen: dict[str, ModuleType]) -> None:
    top = sys.modules[module.__name__.partition(".")[0]]
    # A package is its folder; a module's neighbours are its own too, unless it is installed among others.
    folder = None if not hasattr(top, "__path__") and "site-packages" in str(top.__file__) else Path(str(top.__file__)).parent
    if Path(str(module.__file__)).stat().st_size:
        seen[module.__name__] = module
    for value in list(vars(module).values()):
        owner = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
        file = getattr(owner, "__file__", None)
        if folder and file and file.endswith(".py") and owner.__name__ not in seen and folder in Path(file).parents:
            _follow(owner, seen)


def places(name: str, base: Path) -> list[Path]:
    """The files and folders of packages that a name's code lies in, with what these import from the same folder."""
    top = name.partition(":")[0].partition(".")[0]
    for folder in (base, NOTEBOOKS):
        if found := list(_imported(top, folder, set())):
            return found
    spec = find_spec(top)
    return [Path(spec.origin)] if spec and spec.origin and Path(spec.origin).is_file() else []


def imports(source: str) -> set[str]:
    """The top-level names that a source imports.

    >>> sorted(imports("import os.path\\nfrom my.nets import small"))
    ['my', 'os']
    """
    return set(re.findall(r"^\s*(?:from|import)\s+(\w+)", source, re.M))


def _imported(name: str, folder: Path, seen: set[str]) -> Iterator[Path]:
    """A module or package of a folder, then those of the folder that it imports."""
    if name in seen:
        return
    seen.add(name)
    file, package = folder / f"{name}.py", folder / name
    if (package / "__init__.py").is_file():
        yield package
        sources = list(package.rglob("*.py"))
    elif file.is_file():
        yield file
        sources = [file]
    else:
        return
    for source in sources:
        for other in sorted(imports(source.read_text("utf-8", "replace"))):
            yield from _imported(other, folder, seen)


def find(files: Files, base: Path = Path()) -> list[Path]:
    """The files that are meant, in natural order of their paths (`step-2` before `step-10`).

    Args:
        files: a folder (those in it that end as weights do, `SUFFIXES`; neither hidden ones nor folders below), a
            pattern with *, ? and ** ("runs/*/last.ckpt"), or a list of files.
        base: the folder that relative paths are meant from.

    Raises:
        ValueError: fewer than two files, one that is not there, given twice, or does not end as weights do.
    """
    text = str(files)
    if not isinstance(files, (str, Path)):
        found = [base / f for f in files]
    elif (base / text).is_dir():
        found = [p for p in (base / text).iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()]
    else:
        found = [base / f for f in glob.glob(text, root_dir=base, recursive=True)]
    for path in found:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise ValueError(f"checkpoint {str(path)!r}: expected a file that ends in {', '.join(SUFFIXES)}")
    if len({p.resolve() for p in found}) < max(2, len(found)):
        raise ValueError(f"checkpoints {text!r}: {len(found)} files, expected at "
                         "least two, each once (a folder, a pattern such as 'runs/*.pt', or a list)")
    return sorted(found, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(p))])
