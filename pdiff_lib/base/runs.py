"""What has been computed is kept, and never trusted blindly.

A stage (a trained network, a zoo, an autoencoder, ...) is one safetensors file named by the digest of everything it
depends on: its settings, the content of its input tensors, its code, the kind of device. Files appear atomically and
carry a checksum; one process computes a stage while others wait for it. No pickle is ever written or read.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdiff_lib.base import allocator, storage
from pdiff_lib.base.provenance import Run as Run, environment  # what a notebook needs is here
from pdiff_lib.base.records import digest
from pdiff_lib.base.storage import root, waiting, write_text as write_text

allocator.keep_freed()  # for all that is computed with a store, or trained
CHECKPOINT_SECONDS = 30.0  # a kill loses less than a minute of a training loop
QUICK = 1.5  # seconds of a save; one that takes longer, as ViT-B's, comes less often: a twentieth of the time at most


class DamagedFile(ValueError):
    """A file that is not what was written: cut short, altered, or not safetensors at all."""


def tensor_digest(tensors: Mapping[str, Tensor] | Tensor) -> str:
    """Hex digest of names, types, shapes and content of tensors, wherever they live."""
    if isinstance(tensors, Tensor):
        tensors = {"": tensors}
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def code_digest(*objects: Any) -> str:
    """Hex digest of the code of functions, classes or modules; comments, layout, docstrings and where other modules of the
    package lie do not count. Code that was moved or rewritten, and of which it was shown that it gives the same to the bit, has the
    digest that it had: `moved.json`, a row per stage and kind of code."""
    now = digest([_code(o) for o in objects])
    return _moved().get(now, now)


@cache
def _moved() -> dict[str, str]:
    return {row["now"]: row["then"] for row in json.loads(Path(__file__).with_name("moved.json").read_text())}


@cache  # a run asks for the same code at every stage
def _code(obj: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(obj)))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pdiff_lib"))]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def write(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically, with their checksum and a note in the header.

    Raises:
        OSError: nothing could be written (a full disk, say); what stood at `path` before stands there still.
        ValueError: a number in the note that is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A clone per tensor: safetensors refuses tensors that share memory.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(note or {}, sort_keys=True, allow_nan=False)
    meta = {"checksum": _checksum(tensors, text), "note": text}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        try:
            save_file(tensors, temporary, metadata=meta)
        except SafetensorError as e:
            raise OSError(f"could not write {path}: {e}") from e
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(tensors: Mapping[str, Tensor], note: str | None) -> str:
    return digest([tensor_digest(tensors), note])


def _sync(path: str | Path) -> None:
    """Flush a file or folder to the disk itself: a rename that outlives its content would be a damaged file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and note of a file that `write` made.

    Raises:
        DamagedFile: the file is cut short or altered, was never written by `write`, or is not safetensors (a pickle is
            refused, never executed).
    """
    try:
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as e:
        raise DamagedFile(f"{path} is not a complete safetensors file ({e}); other formats, pickle among them, "
                          "are refused") from e
    if "checksum" not in meta:
        raise DamagedFile(f"{path} is no file of this workbook: it carries no checksum of ours; expected what the workbook "
                          "wrote, such as Zoo.save. Checkpoints of your own come in as Zoo(theta, subset.names, subset.shapes, "
                          "losses), a trained network as weights")
    if meta["checksum"] != _checksum(tensors, meta.get("note")):
        raise DamagedFile(f"{path} was altered after it was written: its checksum does not match its content")
    return tensors, json.loads(meta["note"])


class Checkpoint:
    """Where an unfinished stage keeps its state; with `path=None` it keeps nothing."""

    def __init__(self, path: Path | None = None):
        self.path, self.last, self.seconds = path, time.monotonic(), 0.0

    def load(self) -> dict[str, Tensor] | None:
        """The last saved state, or None when there is none that is whole."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            return read(self.path)[0]
        except DamagedFile as e:
            warnings.warn(f"{e}; starting this stage anew", stacklevel=2)
            return None

    def due(self) -> bool:
        """Whether the last save is long enough ago, for a kill and for what a save takes."""
        return self.path is not None and time.monotonic() - self.last > CHECKPOINT_SECONDS * max(1.0, self.seconds / QUICK)

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Keep this state instead of the one before."""
        start = time.monotonic()
        write(self.path, state)
        self.last = time.monotonic()
        self.seconds = self.last - start


class Store:
    """Stages on disk under `folder`; `Store(None)` keeps nothing and computes everything.

    Args:
        folder: by default `stages/` under `root()`.
        device: what its stages are computed on, for their notes; None: what each stage's key says.
    """

    def __init__(self, folder: str | Path | None = "default", device: str | torch.device | None = None):
        self.device = device
        self.folder = root() / "stages" if folder == "default" else Path(folder) if folder is not None else None
        self._seconds: dict[tuple[str, str], float] = {}
        self._uses: list[float] = []

    @property
    def seconds(self) -> dict[str, float]:
        """What the stages of this session cost when they were computed, summed by name."""
        total: dict[str, float] = {}
        for (name, _), seconds in self._seconds.items():
            total[name] = total.get(name, 0.0) + seconds
        return total

    def spent(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What `work` returns, and its seconds: of its stages what they cost when they were computed, else by the clock."""
        before, start = len(self._uses), time.perf_counter()
        result = work()
        return result, sum(self._uses[before:]) or time.perf_counter() - start

    def stage(self, name: str, key: Mapping[str, Any], compute: Callable[[Checkpoint], dict[str, Tensor]],
              code: tuple = ()) -> dict[str, Tensor]:
        """The tensors of a stage: from disk when they are there and whole, else computed (once among all processes).

        Args:
            name: what the stage is, for people ("zoo").
            key: everything it depends on, as JSON (settings, `tensor_digest` of its inputs, kind of device).
            compute: called with a `Checkpoint` that survives a kill; returns the tensors.
            code: functions, classes or modules whose code the stage depends on.

        Returns:
            CPU tensors by name.

        Raises:
            ValueError: a number in the key that is not finite: it would equal nothing, itself included.
        """
        if self.folder is None:
            return {k: v.detach().cpu() for k, v in compute(Checkpoint()).items()}
        identity = digest([name, dict(key), code_digest(*code)])
        path = self.folder / name / f"{identity}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with waiting(FileLock(path.with_suffix(".lock")), f"stage {name!r}"):
            if path.is_file() or storage.fetch(path):
                try:
                    tensors, note = read(path)
                    self._count(name, identity, note["seconds"])
                    return tensors
                except DamagedFile as e:
                    warnings.warn(f"{e}; computing the stage {name!r} again", stacklevel=2)
            for left_by_a_kill in path.parent.glob(f".{identity}*"):
                left_by_a_kill.unlink()
            partial = path.with_suffix(".partial.safetensors")
            start = time.perf_counter()
            tensors = {k: v.detach().cpu() for k, v in compute(Checkpoint(partial)).items()}
            seconds = time.perf_counter() - start
            write(path, tensors, {"name": name, "key": dict(key), "seconds": seconds,
                                  **environment(self.device or key.get("device"))})
            partial.unlink(missing_ok=True)
            storage.push(path)
            self._count(name, identity, seconds)
            return tensors

    def _count(self, name: str, identity: str, seconds: float) -> None:
        self._seconds[name, identity] = seconds
        self._uses.append(seconds)
