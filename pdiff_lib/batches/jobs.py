"""One run of a notebook with checked parameters, in a folder named by everything it depends on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from pdiff_lib.base import inputs, parameters, quick, recipe, storage
from pdiff_lib.base.records import digest
from pdiff_lib.base.storage import root, waiting, write_text
from pdiff_lib.batches import cells
from pdiff_lib.batches.cells import code as code, defaults as defaults

NOTEBOOKS = storage.PROJECT / "notebooks"
PICKED = "Recipe.pick(globals())"  # how a notebook makes a recipe of its variables


class Died(RuntimeError):
    """The kernel ended without a word (killed, out of memory): the notebook itself may be fine."""


class Job(NamedTuple):
    """A run that can be made, or has been.

    Attributes:
        notebook: its path.
        values: all of its parameters.
        folder: where its outputs land.
        base: the folder that relative paths in it are meant from; its kernel works there.
        inputs: what it reads, by content.
    """

    notebook: Path
    values: dict[str, Any]
    folder: Path
    base: Path
    inputs: inputs.Inputs

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


def check(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run: the notebook's own, with the given ones in their place. Of a notebook that picks its recipe among its variables,
    every setting is a parameter, also one that its parameters cell does not name.

    Raises:
        ValueError: an unknown name, a value of another type or out of range.
    """
    values, settings = defaults(notebook), recipe.names()
    picked = settings if any(PICKED in source for source in code(notebook)) else {}
    for name in given:
        if name not in values and name not in picked:
            raise ValueError(recipe.unknown(f"parameter of {notebook.stem}", name, {**values, **picked}))
    for name, value in given.items():
        value = parameters.plain(name, value)
        values[name] = value if name in settings else _fitting(name, values[name], value)
    checked = recipe.Recipe.of(**{n: v for n, v in values.items() if n in settings}).flat()
    return {n: checked.get(n, v) for n, v in values.items()}


def _fitting(name: str, own: Any, value: Any) -> Any:
    """A value for a parameter of the notebook's own, whose default shows the type: None takes any, [] any list."""
    if own is None:
        return value
    kinds = {type(v) for v in own} if isinstance(own, list) else set()
    kinds = {float} if kinds == {int, float} else kinds
    if len(kinds) != 1 or kinds == {type(None)}:
        return recipe.convert(name, value, type(own))
    return list(recipe.convert(name, value, tuple[kinds.pop(), ...]))


def plan(notebook: Path, given: Mapping[str, Any], base: Path | None = None, known: dict[Path, str] | None = None) -> Job:
    """The run of a notebook with these parameters; raises what `check` raises, and starts nothing.

    Its folder is named by its parameters, the notebook's code, the library's, and the content of what it reads; where that
    lies is not in the name, so that the same files in another place, or on another machine, are the same run.

    Args:
        notebook: its path.
        given: parameters, the others at the notebook's own values.
        base: the folder that relative paths are meant from; None: the present working folder.
        known: digests by path, for many runs planned at once; filled.
    """
    notebook, base, known = Path(os.path.abspath(notebook)), (base or Path.cwd()).absolute(), {} if known is None else known
    values, sources = check(notebook, given), code(cells.check(notebook))
    made_of = inputs.of(values, base, known) | inputs.modules(sources, base, known)
    name = digest([values, sources, _library(), inputs.digests(made_of)])
    return Job(notebook, values, root() / notebook.stem / name, base, made_of)


@cache
def _library() -> str:
    """All that the package computes with and compares to."""
    return digest([p.read_text() for p in sorted(Path(__file__).parents[1].rglob("*")) if p.suffix in (".py", ".csv")])


def execute(job: Job, force: bool = False, progress: bool | dict[str, Any] = True) -> Path:
    """Run a notebook with papermill, unless it is complete; two processes that want the same run make it once.

    Args:
        job: what to run.
        force: run although it is complete.
        progress: show a bar over the cells; a dict holds tqdm's arguments.

    Returns:
        The executed notebook, `job.done`; figures, record, `parameters.yaml` and, if it read any, `inputs.yaml` (what, from
        where, with which content) lie beside it.

    Raises:
        ValueError: a cell failed (names the notebook that holds the traceback); what it reads changed since it was planned.
        Died: the kernel was killed.
        OSError: the disk is full, say.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with waiting(FileLock(job.folder.with_suffix(".lock")), f"run {job.folder.name}"):
        if not force and complete(job):
            return job.done
        _unchanged(job, "after the run was planned")
        _library.cache_clear()
        if plan(job.notebook, job.values, job.base).folder.name != job.folder.name:  # a sweep may have planned it hours ago
            raise ValueError(f"{job.notebook.name} or the library changed after the run was planned; started again, it is "
                             "made with the code that is there then")
        for old in (job.done, *job.folder.glob(".*")):  # of a run that another takes the place of, or left by a kill
            old.unlink(missing_ok=True)
        write_text(job.folder / "parameters.yaml", parameters.dump(job.values))
        if job.inputs:
            write_text(job.folder / "inputs.yaml", parameters.dump(job.inputs))
        _papermill(job, progress)
        _unchanged(job, "while the run was at work")
        write_text(job.done, cells.without_widgets(job.unfinished))
        job.unfinished.unlink()
        storage.push(*(p for p in sorted(job.folder.iterdir()) if p != job.done), job.done)  # what says "complete" last
    return job.done


def _unchanged(job: Job, when: str) -> None:
    """Refuse to call a run by what it was not made of; raises `ValueError`."""
    now = inputs.of(job.values, job.base) | inputs.modules(code(job.notebook), job.base)
    for name, paths in job.inputs.items():
        for path, content in paths.items():
            if now.get(name, {}).get(path) != content:
                raise ValueError(f"{name}: {path} changed {when}; started again, it is made from what is there then (what a "
                                 "run writes belongs into its own folder, Run.folder, not at a path among its parameters)")


def _papermill(job: Job, progress: bool | dict[str, Any]) -> None:
    quick.nbformat()
    import papermill  # a second that no other command needs
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # its parser takes a "=" in a comment for an unknown parameter
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)  # a kernel's message while it is ended: a cell's error is said below
    kept = "stages that were complete are kept, and the next run goes on from there"
    before = os.environ.get("PDIFF_RUN_DIR")
    os.environ["PDIFF_RUN_DIR"] = str(job.folder.resolve())
    try:
        papermill.execute_notebook(literal(job.notebook), literal(job.unfinished.absolute()), parameters=job.values,
                                   progress_bar=progress, log_output=False, cwd=job.base if job.base.is_dir() else None,
                                   extra_arguments=["--log-level=ERROR"])  # of the kernel: a sweep shows one line per run
    except papermill.PapermillExecutionError as e:
        raise ValueError(f"{e.ename} in cell {e.exec_count} of {job.notebook.name}: {e.evalue}\nthe traceback is in "
                         f"{job.unfinished}; {kept}") from None
    except RuntimeError as e:  # also of a kernel that found its port taken by one that another process started meanwhile
        if isinstance(e, DeadKernelError) or str(e).startswith("Kernel died"):
            raise Died(f"the kernel of {job.notebook.name} died (killed, out of memory, or its port was taken); {kept}") from None
        raise
    finally:
        del os.environ["PDIFF_RUN_DIR"]
        if before is not None:
            os.environ["PDIFF_RUN_DIR"] = before


def literal(path: Path) -> str:
    """A path for papermill, which takes {name} in it for a parameter to be filled in."""
    return str(path).replace("{", "{{").replace("}", "}}")


def complete(job: Job) -> bool:
    """Whether the run has been made: here, or on the shared storage, from which it is then fetched."""
    return (job.done.is_file() or storage.fetch_folder(job.folder, job.done)) and fits(job, job.folder)


def fits(job: Job, folder: Path) -> bool:
    """Whether what is in a folder was made of this run's inputs, as far as it says; other code may have made it.

    A command of `pdiff sweep --dry-run` writes no `inputs.yaml`: there the record tells what its kernel saw.
    """
    file, wanted = folder / "inputs.yaml", inputs.digests(job.inputs)
    if file.is_file():
        return inputs.digests(parameters.load(file)) == wanted
    record = folder / "record.json"
    said = json.loads(record.read_text()).get("inputs") if record.is_file() else None
    seen = {name: content for name, content in (said or {}).items() if name.partition(".")[0] in job.values}
    # The folder's own name tells too, but a command may have been executed long after it was printed.
    told = folder == job.folder or wanted.keys() <= seen.keys()
    return told and all(wanted.get(name) == content for name, content in seen.items())


def changed(job: Job) -> str:
    """Which inputs differ from those of the newest run with the same parameters, in words; "" if none does."""
    found = []
    for file in job.folder.parent.glob("*/parameters.yaml"):
        old = file.with_name("inputs.yaml")
        if (old.is_file() or job.inputs) and file.parent != job.folder and parameters.load(file) == job.values:
            found.append((file.stat().st_mtime, file.parent.name, parameters.load(old) if old.is_file() else {}))
    if not found:
        return ""
    _, run, before = max(found, key=lambda f: f[:2])
    odd = []
    for name in {**before, **job.inputs}:
        then, now = before.get(name, {}), job.inputs.get(name, {})
        new = [f"{path} changed" if path in then else f"{path} ({name}) is another than {', '.join(then) or 'none'}"
               for path, content in now.items() if content not in then.values() or (path in then and then[path] != content)]
        odd += new or [f"{name} was {', '.join(then)}"] * (list(then.values()) != list(now.values()))
    return f"{'; '.join(odd)} since run {run}: making it again" if odd else ""


def record(job: Job) -> None:
    """Put the outputs of a run at the notebook's own parameters into the notebook, without papermill's traces."""
    cells.keep_outputs(job.done, job.notebook)
