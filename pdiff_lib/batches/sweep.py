"""A grid of runs of one notebook: on this machine or on a Ray cluster, and resumable."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from pdiff_lib.base import parameters, recipe, storage
from pdiff_lib.base.known import root_of
from pdiff_lib.batches import cluster, jobs, warm

KEYS = ("notebook", "base", "parameters", "grid", "seeds")
SEEDS = ("seed", "pdiff_seed")  # what `seeds` sets together: all randomness but the choice of the images
MANY = 4  # runs from which on kernels begin warm: what it costs is spent by then
DEATHS = 3  # attempts when a worker or its kernel is killed; a cell that fails is not tried again


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded.

    Attributes:
        path: the file.
        jobs: its runs, in the order of the grid (the last name varies fastest).
        varied: names of the parameters that differ between runs.
    """

    path: Path
    jobs: list[jobs.Job]
    varied: list[str]

    @property
    def folder(self) -> Path:
        """Where its tables land."""
        return storage.root() / "sweeps"

    def label(self, job: jobs.Job) -> str:
        """A run by what makes it different: "k_checkpoints=10 seed=0"."""
        return " ".join(f"{n}={job.values[n]}" for n in self.varied)


class Outcome(NamedTuple):
    """What became of a run: `error` is empty when it is complete."""

    label: str
    error: str


def load(path: str | Path) -> Sweep:
    """A sweep file, with every run of it checked.

    Its keys: `notebook` (name, number or path), `grid` (lists of values by parameter), and if wanted `base` (a recipe file
    or a list of them, relative to this file, the later over the earlier), `parameters` (values for all runs), `seeds` (a
    list: each run once per seed of network, zoo, p-diff and samples).

    Raises:
        ValueError: an unknown key or parameter, a value of the wrong type or out of range, an empty list, a parameter
            given twice, two runs that are the same.
    """
    path = Path(path)
    content = parameters.load(path)
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path}: {recipe.unknown('key', key, KEYS)}")
    if not isinstance(content.get("notebook"), str):
        raise ValueError(f"{path}: notebook is {content.get('notebook')!r}: expected a notebook's name")
    notebook = jobs.find(content["notebook"])
    bases, fixed, grid = content.get("base", []), content.get("parameters", {}), content.get("grid", {})
    for key, value in (("parameters", fixed), ("grid", grid)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key} is {value!r}: expected 'name: value' lines")
    given: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        given |= parameters.load(path.parent / base)
    given |= fixed
    axes = [[{name: v} for v in _values(path, name, values)] for name, values in grid.items()]
    if "seeds" in content:
        names = [n for n in SEEDS if n in jobs.defaults(notebook)]
        if not names:
            raise ValueError(f"{path}: seeds: {notebook.stem} has no parameter {' or '.join(SEEDS)}")
        grid = {**grid, **dict.fromkeys(names)}
        axes.append([dict.fromkeys(names, v) for v in _values(path, "seeds", content["seeds"])])
    if not axes:
        raise ValueError(f"{path}: expected a grid, or seeds")
    for name in grid:
        if name in fixed:
            raise ValueError(f"{path}: {name} is in the grid and in parameters: expected one of them")
    found: dict[Path, jobs.Job] = {}
    known: dict[Path, str] = {}  # what many runs read is looked at once
    for point in itertools.product(*axes):
        own = {name: value for part in point for name, value in part.items()}
        job = jobs.plan(notebook, given | own, known=known)
        if job.folder in found:
            raise ValueError(f"{path}: {own} is in the grid twice")
        found[job.folder] = job
    return Sweep(path, list(found.values()), list(grid))


def _values(path: Path, name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: {name} is {values!r}: expected a list of values, not empty")
    return values


def command(job: jobs.Job) -> str:
    """A run as one line of shell around plain papermill, for `xargs` or a Slurm array; complete when it has ended well.

    It goes to the folder, and to the data sets, that the sweep was planned for, wherever it is executed.
    """
    base, folder, done, unfinished = (shlex.quote(str(p.absolute())) for p in (job.base, job.folder, job.done, job.unfinished))
    notebook, output = (shlex.quote(jobs.literal(p.absolute())) for p in (job.notebook, job.unfinished))
    values = shlex.quote(parameters.dump(job.values, lines=False).strip())
    places = f"PDIFF_RUN_DIR={folder} PDIFF_DATA={shlex.quote(str(job.base / root_of(None)))}"
    return (f"mkdir -p {folder} && cd {base} && {places} papermill {notebook} {output} -y {values} "
            f"&& mv {unfinished} {done}")


def run(sweep: Sweep, workers: int = 0, gpu_share: int = 1, ray: str = "", cpus: int = 0, gpus: float = 0.0,
        storage_url: str = "", force: bool = False) -> list[Outcome]:
    """Make every run of a sweep that is not complete. A run that fails does not stop the others.

    Args:
        sweep: from `load`.
        workers: runs at a time on this machine; 0: one per GPU and share, without a GPU one per two cores.
        gpu_share: workers per GPU.
        ray: address of a Ray cluster; its nodes then make the runs.
        cpus: cores per run; 0: this machine's, shared among the workers (1 on a cluster).
        gpus: GPUs per run on a cluster.
        storage_url: where results are pushed to and fetched from (see `storage`).
        force: make those again that are complete.

    Returns:
        An outcome per run, in the order of the grid.

    Raises:
        ValueError: numbers out of range, a storage that cannot be written, a cluster that cannot be reached.
    """
    for name, value, least in (("workers", workers, 0), ("gpu_share", gpu_share, 1), ("cpus", cpus, 0), ("gpus", gpus, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}: expected at least {least}")
    if storage_url:
        storage.check(storage_url)
        os.environ["PDIFF_STORAGE"] = storage_url
    outcomes = {job.folder: Outcome(sweep.label(job), "") for job in sweep.jobs if not force and jobs.complete(job)}
    todo = [job for job in sweep.jobs if job.folder not in outcomes]
    print(f"{len(sweep.jobs)} runs, {len(outcomes)} of them complete")
    start = time.perf_counter()
    with tqdm(total=len(sweep.jobs), initial=len(outcomes), desc=sweep.path.stem, unit="run", disable=not todo) as bar:
        made = (cluster.make(todo, ray, cpus or 1, gpus, force) if ray else
                _here(sweep, todo, workers, gpu_share, cpus, force))
        for job, error in made if todo else ():
            outcomes[job.folder] = Outcome(sweep.label(job), error)
            how = f"failed: {error}" if error else f"complete: {job.folder}"
            bar.write(f"{sweep.label(job)}: {how} ({time.perf_counter() - start:.0f} s after the start)")
            bar.update()
    return [outcomes[job.folder] for job in sweep.jobs]


def _here(sweep: Sweep, todo: Sequence[jobs.Job], workers: int, gpu_share: int, cpus: int,
          force: bool) -> Iterator[tuple[jobs.Job, str]]:
    """Runs in processes of their own, so that one that is killed takes no other with it; yields each with its error."""
    cores, devices = len(os.sched_getaffinity(0)), _devices()
    workers = min(workers or (len(devices) * gpu_share if devices else max(1, cores // 2)), len(todo))
    threads = str(cpus or max(1, cores // workers))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with warm.kernels(environment) if len(todo) >= MANY else nullcontext({}) as kernels:
        yield from _at_once(sweep, todo, workers, devices, environment | kernels, force)


def _at_once(sweep: Sweep, todo: Sequence[jobs.Job], workers: int, devices: Sequence[str], environment: dict[str, str],
             force: bool) -> Iterator[tuple[jobs.Job, str]]:
    context = multiprocessing.get_context("forkserver")  # started once, with the imports that every run needs
    context.set_forkserver_preload([__name__, "papermill"])
    lock = context.RLock()
    tqdm.set_lock(lock)
    queue, slots = deque((job, 1) for job in todo), deque(range(workers))
    running: dict[int, tuple] = {}
    try:
        while queue or running:
            while queue and slots:
                (job, attempt), slot = queue.popleft(), slots.popleft()
                device = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                bar = {"position": slot + 1, "desc": sweep.label(job), "leave": False} if sys.stderr.isatty() else False
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, force, environment | device, bar, lock, theirs))
                process.start()
                theirs.close()
                running[process.sentinel] = process, ours, job, attempt, slot
            for sentinel in wait(list(running)):
                process, ours, job, attempt, slot = running.pop(sentinel)
                process.join()
                slots.append(slot)
                error = _said(ours)
                if error is None and attempt < DEATHS:
                    tqdm.write(f"{sweep.label(job)}: killed; it goes on from its last complete stage", file=sys.stderr)
                    queue.appendleft((job, attempt + 1))
                else:
                    yield job, f"killed {DEATHS} times" if error is None else error
    finally:
        for process, *_ in running.values():
            process.terminate()


def _devices() -> list[str]:
    """The GPUs that runs may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch  # seconds that neither a dry run nor the processes of the runs need

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _said(pipe: Connection) -> str | None:
    """A worker's last word: an error, or "" when the run is complete; None when it, or its kernel, was killed."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _work(job: jobs.Job, force: bool, environment: dict[str, str], bar: dict[str, Any] | bool, lock, pipe: Connection) -> None:
    os.environ.update(environment)
    tqdm.set_lock(lock)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        jobs.execute(job, force, progress=bar)
        pipe.send("")
    except jobs.Died:
        pipe.close()
    except Exception as e:  # whatever it is, it is this run's and goes into the summary
        pipe.send(str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}")


def _end_with_the_sweep() -> None:
    # A sweep that is killed leaves no worker behind to go on unseen; kernels end with their workers.
    multiprocessing.parent_process().join()
    os._exit(1)
