"""What a run says of itself: its record, as JSON that any reader takes, with where and with what it was made."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pdiff_lib.base import inputs
from pdiff_lib.base.storage import PROJECT, root, write_text


def digest(value: Any) -> str:
    """Hex digest of anything that JSON can hold (floats exactly, keys sorted).

    Raises:
        ValueError: a number in it that is not finite.
    """
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError as e:
        places = ", ".join(place for place, _ in _infinite("", value)) or repr(value)
        raise ValueError(f"{places}: expected finite numbers ({e})") from e
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def dumps(content: Mapping[str, Any]) -> str:
    """A record as JSON. The standard has no NaN: numbers that are not finite are null, and `not_finite` says which they are.

    >>> print(dumps({"a/b": [1.0, float("inf")]}).replace("\\n", ""))
    { "a/b": [  1.0,  null ], "not_finite": {  "/a~1b/1": "inf" }}
    """
    plain = json.loads(json.dumps(content, default=float))  # tensors and NumPy's numbers as floats, keys as text
    odd = dict(_infinite("", plain))
    for place in odd:
        _put(plain, place, None)
    return json.dumps({**plain, "not_finite": odd} if odd else plain, indent=1, allow_nan=False)


def loads(text: str) -> dict[str, Any]:
    """A record from what `dumps` wrote (or from the time before it, with bare NaN), its numbers in their places.

    >>> loads(dumps({"a/b": [1.0, float("inf")]}))
    {'a/b': [1.0, inf]}
    """
    content = json.loads(text)
    for place, number in content.pop("not_finite", {}).items():
        _put(content, place, float(number))
    return content


def _infinite(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """Places (as JSON pointers) of the numbers that are not finite, and these as text."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, str(value)
    elif isinstance(value, (Mapping, list, tuple)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _infinite(f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}", part)


def _put(content: Any, place: str, value: float | None) -> None:
    *above, last = (part.replace("~1", "/").replace("~0", "~") for part in place.split("/")[1:])
    for key in above:
        content = content[int(key) if isinstance(content, list) else key]
    content[int(last) if isinstance(content, list) else last] = value


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """Where and with what something was computed: versions, device, commit, time.

    Args:
        device: what was computed on; None: the GPU, if this process has used one, else the CPU.
    """
    used = torch.device(device or ("cuda" if torch.cuda.is_initialized() else "cpu"))
    name = f"CPU, {torch.get_num_threads()} threads" if used.type == "cpu" else str(used)
    if used.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(used)
    return {
        "torch": torch.__version__, "python": platform.python_version(),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=10") or "unknown", "device": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def check_commit(commit: str) -> None:
    """Refuse a commit that nobody could go back to.

    Raises:
        ValueError: it has changes on top, is unknown, or is not in the history of this checkout.
    """
    if commit.endswith("-dirty"):
        raise ValueError(f"commit {commit!r}: the run was made with changes that no commit holds; expected a clean working "
                         "tree: commit, then run again")
    found = re.fullmatch(r"\w[\w./-]*", commit) and _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if not found or _git("merge-base", found, "HEAD") != found:
        shallow = " (this clone is shallow: git fetch --unshallow)" * (_git("rev-parse", "--is-shallow-repository") == "true")
        raise ValueError(f"commit {commit!r} is not in the history of {PROJECT}{shallow}: expected one that others can have")


def _git(*arguments: str) -> str:
    """What git says of the project, "" where it cannot say."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=PROJECT, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Run:
    """The folder of one run of a notebook: its figures and its record.

    Args:
        notebook: its name without ending ("00_quickstart").
        settings: everything that it was run with.
        device: what it computes on, for the record; None: see `environment`.

    Attributes:
        folder: the one that `pdiff run` prepared (`$PDIFF_RUN_DIR`), else `runs/NOTEBOOK/<digest of the settings and of the
            content of the files that they name>`.

    Raises:
        ValueError: a notebook's name that is a path.
    """

    def __init__(self, notebook: str, settings: Mapping[str, Any], device: str | torch.device | None = None):
        if not re.fullmatch(r"\w[\w. -]*", notebook):
            raise ValueError(f"notebook {notebook!r}: expected a notebook's name, which its folder under runs/ will have")
        self.notebook, self.settings, self.device, self.start = notebook, dict(settings), device, time.perf_counter()
        self.inputs = inputs.digests(inputs.of(self.settings, Path.cwd()))
        name = digest([self.settings, self.inputs] if self.inputs else self.settings)
        self.folder = Path(os.environ.get("PDIFF_RUN_DIR") or root() / notebook / name)
        self.folder.mkdir(parents=True, exist_ok=True)

    def record(self, numbers: Mapping[str, Any], seconds: Mapping[str, float] | None = None,
               networks: pd.DataFrame | None = None, device: str | torch.device | None = None) -> Path:
        """Write `record.json`, and with `networks` (rows of `Experiment.frame`) `networks.parquet`, for tables over many runs.

        Args:
            numbers: what the notebook found, as JSON.
            seconds: per stage, as computed, also when it was read back.
            networks: a row per network.
            device: what was computed on; None: what the run was made with.
        """
        if networks is not None:
            temporary = self.folder / f".networks.{os.getpid()}"
            networks.to_parquet(temporary, index=False)
            os.replace(temporary, self.folder / "networks.parquet")
        content = {"notebook": self.notebook, "settings": self.settings, "inputs": self.inputs, "numbers": dict(numbers),
                   "seconds_per_stage": {k: round(v, 2) for k, v in (seconds or {}).items()},
                   "seconds": round(time.perf_counter() - self.start, 1), **environment(device or self.device)}
        return write_text(self.folder / "record.json", dumps(content))
