"""Where and with what something was made, and the folder in which a run of a notebook says so."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pdiff_lib.base import inputs
from pdiff_lib.base.records import digest, dumps, present_commit
from pdiff_lib.base.storage import root, write_text


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
        "torch": torch.__version__, "python": platform.python_version(), "commit": present_commit(), "device": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


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
