"""Runs as tasks of a Ray cluster (`pip install 'pdiff-lib[cluster]'`)."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pdiff_lib.base import inputs, storage
from pdiff_lib.base.extras import extra
from pdiff_lib.batches import jobs

RETRIES = 3  # when a worker or a node dies


def make(todo: Sequence[jobs.Job], address: str, cpus: int, gpus: float, force: bool) -> Iterator[tuple[jobs.Job, str]]:
    """Make runs on a cluster whose nodes have this version of the library; yields each with its error ("": complete).

    A task whose worker, kernel or node dies is tried again, on another node if need be; one whose cell fails is not.

    Args:
        todo: the runs.
        address: of the cluster ("HOST:6379", or "auto" on one of its machines).
        cpus, gpus: what a run occupies.
        force: make them although they are complete.

    Raises:
        ValueError: Ray is not installed, or the cluster cannot be reached.
    """
    ray = extra("ray", "Ray", "--ray needs", "cluster")
    own = {k: os.environ[k] for k in ("PDIFF_STORAGE", "PDIFF_DATA", "PDIFF_RUNS") if k in os.environ}
    if "PDIFF_STORAGE" not in own:
        own["PDIFF_RUNS"] = str(storage.root().resolve())  # without a storage, a folder that all nodes see
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        ray.init(address=address, runtime_env={"env_vars": own}, log_to_driver=False, logging_level="warning")
    except Exception as e:  # ConnectionError, ValueError, RuntimeError, ...
        raise ValueError(f"no Ray cluster at {address!r} ({e}): start one with 'ray start --head'") from e
    there = ray.cluster_resources().get("GPU", 0)
    if there and not gpus:
        # It no longer empties CUDA_VISIBLE_DEVICES for them (ray 54868), as it did before.
        warnings.warn(f"Ray gives none of the cluster's {there:g} GPUs to runs that ask for none: those of a node share its "
                      "first one, or see none (older versions of Ray); expected --gpus 1 (or a share, such as --gpus 0.5, for "
                      "two runs per GPU)", stacklevel=2)
    try:
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=[jobs.Died])(_task)
        at_work = {task.remote(_portable(job), job.values, str(job.base), inputs.digests(job.inputs), job.folder.name, cpus,
                               force): job for job in todo}
        while at_work:
            (ready,), _ = ray.wait(list(at_work))
            job = at_work.pop(ready)
            try:
                node, error = ray.get(ready)
            except (ray.exceptions.RayError, jobs.Died) as e:
                node, error = "", f"killed {RETRIES + 1} times ({str(e).strip().splitlines()[-1]})"
            if not error and not jobs.complete(job):
                error = f"made on {node}, but {job.done} is not to be seen here: expected --storage, or PDIFF_RUNS on a shared disk"
            yield job, error
    finally:
        ray.shutdown()


def _portable(job: jobs.Job) -> str:
    """A notebook of the package by its name, which is the same on every node; any other by its path."""
    return job.notebook.stem if job.notebook.parent == jobs.NOTEBOOKS else str(job.notebook.resolve())


def _task(notebook: str, values: dict[str, Any], base: str, made_of: dict[str, list[str]], folder: str, threads: int,
          force: bool) -> tuple[str, str]:
    node = socket.gethostname()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    try:
        job = jobs.plan(jobs.find(notebook), values, Path(base))
        here = inputs.digests(job.inputs)
        if odd := sorted(name for name in made_of.keys() | here.keys() if made_of.get(name) != here.get(name)):
            return node, (f"{node} has other files than the machine of the sweep for {', '.join(odd)}: expected the same "
                          f"content at the same paths (relative ones from {base}, data sets by name in $PDIFF_DATA)")
        if job.folder.name != folder:
            return node, f"{node} has another version of pdiff_lib or of {notebook}: expected the same on all nodes"
        jobs.execute(job, force, progress=False)
        return node, ""
    except jobs.Died:
        raise
    except Exception as e:  # whatever it is, it is this run's and goes into the summary
        return node, str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
