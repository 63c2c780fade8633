"""The `pdiff` command: run notebooks with checked parameters, one by one or a grid of them, and look at what came out."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pdiff_lib.base import parameters, records
from pdiff_lib.base.known import catalogue
from pdiff_lib.batches import jobs

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Files = Annotated[list[Path], typer.Option("-f", "--file", help="YAML of parameters; later files win")]
Parameters = Annotated[list[str], typer.Option("-p", "--parameter", help="name value, as papermill's; a list as [1, 2]")]
Force = Annotated[bool, typer.Option(help="run again although it is complete")]
SweepFile = Annotated[Path, typer.Argument(help="params/sweeps/X.yaml")]


def _given(path: Path, file: list[Path], parameter: list[str]) -> dict[str, Any]:
    """What -f and -p say of a notebook's parameters, the later over the earlier."""
    given: dict[str, Any] = {}
    for f in file:
        given |= parameters.load(f)
    own = jobs.defaults(path)
    for name, _, text in (p.partition("=") for p in parameter):
        given[name] = parameters.typed(name, text, own.get(name))
    return given


@app.command()
def run(notebook: Annotated[str, typer.Argument(help="name, number or path")], file: Files = [], parameter: Parameters = [],
        force: Force = False,
        record: Annotated[bool, typer.Option(help="keep the outputs in the notebook itself, to be committed")] = False):
    """Run a notebook with papermill; its outputs, record and figures land in runs/NOTEBOOK/<digest>/."""
    path = jobs.find(notebook)
    job = jobs.plan(path, _given(path, file, parameter))
    if record and job.values != jobs.check(path, {}):
        raise ValueError("--record keeps a run at the notebook's own parameters: expected neither -f nor -p with other values")
    if not force and jobs.complete(job):
        print(f"already complete: {job.done} (--force runs it again)")
        from pdiff_lib.batches import results as tables

        if newer := tables.newer(job):
            print(f"it shows what other runs had recorded by then; {newer} of the records there are now are newer")
    else:
        if why := jobs.changed(job):
            print(why, flush=True)
        print(f"complete: {jobs.execute(job, force)}")
    if record:
        jobs.record(job)
    for figure in sorted(job.folder.glob("*.html")):
        print(f"  figure: {figure}")


@app.command()
def sweep(file: SweepFile,
          dry_run: Annotated[bool, typer.Option("--dry-run", help="print one papermill command per run, start nothing")] = False,
          workers: Annotated[int, typer.Option(help="runs at a time; 0: one per GPU, or per two cores")] = 0,
          gpu_share: Annotated[int, typer.Option(help="workers per GPU")] = 1,
          ray: Annotated[str, typer.Option(help="address of a Ray cluster (HOST:6379, or auto): runs are its tasks")] = "",
          cpus: Annotated[int, typer.Option(help="cores per run; 0: the cores shared among the workers (with --ray: 1)")] = 0,
          gpus: Annotated[float, typer.Option(help="with --ray: GPUs per run")] = 0.0,
          share: Annotated[str, typer.Option("--storage", help="folder or fsspec URL that all machines reach")] = "",
          force: Force = False):
    """Run a grid of runs; those complete are skipped, killed ones go on from their last complete stage."""
    from pdiff_lib.batches import sweep as sweeps

    grid = sweeps.load(file)
    if dry_run:
        print(*map(sweeps.command, grid.jobs), sep="\n")
        return
    outcomes = sweeps.run(grid, workers=workers, gpu_share=gpu_share, ray=ray, cpus=cpus, gpus=gpus, storage_url=share,
                          force=force)
    failed = [o for o in outcomes if o.error]
    if failed:
        raise ValueError(f"{len(failed)} of {len(outcomes)} runs failed:\n" + "\n".join(f"  {o.label}: {o.error}" for o in failed))


@app.command()
def results(file: SweepFile,
            to: Annotated[Path | None, typer.Option(help="X.parquet; by default runs/sweeps/NAME.parquet")] = None):
    """The table of all runs of a sweep that are present: X.parquet and X.csv, a row per network."""
    from pdiff_lib.batches import results as tables, sweep as sweeps

    grid = sweeps.load(file)
    table = tables.collect(grid)
    for path in tables.save(table, to or grid.folder / f"{file.stem}.parquet"):
        print(path)
    print(tables.summary(table).round(4).to_string())
    print(f"{table.attrs['present']} of {len(grid.jobs)} runs are present; {table.attrs['other_code']} of them were made by "
          "another version of the code")


@app.command("app")
def serve(file: Files = [], parameter: Parameters = [],
          host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
          port: Annotated[int, typer.Option(help="0: any free one")] = 8866,
          browser: Annotated[bool, typer.Option(help="open it")] = True,
          token: Annotated[str, typer.Option(help="asked of every visitor; by default a new one, printed with the address. "
                                                  "Your own is better in $PDIFF_TOKEN, where no list of processes shows it")] = ""):
    """Serve the explorers as a web page (Voila), which needs no network."""
    from pdiff_lib.batches import app as page

    path = jobs.find("50_explore")
    page.serve(path, jobs.check(path, _given(path, file, parameter)), host=host, port=port, open_browser=browser,
               token=token or os.environ.get("PDIFF_TOKEN", ""))


@app.command()
def generate(what: Annotated[Path, typer.Argument(help="a recipe (YAML), or the folder of a complete run")],
             out: Annotated[Path, typer.Option(help="a new folder, or one that this command left unfinished")],
             n: Annotated[int, typer.Option(help="how many networks")] = 20,
             candidates: Annotated[int, typer.Option(help="how many to pick them from; 0: the recipe's `samples`")] = 0):
    """Generate networks as safetensors that load into the model, with a model card; the best, by one half of the test images."""
    from pdiff_lib.generate import generate as networks  # torch: seconds that no other command needs

    print(f"complete: {networks(what, n, out, candidates)}")


@app.command()
def data():
    """List the datasets: where each comes from, and whether it is on this machine."""
    for row in catalogue():
        where = f"present: {row['where']}" if row["present"] else f"absent; from {row['source']}"
        print(f"{row['name']:<13} {row['classes']:>5} classes  {row['image_size']!s:<10} {where}")


@app.command()
def publish(folder: Annotated[Path, typer.Argument(help="runs/NOTEBOOK/<digest>")],
            name: Annotated[str, typer.Argument(help="id of the experiment, such as cifar10-resnet18")],
            to: Annotated[Path, typer.Option(help="where figures are kept")] = jobs.NOTEBOOKS.parent / "figures"):
    """Copy a run's figures, numbers and record to figures/<id>-*.{svg,html,csv,json,webp}, if a commit holds the code of it. Of files that it was
    given, names are kept and folders are not."""
    if not (folder / "record.json").is_file():
        raise ValueError(f"{folder} holds no record.json: expected the folder of a complete run")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name {name!r}: expected letters, digits, '.', '_' and '-', as files will begin with it")
    record = records.loads((folder / "record.json").read_text())
    records.check_commit(str(record.get("commit", "unknown")))
    to.mkdir(exist_ok=True)
    for source in sorted(folder.iterdir()):
        there = to / f"{name}-{source.name}"
        if source.suffix in (".svg", ".html", ".csv", ".json"):
            there.write_text(records.without_folders(source.read_text(encoding="utf-8"), record.get("settings", {})), encoding="utf-8")
            print(there)
        elif source.suffix == ".webp":
            print(shutil.copy(source, there))


def _joined(arguments: list[str]) -> list[str]:
    """`-p name value` as `-p name=value`: typer knows no repeated option of two values."""
    joined, rest = [], list(arguments)
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("-p", "--parameter"):
            if len(rest) < 2:
                raise ValueError(f"{joined[-1]} {' '.join(rest)}: expected {joined[-1]} name value")
            if not rest[0].isidentifier():
                raise ValueError(f"{joined[-1]} {rest[0]!r}: expected a parameter's name, then its value")
            joined.append(f"{rest.pop(0)}={rest.pop(0)}")
    return joined


def main() -> None:
    """Entry point: an error in what was asked for, or a full disk, is one line, not a traceback."""
    try:
        app(_joined(sys.argv[1:]))
    except (ValueError, OSError, jobs.Died) as e:
        sys.exit(f"pdiff: {e}")


if __name__ == "__main__":
    main()
