"""Where runs lie: a folder on this machine, and storage that many machines share.

The storage is any fsspec URL in `$PDIFF_STORAGE` (`s3://bucket/runs`, `gs://...`, a path). What is complete is pushed there,
and fetched from there before it is computed again; without the variable nothing happens. Machines that mount one file
system need none of this: `$PDIFF_RUNS` on all of them names a folder on it.
"""

from __future__ import annotations

import os
import posixpath
import uuid
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

PROJECT = Path(__file__).resolve().parents[2]  # the checkout, where the package is not installed alone


def root() -> Path:
    """The folder of all runs: `$PDIFF_RUNS`, or `runs/` beside the package's checkout."""
    default = (PROJECT if (PROJECT / "pyproject.toml").is_file() else Path.cwd()) / "runs"
    return Path(os.environ.get("PDIFF_RUNS") or default)


def write_text(path: Path, text: str) -> Path:
    """Write a small text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def waiting(lock: FileLock, what: str) -> AbstractContextManager:
    """The acquired lock; says so when another process holds it. A lock ends with its process, also when that is killed."""
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        print(f"another process is at work on the {what}: waiting for it")
        return lock.acquire()


def check(url: str) -> None:
    """Refuse a storage that cannot be written, before any work.

    Raises:
        ValueError: an unknown protocol, a package that it needs and is not installed, no permission, ...
    """
    try:
        system, base = _file_system(url)
        system.makedirs(base, exist_ok=True)
        probe = posixpath.join(base, f".{uuid.uuid4().hex}")
        system.pipe_file(probe, b"")
        system.rm_file(probe)
    except Exception as e:  # each protocol has errors of its own
        raise ValueError(f"storage {url!r} cannot be written ({type(e).__name__}: {e}): expected a folder or an fsspec URL") from e


def _file_system(url: str):
    import fsspec  # a quarter of a second that is nothing without a storage

    return fsspec.core.url_to_fs(url)


def fetch(path: Path) -> bool:
    """Copy a file from the storage to its place under `root()`; False where there is none, or no storage."""
    return bool(_quietly(_fetch, path))


def push(*paths: Path) -> bool:
    """Copy files from under `root()` to the storage, in this order, each appearing whole or not at all.

    Returns:
        Whether all are there; a storage that fails is a warning, for the files are safe here.
    """
    return bool(_quietly(_push, *paths))


def fetch_folder(folder: Path, marker: Path) -> bool:
    """Copy a folder's files from the storage, when `marker` is among them, which comes last; whether it was."""
    return bool(_quietly(_fetch_folder, folder, marker))


def fetch_each(folder: Path, names: tuple[str, ...]) -> None:
    """Copy files of these names from every subfolder of `folder` on the storage, where they are not here already."""
    _quietly(_fetch_each, folder, names)


def _quietly(work, *paths) -> object:
    url = os.environ.get("PDIFF_STORAGE")
    if not url:
        return None
    try:
        system, base = _file_system(url)
        return work(system, base, *paths)
    except Exception as e:  # each protocol has errors of its own
        warnings.warn(f"storage {url}: {type(e).__name__}: {e}; going on with what is on this machine", stacklevel=3)
        return None


def _name(base: str, path: Path) -> str:
    return posixpath.join(base, path.resolve().relative_to(root().resolve()).as_posix())


def _fetch(system, base: str, path: Path) -> bool:
    name = _name(base, path)
    if not system.exists(name):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        system.get_file(name, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _push(system, base: str, *paths: Path) -> bool:
    for path in paths:
        name = _name(base, path)
        parent, file = posixpath.split(name)
        temporary = posixpath.join(parent, f".{file}.{uuid.uuid4().hex}")
        system.makedirs(parent, exist_ok=True)
        system.put_file(str(path), temporary)
        system.mv(temporary, name)
    return True


def _fetch_folder(system, base: str, folder: Path, marker: Path) -> bool:
    if not system.exists(_name(base, marker)):
        return False
    names = [posixpath.basename(n) for n in system.ls(_name(base, folder), detail=False)]
    files = [folder / n for n in names if not n.startswith(".") and n != marker.name]
    return all([_fetch(system, base, p) for p in (*files, marker)])


def _fetch_each(system, base: str, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for found in system.glob(posixpath.join(_name(base, folder), "*", name)):
            path = folder / posixpath.basename(posixpath.dirname(found)) / name
            if not path.is_file():
                _fetch(system, base, path)
