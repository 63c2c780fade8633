"""What a run reads from disk, by content: data sets, weights, tables, modules of the user's own.

A name or a path says where something is, not what it is. So a run is identified by the digests of its inputs, beside its
parameters: another content is another run, the same content elsewhere is the same. What torchvision downloads (and checks)
counts by its name, except ImageNet, which is put there by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdiff_lib.base import own, recipe
from pdiff_lib.base.known import KNOWN, root_of
from pdiff_lib.base.storage import PROJECT, root, write_text

JUST_NOW = 2.0  # seconds: a file changed so lately may change again without a new time
Inputs = dict[str, dict[str, str]]  # parameter -> resolved path -> digest of the content


def of(values: Mapping[str, Any], base: Path, known: dict[Path, str] | None = None) -> Inputs:
    """What parameters name: data sets, `weights`, and in parameters of a notebook's own any path that exists.

    Args:
        values: parameters, those inside lists and mappings included.
        base: the folder that relative paths are meant from.
        known: digests by path, for one planning of many runs; filled.

    Raises:
        OSError: something there that cannot be read.
    """
    found = {name: _existing(_places(setting, text, base)) for name, setting, text in _texts("", "", values)}
    return _identified(found, {} if known is None else known)


def modules(sources: Sequence[str], base: Path, known: dict[Path, str] | None = None) -> Inputs:
    """Modules in the working folder that the code of a notebook imports; Python would take them before any other."""
    names = {name for text in sources for name in own.imports(text)} - {"pdiff_lib"}
    found = {f"import {n}": _existing([base / f"{n}.py", *(p.parent for p in _existing([base / n / "__init__.py"]))])
             for n in sorted(names)}
    return _identified(found, {} if known is None else known)


def digests(made_of: Inputs) -> dict[str, list[str]]:
    """The digests alone: what counts for identity."""
    return {name: list(paths.values()) for name, paths in made_of.items()}


def _identified(found: Mapping[str, list[Path]], known: dict[Path, str]) -> Inputs:
    for path in {p for paths in found.values() for p in paths} - known.keys():
        known[path] = digest(path)
    return {name: {str(p): known[p] for p in paths} for name, paths in found.items() if paths}


def _texts(name: str, setting: str, value: Any) -> Iterator[tuple[str, str, str]]:
    """Every text in parameters: its full name, the name that the innermost mapping gives it, and the text."""
    if isinstance(value, str):
        yield name, setting, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(f"{name}.{key}" if name else str(key), str(key), part)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _texts(f"{name}.{i}", setting, part)


def _places(setting: str, text: str, base: Path) -> list[Path]:
    """Where what is meant would be."""
    if setting == "dataset" and text not in ("", "digits"):
        if text in KNOWN:
            folder = base / root_of(None)
            stored = _existing([folder / f"{text}-{part}.parquet" for part in ("train", "test")])
            return stored or [folder / text] * (text == "imagenet")
        # As `sources.find` takes a pair of Parquet files apart: names of folders may hold commas.
        parts = re.split(r"(?<=\.parquet)\s*,\s*", text.strip()) if text.endswith(".parquet") else [text]
        return [base / part for part in parts]
    if setting == "checkpoints" and text:
        return own.find(text, base)
    if setting in ("network", "task") and own.is_name(text):
        return own.places(text, base)
    if setting in recipe.names():
        return [base / text] * (setting == "weights" and text != "")
    if own.is_name(text):
        return own.places(text, base)
    # The tables that notebooks show are meant from the project. A "." or "/" is no path, and what lies around the working
    # folder is no input.
    places = [base / text, *([PROJECT / text] if (PROJECT / "pyproject.toml").is_file() else [])]
    return [p for p in _existing(places) if re.search(r"\w", text) and p not in base.resolve().parents]


def _existing(places: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(p.resolve() for p in places if os.path.exists(p)))


def digest(path: Path) -> str:
    """Hex digest of a file's content, or of the names and contents of all files in a folder, without hidden ones and the runs.

    The digest is kept under `runs/inputs`, and computed again when inode, size or a time (of content or inode) differs.
    """
    files = {name: (p, p.stat()) for name, p in _files(path)}
    files = {name: (p, s) for name, (p, s) in files.items() if stat.S_ISREG(s.st_mode) or stat.S_ISDIR(s.st_mode)}
    signature = [[name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, (_, s) in files.items()]
    signature = hashlib.blake2b(json.dumps(signature).encode(), digest_size=16).hexdigest()
    kept = root() / "inputs" / f"{hashlib.blake2b(os.fsencode(path), digest_size=10).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not what was written: it is computed again
        content = json.loads(kept.read_text())
        if content["signature"] == signature:
            return content["digest"]
    total = sum(s.st_size for _, s in files.values())
    if total > 2e9:
        print(f"reading {path} ({total / 1e9:.0f} GB) once, to know it again", file=sys.stderr)
    whole = hashlib.blake2b(digest_size=16)
    for name, (p, s) in files.items():
        whole.update(json.dumps([name, "" if stat.S_ISDIR(s.st_mode) else _content(p)]).encode())
    newest = max((max(s.st_mtime, s.st_ctime) for _, s in files.values()), default=0.0)
    if newest < time.time() - JUST_NOW:
        with suppress(OSError):  # where nothing can be kept it is read each time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps({"path": str(path), "signature": signature, "digest": whole.hexdigest()}))
    return whole.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """A file, or the folders and files under a folder, by their names in it."""
    if not path.is_dir():
        yield "", path
        return
    seen, found, own = set(), {}, root().resolve()
    for folder, below, names in os.walk(path, followlinks=True, onerror=_raise):
        inode = os.stat(folder).st_ino, os.stat(folder).st_dev
        below[:] = [] if inode in seen else sorted(n for n in below if not n.startswith(".") and n != "__pycache__"
                                                     and Path(folder, n) != own)
        seen.add(inode)  # a link to a folder above has no end
        for name in (*below, *names):
            if not name.startswith(".") and os.path.exists(p := os.path.join(folder, name)):
                found[os.path.relpath(p, path)] = Path(p)
    yield from sorted(found.items())


def _raise(error: OSError) -> None:
    raise error


def _content(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
