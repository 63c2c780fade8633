"""Notebooks: rules that can be seen without running them, and the numbers that a run must give.

tests/recorded.json: {notebook: {path in record.json's `numbers`, with dots: [value, tolerance]}}.
"""

import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from pdiff_lib.base import recipe
from pdiff_lib.batches import jobs, warm

HERE = Path(__file__).parents[1]
NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))
RECORDED = json.loads((HERE / "tests" / "recorded.json").read_text())
# In which runs begin, the others after them: 50 makes the stages of 00, 10, 24, 32a, B2 and B3, 40 those of 33.
FIRST = ["50_explore", "B4a_detection", "41_audit", "B4b_segmentation", "70_arena", "B1_hyper_representations", "60_neural_fields", "40_memorization",
         "63_shapes", "61_any_task", "B4c_image_generation", "72_checkpoints_to_checkpoints", "32b_full_generation", "71_how_many", "23_parameter_autoencoder",
         "B5_memory", "62_own_checkpoints", "B3_diffusion_steps", "B2_vae"]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def trees(path: Path) -> list[ast.Module]:
    """The code of each cell; lines with magics are left out."""
    return [ast.parse(re.sub(r"^[%!].*", "", c.source, flags=re.M)) for c in code_cells(path)]


def test_there_are_notebooks():
    assert {"00_quickstart", *FIRST} <= {p.stem for p in NOTEBOOKS}


@every_notebook
def test_parameters_come_first_and_each_means_something(path):
    cells = code_cells(path)
    assert [i for i, c in enumerate(cells) if "parameters" in tags(c)] == [0]
    assert jobs.code(path) == [c.source for c in cells]  # read without nbformat: what names a run's folder is the same
    values = jobs.defaults(path)  # refuses what is not `name = literal`
    assert jobs.check(path, {}) == values  # the defaults are in range and written as the recipe would
    used = {
        n.id
        for tree in trees(path)[1:]
        for n in ast.walk(tree)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    assert [n for n in values if n not in recipe.names() and n not in used] == []
    assert not values.keys() & {"k", "x", "theta"}


@every_notebook
def test_cells_are_short_and_define_nothing(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert [n.name for tree in trees(path) for n in ast.walk(tree) if isinstance(n, kinds)] == []
    assert [c.source for c in code_cells(path)[1:] if len(c.source.splitlines()) > 15] == []


@every_notebook
def test_outputs_are_kept_small_and_whole(path):
    nb = nbformat.read(path, as_version=4)
    cells = [c for c in nb.cells if c.cell_type == "code"]
    # nbval passes over a cell without a count: run it with pdiff run NOTEBOOK --record
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    assert "widgets" not in nb.metadata
    assert [len(json.dumps(o)) for o in outputs if len(json.dumps(o)) >= 200_000] == []
    assert not any("injected-parameters" in tags(c) or "papermill" in c.metadata for c in nb.cells)
    checked = [c for c in cells if "nbval-check-output" in tags(c)]
    assert checked and all(c.outputs for c in checked)


@pytest.mark.parametrize("file", sorted((HERE / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_fit_their_notebook(file):
    """A file named after a notebook's number (23_..., B1_...) is for that one, any other for the quickstart."""
    given = recipe.load(file)
    number = file.stem.partition("_")[0]
    values = jobs.check(jobs.find(number if number in [p.stem.partition("_")[0] for p in NOTEBOOKS] else "00"), given)
    recipe.Recipe.of(**{n: v for row in given.get("rows", {}).values() for n, v in row.items()})
    assert len(given) > 1 and {n: values[n] for n in given} == given
    # A notebook's own number is that of its smoke run.
    assert "dataset" not in given or {"train_images", "test_images", "k_checkpoints", "base_epochs"} <= given.keys()


def at(numbers, path: str) -> float:
    """The number under a dotted path, where keys may hold dots ("methods.noise 0.15.mean")."""
    if path == "":
        return numbers
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        if isinstance(numbers, dict) and (key := ".".join(parts[:i])) in numbers:
            return at(numbers[key], ".".join(parts[i:]))
    raise KeyError(f"{path!r}: expected one of {list(numbers)}")


def test_at_finds_numbers():
    assert at({"methods": {"noise 0.15": {"mean": 2}, "noise": {"x": 1}}}, "methods.noise 0.15.mean") == 2
    with pytest.raises(KeyError, match="expected one of .'a'."):
        at({"a": 1}, "b")


def off(numbers: dict, recorded: dict) -> dict:
    """The recorded numbers that a run missed, with what it gave; a NaN is a miss."""
    found = {name: at(numbers, name) for name in recorded}
    return {name: (found[name], *pair) for name, pair in recorded.items() if not abs(found[name] - pair[0]) <= pair[1]}


def test_every_notebook_has_recorded_numbers_with_a_tolerance_that_can_fail():
    assert RECORDED.keys() == {p.stem for p in NOTEBOOKS}
    for entries in RECORDED.values():
        assert entries and all(0 <= tolerance < max(abs(value), 0.05) for value, tolerance in entries.values())
    assert off({"a": 0.5, "b": float("nan"), "c": 1.0}, {"a": [0.6, 0.05], "b": [0, 1], "c": [1.1, 0.2]}).keys() == {
        "a",
        "b",
    }


@pytest.fixture(scope="module")
def made(request):
    """The runs of all notebooks that are tested, two at a time and more on more cores, each on its share of them. Minutes when
    nothing is kept yet; stages stay in runs/ and serve nbval too."""
    wanted = [i.callspec.params["path"] for i in request.session.items
              if getattr(i, "originalname", "") == "test_a_run_gives_the_recorded_numbers"]
    cores = os.cpu_count() or 1
    at_once = min(cores, 4)
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores // at_once)}
    environment.pop("PDIFF_RUN_DIR", None)
    command = [sys.executable, "-m", "pdiff_lib.batches.cli", "run"]
    # The longest first, so that none is left over alone; of those that want the same stages the first makes them while others run.
    order = sorted(wanted, key=lambda path: FIRST.index(path.stem) if path.stem in FIRST else len(FIRST))
    with warm.kernels(environment) as kernels, ThreadPoolExecutor(at_once) as pool:
        environment |= kernels
        yield {path: pool.submit(subprocess.run, [*command, path.stem], cwd=HERE, env=environment, capture_output=True,
                                 text=True, timeout=2400) for path in order}
        pool.shutdown(cancel_futures=True)


@every_notebook
def test_a_run_gives_the_recorded_numbers(path, made):
    done = made[path].result()
    assert done.returncode == 0, done.stderr[-3000:]
    executed = Path(re.search(r"complete: (\S.*?\.ipynb)", done.stdout)[1])
    record = json.loads((executed.parent / "record.json").read_text())
    assert record["notebook"] == path.stem and off(record["numbers"], RECORDED[path.stem]) == {}
    assert [c.source for c in code_cells(executed) if c.execution_count is None] == []
