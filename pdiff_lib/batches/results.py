"""The table of a sweep: what all of its runs that are present have found, a row per network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from pdiff_lib.base import parameters, recipe, score as scores, storage
from pdiff_lib.base.records import digest, dumps, loads, without_folders
from pdiff_lib.base.storage import PROJECT
from pdiff_lib.batches import jobs, sweep


def collect(grid: sweep.Sweep) -> pd.DataFrame:
    """The runs of a sweep that are present, whichever version of the code made them (the newest counts), of what they would
    read now: a run over other files of the same names is another run.

    Returns:
        A row per network (`Experiment.frame`) or, of notebooks that keep none, a row per run (its numbers); with the
        parameters that vary, `seconds` and `run` (its folder). `attrs`: `title`, `varied`, `present`, `missing` (labels)
        and `other_code` (how many runs were made by another version of the code).

    Raises:
        ValueError: none is present.
    """
    folder = grid.jobs[0].folder.parent
    storage.fetch_each(folder, ("parameters.yaml", "inputs.yaml", "networks.parquet", "record.json"))
    found: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
    for file in folder.glob("*/record.json"):
        record, given = loads(file.read_text()), file.with_name("parameters.yaml")
        known = next((job.values for job in grid.jobs if job.folder.name == file.parent.name), None)  # by plain papermill
        values = digest(known or (parameters.load(given) if given.is_file() else {}))
        found.setdefault(values, []).append((record["created"], file.parent, record))
    parts, missing, other = [], [], 0
    for job in grid.jobs:
        own = [f for f in found.get(digest(job.values), []) if jobs.fits(job, f[1])]
        if not own:
            missing.append(grid.label(job))
            continue
        _, where, record = max(own, key=lambda f: f[:2])
        other += where.name != job.folder.name
        table = where / "networks.parquet"
        part = pd.read_parquet(table) if table.is_file() else pd.json_normalize(record["numbers"])
        own = {n: str(v) if isinstance(v := job.values[n], list) else v for n in grid.varied}
        parts.append(part.assign(seconds=record["seconds"], run=where.name).assign(**own))
    if not parts:
        raise ValueError(f"no run of {grid.path} is present in {folder}: expected at least one (pdiff sweep {grid.path})")
    table = pd.concat(parts, ignore_index=True)
    table = table[[*grid.varied, *(c for c in table if c not in grid.varied)]]
    fixed = {n: v for n, v in grid.jobs[0].values.items() if n not in grid.varied}
    fixed = {n: recipe.short(v) if n == "dataset" else v for n, v in fixed.items()}
    title = ", ".join(str(fixed[n]) + {"image_size": " px"}.get(n, "") for n in ("network", "dataset", "image_size", "subset")
                      if n in fixed)
    table.attrs = {"title": title, "varied": grid.varied, "present": len(parts), "missing": missing, "other_code": other}
    return table


def table(source: str | Path) -> pd.DataFrame:
    """The results of a sweep: of a sweep file the runs that are present (`collect`), of a Parquet file what is in it.

    Raises:
        ValueError: no such file, or no run is present.
    """
    if str(source).endswith((".yaml", ".yml")):
        return collect(sweep.load(source))
    if not Path(source).is_file():
        raise ValueError(f"no table of results {str(source)!r}: expected a sweep file, or a Parquet file from `pdiff results`")
    return pd.read_parquet(source)


def records(notebook: str = "") -> list[dict[str, Any]]:
    """What runs have recorded: those committed under figures/ and those in runs/, each once.

    Args:
        notebook: a notebook's name without ending; empty: all.

    Returns:
        The contents of their `record.json`, with `where` (the file's path) and `scale` (what was run, in words).
    """
    found = {}
    for file in _files():
        content = loads(file.read_text())
        if content["notebook"] == notebook or not notebook:
            s = content["settings"]
            parts = (s.get("network"), recipe.short(s.get("dataset", "")), f"{s['image_size']} px" if "image_size" in s else None)
            scale = content["numbers"].get("scale") or ", ".join(p for p in parts if p)
            same = digest(json.loads(without_folders(dumps({"settings": s, "numbers": content["numbers"]}), s)))
            found.setdefault((content["notebook"], same), {**content, "where": str(file), "scale": scale})
    return list(found.values())


def _files() -> list[Path]:
    return [*PROJECT.glob("figures/*-record.json"), *storage.root().glob("*/*/record.json")]


def newer(job: jobs.Job) -> int:
    """How many records of other runs are newer than a complete run whose notebook shows such. They are no part of what it is
    identified by: the runs of a sweep show each other, and would never be complete."""
    shows = any("results.records(" in source for source in jobs.code(job.notebook))
    if not shows and not any(str(v).endswith((".yaml", ".yml")) for v in job.values.values()):
        return 0
    made = job.done.stat().st_mtime
    return sum(p.stat().st_mtime > made for p in _files() if p.parent != job.folder)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per point of the grid and method: n, score (accuracies are fractions) and the means of the measures of novelty."""
    if "method" not in table:
        return table.set_index(table.attrs["varied"])
    by = table.groupby([*table.attrs["varied"], "method"], sort=False)
    return by.agg(**scores.of(table).aggregates, max_similarity=("max_similarity", "mean"), distance=("distance", "mean"),
                  outside_span=("outside_span", "mean"))


def save(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write a table as Parquet (with its `attrs`) and CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path, index=False)
    table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    return [path, path.with_suffix(".csv")]
