"""The stages of the notebook that is killed: real files of the store, computed in steps that take time and are counted."""

import os
import time

import torch

from pdiff_lib.base import runs


def note(log: str, *words: object) -> None:
    """A line in the log that all processes share; lines of this length are appended whole."""
    with open(log.removeprefix("file:"), "a") as f:
        f.write(" ".join(map(str, words)) + "\n")


def stage(log: str, name: str, key: dict, seconds: float) -> torch.Tensor:
    """A stage of ten steps with a checkpoint after each; says in the log when it starts, where from, and when it ends."""

    def compute(checkpoint: runs.Checkpoint) -> dict[str, torch.Tensor]:
        state = checkpoint.load() or {"i": torch.tensor(0), "sum": torch.zeros(1000)}
        note(log, "start", name, runs.digest(key), int(state["i"]), os.getpid())
        for i in range(int(state["i"]), 10):
            time.sleep(seconds / 10)
            state = {"i": torch.tensor(i + 1), "sum": state["sum"] + torch.arange(1000.0) * i}
            checkpoint.save(state)
        note(log, "end", name, runs.digest(key))
        return {"sum": state["sum"]}

    return runs.Store().stage(name, key, compute)["sum"]
