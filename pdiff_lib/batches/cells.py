"""What a notebook's file says (its parameters, its code) and keeps (its outputs).

nbformat costs two seconds of imports, most of them for a grammar of addresses. So what cells say is read as JSON, and nbformat judges a
notebook before a run of it is planned, and writes it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pdiff_lib.base import parameters, quick


class Cell(NamedTuple):
    """What a run depends on of a cell: its kind ("code", "markdown", ...), its source and its tags."""

    kind: str
    source: str
    tags: list[str]


def defaults(notebook: Path) -> dict[str, Any]:
    """Names and values in the cell tagged `parameters`.

    Raises:
        ValueError: no such cell, or something in it that is not `name = literal`; not a notebook.
    """
    for cell in _read(*_version(notebook)):
        if "parameters" in cell.tags:
            values, line = {}, 1
            try:
                for node in ast.parse(cell.source).body:
                    line = node.lineno
                    name = node.targets[0].id
                    values[name] = parameters.plain(name, ast.literal_eval(node.value))
            except (AttributeError, ValueError, SyntaxError) as e:
                why = f" ({e})" if isinstance(e, ValueError) and str(e).startswith(f"{name} is") else ""
                raise ValueError(f"{notebook.name}, parameters cell, line {getattr(e, 'lineno', None) or line}: expected "
                                 f"'name = literal'{why}") from e
            return values
    check(notebook)
    raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")


def code(notebook: Path) -> list[str]:
    """The sources of a notebook's code cells."""
    return [cell.source for cell in _read(*_version(notebook)) if cell.kind == "code"]


def check(notebook: Path) -> Path:
    """The notebook itself, if it is one.

    Raises:
        ValueError: it is none.
    """
    _judged(*_version(notebook))
    return notebook


def without_widgets(notebook: Path) -> str:
    """A notebook's text without the state of its widgets: megabytes, of progress bars that are over."""
    nbformat = quick.nbformat()
    executed = nbformat.read(notebook, as_version=4)
    executed.metadata.pop("widgets", None)
    return nbformat.writes(executed)


def keep_outputs(ran: Path, notebook: Path) -> None:
    """Put the outputs of an executed notebook into the one that it was made from, without papermill's traces."""
    nbformat = quick.nbformat()
    executed, original = nbformat.read(ran, as_version=4), nbformat.read(notebook, as_version=4)
    outputs = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    count = 0
    for cell, done in zip(original.cells, outputs, strict=True):
        if cell.cell_type == "code":
            count += 1
            shown = [o for o in done.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
                     and o.get("name") != "stderr"]
            for o in shown:
                if o.output_type == "execute_result":
                    o.execution_count = count
            cell.outputs, cell.execution_count = shown, count
    nbformat.write(original, notebook)


def _version(notebook: Path) -> tuple[Path, int]:
    """A file and the time of its content: a grid of hundreds of runs reads one notebook hundreds of times."""
    return notebook.resolve(), notebook.stat().st_mtime_ns


@lru_cache(4)
def _read(notebook: Path, time: int) -> list[Cell]:
    try:
        return _cells(json.loads(notebook.read_text(encoding="utf-8")))
    except Exception:  # of an older format, which nbformat converts, or no notebook, of which it says why
        return _cells(_judged(notebook, time))


def _cells(content: Mapping[str, Any]) -> list[Cell]:
    # Files hold a source as one text or as its lines.
    return [Cell(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in content["cells"]]


@lru_cache(4)
def _judged(notebook: Path, _time: int) -> Mapping[str, Any]:
    nbformat = quick.nbformat()
    try:
        read = nbformat.read(notebook, as_version=4)
        nbformat.validate(read)
        return read
    except Exception as e:  # each way of not being a notebook has an error of its own
        raise ValueError(f"{notebook} is not a notebook ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from e
