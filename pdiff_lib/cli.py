"""The `pdiff` command: run a notebook with checked parameters, and see which datasets are there."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer

from pdiff_lib import recipe, runs

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


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
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            values = {}
            for node in ast.parse(cell.source).body:
                try:
                    values[node.targets[0].id] = ast.literal_eval(node.value)
                except (AttributeError, ValueError) as e:
                    raise ValueError(f"{notebook.name}, parameters cell, line {node.lineno}: expected 'name = literal'") from e
            return values
    raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")


def check(notebook: Path, given: dict[str, Any]) -> dict[str, Any]:
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


@app.command()
def run(notebook: Annotated[str, typer.Argument(help="name, number or path")],
        file: Annotated[list[Path], typer.Option("-f", "--file", help="YAML of parameters; later files win")] = [],
        parameter: Annotated[list[str], typer.Option("-p", "--parameter", help="name value, as papermill's")] = [],
        force: Annotated[bool, typer.Option(help="run again although it is complete")] = False,
        record: Annotated[bool, typer.Option(help="keep the outputs in the notebook itself, to be committed")] = False):
    """Run a notebook with papermill; its outputs, record and figures land in runs/NOTEBOOK/<digest>/."""
    path = find(notebook)
    given: dict[str, Any] = {}
    for f in file:
        given |= recipe.load(f)
    own = defaults(path)
    for name, _, text in (p.partition("=") for p in parameter):
        # A name or a path is taken as it is written: YAML would make a number of the dataset "001".
        given[name] = text if isinstance(own.get(name), str) else recipe.parse(name, text)
    values = check(path, given)
    if record and values != check(path, {}):
        raise ValueError("--record keeps a run at the notebook's own parameters: expected neither -f nor -p with other values")
    sources = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    library = runs.digest([p.read_text() for p in sorted(Path(__file__).parent.glob("*.py"))])
    folder = runs.root() / path.stem / runs.digest([values, sources, library])
    done = folder / path.name
    if done.is_file() and not force:
        print(f"already complete: {done} (--force runs it again)")
    else:
        _execute(path, values, folder, done)
        print(f"complete: {done}")
    if record:
        _record(done, path)
    for figure in sorted(folder.glob("*.html")):
        print(f"  figure: {figure}")


def _execute(path: Path, values: dict[str, Any], folder: Path, done: Path) -> None:
    import papermill  # 1 s that no other command needs

    folder.mkdir(parents=True, exist_ok=True)
    running = folder / f"unfinished-{path.name}"
    os.environ["PDIFF_RUN_DIR"] = str(folder.resolve())
    try:
        papermill.execute_notebook(path, running, parameters=values, progress_bar=True, log_output=False)
    except papermill.PapermillExecutionError as e:
        raise ValueError(f"{e.ename} in cell {e.exec_count} of {path.name}: {e.evalue}\nthe traceback is in {running}; stages "
                         "that were complete are kept, and the next run goes on from there") from None
    finally:
        del os.environ["PDIFF_RUN_DIR"]
    executed = nbformat.read(running, as_version=4)
    executed.metadata.pop("widgets", None)  # megabytes of state of progress bars that are over
    nbformat.write(executed, running)
    running.replace(done)


def _record(done: Path, path: Path) -> None:
    """Put the outputs of a run at the notebook's own parameters into the notebook, without papermill's traces."""
    executed, original = nbformat.read(done, as_version=4), nbformat.read(path, as_version=4)
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
    nbformat.write(original, path)


@app.command()
def data():
    """List the datasets: where each comes from, and whether it is on this machine."""
    from pdiff_lib import data as images

    for row in images.catalogue():
        where = f"present: {row['where']}" if row["present"] else f"absent; from {row['source']}"
        print(f"{row['name']:<10} {row['classes']:>5} classes  {row['image_size']!s:<10} {where}")


@app.command()
def publish(folder: Annotated[Path, typer.Argument(help="runs/NOTEBOOK/<digest>")],
            name: Annotated[str, typer.Argument(help="id of the experiment, such as cifar10-resnet18")],
            to: Annotated[Path, typer.Option(help="where figures are kept")] = NOTEBOOKS.parent / "figures"):
    """Copy a run's figures, numbers and record to figures/<id>-*.{svg,html,csv,json}."""
    if not (folder / "record.json").is_file():
        raise ValueError(f"{folder} holds no record.json: expected the folder of a complete run")
    to.mkdir(exist_ok=True)
    for source in sorted(folder.iterdir()):
        if source.suffix in (".svg", ".html", ".csv", ".json"):
            print(shutil.copy(source, to / f"{name}-{source.name}"))


def _joined(arguments: list[str]) -> list[str]:
    """`-p name value` as `-p name=value`: typer knows no repeated option of two values."""
    joined, rest = [], list(arguments)
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("-p", "--parameter"):
            if len(rest) < 2:
                raise ValueError(f"{joined[-1]} {' '.join(rest)}: expected {joined[-1]} name value")
            joined.append(f"{rest.pop(0)}={rest.pop(0)}")
    return joined


def main() -> None:
    """Entry point: an error in what was asked for is one line, not a traceback."""
    try:
        app(_joined(sys.argv[1:]))
    except ValueError as e:
        sys.exit(f"pdiff: {e}")


if __name__ == "__main__":
    main()
