"""One run of a notebook with checked parameters, in a folder named by everything it depends on."""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml
from filelock import FileLock

from pdiff_lib import recipe, runs, storage

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


class Died(RuntimeError):
    """The kernel ended without a word (killed, out of memory): the notebook itself may be fine."""


class Job(NamedTuple):
    """A run that can be made, or has been.

    Attributes:
        notebook: its path.
        values: all of its parameters.
        folder: where its outputs land.
    """

    notebook: Path
    values: dict[str, Any]
    folder: Path

    @property
    def done(self) -> Path:
        """The executed notebook: exists when the run is complete, and only then."""
        return self.folder / self.notebook.name

    @property
    def unfinished(self) -> Path:
        """The notebook while it runs; stays, with the traceback, when a cell fails."""
        return self.folder / f"unfinished-{self.notebook.name}"


def find(notebook: str) -> Path:
    """The notebook of this name ("00_quickstart"), number ("00") or path.

    Raises:
        ValueError: none, or more than one, is meant.
    """
    if Path(notebook).is_file() and notebook.endswith(".ipynb"):
        return Path(notebook)
    there = sorted(NOTEBOOKS.glob("*.ipynb"))
    hits = [p for p in there if p.stem == notebook] or [p for p in there if p.stem.startswith(notebook)]
    if len(hits) != 1:
        raise ValueError(f"notebook {notebook!r}: expected one of {', '.join(p.stem for p in there)}")
    return hits[0]


def defaults(notebook: Path) -> dict[str, Any]:
    """Names and values in the cell tagged `parameters`.

    Raises:
        ValueError: no such cell, or something in it that is not `name = literal`.
    """
    for cell in _read(notebook).cells:
        if "parameters" in cell.metadata.get("tags", []):
            values = {}
            for node in ast.parse(cell.source).body:
                try:
                    values[node.targets[0].id] = ast.literal_eval(node.value)
                except (AttributeError, ValueError) as e:
                    raise ValueError(f"{notebook.name}, parameters cell, line {node.lineno}: expected 'name = literal'") from e
            return values
    raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")


def check(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run: the notebook's own, with the given ones in their place.

    Raises:
        ValueError: a name that the parameters cell does not have, a value of another type or out of range.
    """
    values = defaults(notebook)
    for name in given:
        if name not in values:
            raise ValueError(recipe.unknown(f"parameter of {notebook.stem}", name, values))
    settings = recipe.names()
    for name, value in given.items():
        if name not in settings:  # the notebook's own, such as a list to loop over: its default shows the type
            own = values[name]
            kind = tuple[type(own[0]), ...] if isinstance(own, list) else type(own)
            value = recipe.convert(name, value, kind)
        values[name] = list(value) if isinstance(value, tuple) else value
    checked = recipe.Recipe.of(**{n: v for n, v in values.items() if n in settings}).flat()
    return {n: checked.get(n, v) for n, v in values.items()}


def plan(notebook: Path, given: Mapping[str, Any]) -> Job:
    """The run of a notebook with these parameters; raises what `check` raises, and starts nothing."""
    values = check(notebook, given)
    sources = [c.source for c in _read(notebook).cells if c.cell_type == "code"]
    return Job(notebook, values, runs.root() / notebook.stem / runs.digest([values, sources, _library()]))


def _read(notebook: Path) -> nbformat.NotebookNode:
    return _parse(notebook.resolve(), notebook.stat().st_mtime_ns)


@lru_cache(4)  # a grid of hundreds of runs plans one notebook hundreds of times
def _parse(notebook: Path, _version: int) -> nbformat.NotebookNode:
    return nbformat.read(notebook, as_version=4)


@cache
def _library() -> str:
    return runs.digest([p.read_text() for p in sorted(Path(__file__).parent.glob("*.py"))])


def execute(job: Job, force: bool = False, progress: bool | dict[str, Any] = True) -> Path:
    """Run a notebook with papermill, unless it is complete; two processes that want the same run make it once.

    Args:
        job: what to run.
        force: run although it is complete.
        progress: show a bar over the cells; a dict holds tqdm's arguments.

    Returns:
        The executed notebook, `job.done`; figures, record and `parameters.yaml` lie beside it.

    Raises:
        ValueError: a cell failed; names the notebook that holds the traceback.
        Died: the kernel was killed.
        OSError: the disk is full, say.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with runs.waiting(FileLock(job.folder.with_suffix(".lock")), f"run {job.folder.name}"):
        if not force and complete(job):
            return job.done
        for left_by_a_kill in job.folder.glob(".*"):
            left_by_a_kill.unlink()
        runs.write_text(job.folder / "parameters.yaml", yaml.safe_dump(job.values, sort_keys=False))
        _papermill(job, progress)
        executed = nbformat.read(job.unfinished, as_version=4)
        executed.metadata.pop("widgets", None)  # megabytes of state of progress bars that are over
        runs.write_text(job.done, nbformat.writes(executed))
        job.unfinished.unlink()
        storage.push(*(p for p in sorted(job.folder.iterdir()) if p != job.done), job.done)  # what says "complete" last
    return job.done


def _papermill(job: Job, progress: bool | dict[str, Any]) -> None:
    import papermill  # a second that no other command needs
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # its parser takes a "=" in a comment for an unknown parameter
    kept = "stages that were complete are kept, and the next run goes on from there"
    before = os.environ.get("PDIFF_RUN_DIR")
    os.environ["PDIFF_RUN_DIR"] = str(job.folder.resolve())
    try:
        papermill.execute_notebook(job.notebook, job.unfinished, parameters=job.values, progress_bar=progress, log_output=False,
                                   extra_arguments=["--log-level=ERROR"])  # of the kernel: a sweep shows one line per run
    except papermill.PapermillExecutionError as e:
        raise ValueError(f"{e.ename} in cell {e.exec_count} of {job.notebook.name}: {e.evalue}\nthe traceback is in "
                         f"{job.unfinished}; {kept}") from None
    except DeadKernelError:
        raise Died(f"the kernel of {job.notebook.name} died (killed, or out of memory); {kept}") from None
    finally:
        del os.environ["PDIFF_RUN_DIR"]
        if before is not None:
            os.environ["PDIFF_RUN_DIR"] = before


def complete(job: Job) -> bool:
    """Whether the run has been made: here, or on the shared storage, from which it is then fetched."""
    return job.done.is_file() or storage.fetch_folder(job.folder, job.done)


def record(job: Job) -> None:
    """Put the outputs of a run at the notebook's own parameters into the notebook, without papermill's traces."""
    executed, original = nbformat.read(job.done, as_version=4), nbformat.read(job.notebook, as_version=4)
    outputs = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    count = 0
    for cell, ran in zip(original.cells, outputs, strict=True):
        if cell.cell_type == "code":
            count += 1
            shown = [o for o in ran.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
                     and o.get("name") != "stderr"]
            for o in shown:
                if o.output_type == "execute_result":
                    o.execution_count = count
            cell.outputs, cell.execution_count = shown, count
    nbformat.write(original, job.notebook)
