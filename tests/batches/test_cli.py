"""cli.py: what is asked for is checked before a kernel starts; runs land in folders named by what they depend on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from pdiff_lib.base import runs
from pdiff_lib.batches import cli, jobs
from pdiff_lib.tasks import data

HERE = Path(cli.__file__).parents[2]
PARAMETERS = """k_checkpoints = 5          # one of the recipe's
dataset = "digits"
zoo_lr = 0.1
weights = ""               # a path
loops = [1.0, 2.0]         # the notebook's own
names = ["a"]
flag = False
fail = 0"""
WORK = """from pdiff_lib import runs
run = runs.Run("tiny", {"k": k_checkpoints})
run.record({"k": k_checkpoints, "loops": sum(loops)})
open(marker, "a").write("x")
print("folder", run.folder)"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A notebook that leaves an x in a file each time that it runs, and fails if it is told to."""
    marker = tmp_path / "marker"
    sources = [PARAMETERS, f"marker = {str(marker)!r}\n{WORK}", "1 / (1 - fail)", "k_checkpoints * 2"]
    cells = [v4.new_markdown_cell("# Tiny"), *map(v4.new_code_cell, sources)]
    cells[1].metadata["tags"] = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nb = v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(nb, tmp_path / "tiny.ipynb")
    return tmp_path / "tiny.ipynb"


def kernels(notebook: Path) -> int:
    """How many times the notebook was executed."""
    marker = notebook.with_name("marker")
    return len(marker.read_text()) if marker.exists() else 0


def pdiff(cwd: Path, *args, module="pdiff_lib.batches.cli") -> subprocess.CompletedProcess:
    """The command in a process of its own, with the runs in `cwd`."""
    keep = {k: v for k, v in os.environ.items() if k != "PDIFF_RUN_DIR"}
    env = {**keep, "PDIFF_RUNS": str(cwd / "runs"), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_defaults_are_those_of_the_cell(tiny):
    assert jobs.defaults(tiny) == {
        "k_checkpoints": 5,
        "dataset": "digits",
        "zoo_lr": 0.1,
        "weights": "",
        "loops": [1.0, 2.0],
        "names": ["a"],
        "flag": False,
        "fail": 0,
    }


def test_a_notebook_of_an_older_format_says_the_same(tiny):
    old = tiny.with_name("old.ipynb")
    old.write_text(json.dumps(nbformat.convert(nbformat.read(tiny, as_version=4), 3)))
    assert "cells" not in json.loads(old.read_text())  # format 3 has them elsewhere
    assert jobs.defaults(old) == jobs.defaults(tiny) and jobs.code(old) == jobs.code(tiny) != []


@pytest.mark.parametrize(
    "source, message",
    [("k = 1\nx = 2 * 3", "line 2: expected 'name = literal'"), ("import os", "line 1"), ("a.b = 1", "line 1")],
)
def test_a_parameters_cell_of_anything_but_literals_is_refused(tmp_path, source, message):
    cell = v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    with pytest.raises(ValueError, match=message):
        jobs.defaults(tmp_path / "x.ipynb")
    nbformat.write(v4.new_notebook(cells=[]), tmp_path / "x.ipynb")
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        jobs.defaults(tmp_path / "x.ipynb")


def test_given_values_take_the_place_of_the_defaults(tiny):
    given = {"k_checkpoints": 7, "zoo_lr": 1, "loops": [3], "flag": True}
    values = jobs.check(tiny, given)
    assert values == {**jobs.defaults(tiny), "k_checkpoints": 7, "zoo_lr": 1.0, "loops": [3.0], "flag": True}
    assert type(values["zoo_lr"]) is float and type(values["loops"][0]) is float


def test_every_setting_is_a_parameter_of_a_notebook_that_picks_its_recipe(unchecked):
    notebook = jobs.find("00")
    assert "input_mean" not in jobs.defaults(notebook)
    assert jobs.check(notebook, {"input_mean": [0.5], "weights": "w"}) == {**jobs.defaults(notebook), "input_mean": [0.5], "weights": "w"}
    with pytest.raises(ValueError, match="input_mean is 2.0: expected at least 0.0 and at most 1.0"):
        jobs.check(notebook, {"input_mean": [2.0]})
    with pytest.raises(ValueError, match="unknown parameter of 00_quickstart 'input_men': did you mean 'input_mean'"):
        jobs.check(notebook, {"input_men": [0.5]})


BAD = [
    ({"k_checkpoint": 7}, "unknown parameter of tiny 'k_checkpoint': did you mean 'k_checkpoints'?"),
    ({"samples": 7}, "unknown parameter of tiny 'samples'"),  # a setting that this notebook does not have
    ({"k_checkpoints": "many"}, "k_checkpoints is 'many'"),
    ({"k_checkpoints": 1}, "k_checkpoints is 1: expected at least 2"),
    ({"k_checkpoints": 2.5}, "k_checkpoints is 2.5"),
    ({"k_checkpoints": True}, "k_checkpoints is True"),
    ({"zoo_lr": float("nan")}, "zoo_lr is nan"),
    ({"dataset": 3}, "dataset is 3"),
    ({"loops": 3}, "loops is 3: expected a list"),
    ({"loops": ["a"]}, "loops is 'a'"),
    ({"loops": []}, "not empty"),
    ({"flag": 1}, "flag is 1"),
    ({"names": [1]}, "names is 1"),
]


@pytest.mark.parametrize("given, message", BAD)
def test_what_cannot_be_is_refused(tiny, unchecked, given, message):
    with pytest.raises(ValueError) as e:
        jobs.check(tiny, given)
    assert message in str(e.value)


def test_find(tiny, monkeypatch):
    quickstart = HERE / "notebooks" / "00_quickstart.ipynb"
    assert jobs.find("00_quickstart") == jobs.find("00") == jobs.find(str(quickstart)) == quickstart
    assert jobs.find(str(tiny)) == tiny
    for name in ("99", "nothing.ipynb", ""):
        monkeypatch.setattr(jobs, "NOTEBOOKS", tiny.parent if name == "" else jobs.NOTEBOOKS)
        (tiny.parent / "other.ipynb").touch()
        with pytest.raises(ValueError, match="expected one of .*" + ("tiny" if name == "" else "00_quickstart")):
            jobs.find(name)


@pytest.mark.parametrize(
    "args, message",
    [
        (["-p", "k_checkpoint", "7"], "did you mean 'k_checkpoints'?"),
        (["-p", "k_checkpoints", "many"], "k_checkpoints is 'many'"),
        (["-p", "k_checkpoints", "1"], "k_checkpoints is 1"),
        (["-p", "zoo_lr"], "expected -p name value"),
        (["-p", "flag", "true"], "flag is 'true' (str): expected bool (True or False)"),
        (["-p", "k_checkpoints=3", "5"], "expected a parameter's name"),
        (["-p", "zoo_lr", "nan"], "zoo_lr is nan"),
        (["-f", "absent.yaml"], "no parameter file 'absent.yaml'"),
        (["-f", "list.yaml"], "holds list"),
        (["-f", "broken.yaml"], "is not YAML"),
    ],
)
def test_a_wrong_request_is_one_line_and_starts_no_kernel(tiny, monkeypatch, capsys, args, message):
    (tiny.parent / "list.yaml").write_text("- 1\n")
    (tiny.parent / "broken.yaml").write_text("a: [1\n")
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("PDIFF_RUNS", str(tiny.parent / "runs"))
    monkeypatch.setattr(sys, "argv", ["pdiff", "run", "tiny.ipynb", *args])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert str(e.value.code).startswith("pdiff: ") and message in str(e.value.code)
    assert kernels(tiny) == 0 and not (tiny.parent / "runs").exists()


@pytest.mark.parametrize("text", ["[1", "{", "a: b: c"])
def test_a_value_that_is_no_yaml_is_one_line(tiny, monkeypatch, text):
    monkeypatch.setattr(sys, "argv", ["pdiff", "run", str(tiny), "-p", "loops", text])
    with pytest.raises(SystemExit, match="pdiff: .*loops"):
        cli.main()


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "no_such", "-p", "a", "1"], "notebook 'no_such': expected one of 00_quickstart"),
        (["run", "00", "-p", "k_checkpoint", "3"], "did you mean 'k_checkpoints'?"),
    ],
)
def test_the_command_itself_says_what_is_wrong_in_one_line(tmp_path, args, message):
    done = pdiff(tmp_path, *args)
    assert done.returncode != 0 and done.stdout == "" and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


HEAVY = {"torch", "torchvision", "timm", "plotly", "pandas", "numpy", "pyarrow", "nbformat", "papermill", "fsspec", "psutil"}


@pytest.mark.parametrize(
    "args, code, says",
    [
        (["--help"], 0, "Run a notebook with papermill"),
        (["data"], 0, "digits           10 classes"),
        (["run", "00_quickstart", "-p", "k_checkpoint", "5"], 1, "did you mean 'k_checkpoints'?"),
    ],
)
def test_what_computes_nothing_imports_nothing_heavy(tmp_path, monkeypatch, args, code, says):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # names every module that is imported, on stderr
    done = pdiff(tmp_path, *args)
    assert done.returncode == code and says in done.stdout + done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pdiff_lib.batches.jobs" in imported and HEAVY & imported == set()


def test_data_lists_every_dataset(capsys):
    cli.data()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [row["name"] for row in data.catalogue()]
    digits = lines[0].split()
    assert digits[:5] == ["digits", "10", "classes", "8x8", "present:"]


@pytest.fixture
def here(tiny, monkeypatch, capsys):
    """The command in this process (without seconds of imports); returns what it printed."""
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("PDIFF_RUNS", str(tiny.parent / "runs"))
    monkeypatch.delenv("PDIFF_RUN_DIR", raising=False)

    def command(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pdiff", "run", "tiny.ipynb", *args])
        with pytest.raises(SystemExit) as e:
            cli.main()
        if e.value.code:
            raise RuntimeError(e.value.code)
        return capsys.readouterr().out

    return command


def folders(notebook: Path) -> list[Path]:
    return sorted(p for p in (notebook.parent / "runs" / notebook.stem).glob("*") if p.is_dir())


def test_a_run_from_start_to_force(tiny, here):
    first = pdiff(tiny.parent, "run", tiny, "-p", "k_checkpoints", "7")
    assert first.returncode == 0, first.stderr
    (folder,) = folders(tiny)
    executed = nbformat.read(folder / "tiny.ipynb", as_version=4)
    assert "widgets" not in executed.metadata and f"folder {folder}" in executed.cells[3].outputs[0].text
    record = json.loads((folder / "record.json").read_text())
    assert record["numbers"] == {"k": 7, "loops": 3.0} and {p.name for p in folder.iterdir()} == {
        "tiny.ipynb",
        "record.json",
        "parameters.yaml",
    }

    assert "already complete" in here("-p", "k_checkpoints", "7") and kernels(tiny) == 1
    assert "already complete" not in here("-p", "k_checkpoints", "7", "--force")
    assert kernels(tiny) == 2 and folders(tiny) == [folder]

    (tiny.parent / "p.yaml").write_text("k_checkpoints: 9\nzoo_lr: 1e-3\n")  # 1e-3 is text to YAML 1.1
    here("-f", "p.yaml", "-p", "k_checkpoints", "8")
    (other,) = set(folders(tiny)) - {folder}
    assert json.loads((other / "record.json").read_text())["numbers"]["k"] == 8 and kernels(tiny) == 3


def test_progress_bars_leave_no_state_behind(tiny, here):
    nb = nbformat.read(tiny, as_version=4)
    nb.cells[-1].source = "import ipywidgets\nipywidgets.IntProgress()"
    nbformat.write(nb, tiny)
    here("--record")
    (folder,) = folders(tiny)
    executed, recorded = (nbformat.read(p, as_version=4) for p in (folder / "tiny.ipynb", tiny))
    assert "application/vnd.jupyter.widget-view+json" in executed.cells[-1].outputs[0].data  # there was a widget
    assert "widgets" not in executed.metadata and "widgets" not in recorded.metadata and not recorded.cells[-1].outputs


@pytest.mark.parametrize("message, error", [("Kernel died before replying to kernel_info", jobs.Died), ("something else", RuntimeError)])
def test_a_kernel_that_never_began_has_died(tiny, monkeypatch, message, error):
    def execute(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setenv("PDIFF_RUNS", str(tiny.parent / "runs"))
    monkeypatch.setattr("papermill.execute_notebook", execute)
    with pytest.raises(error) as raised:
        jobs.execute(jobs.plan(tiny, {}), progress=False)
    assert type(raised.value) is error


def test_a_cell_that_fails(tiny):
    failed = pdiff(tiny.parent, "run", tiny, "-p", "fail", "1")
    assert failed.returncode == 1 and "pdiff: ZeroDivisionError" in failed.stderr and "Traceback" not in failed.stderr
    (folder,) = folders(tiny)
    assert not (folder / "tiny.ipynb").exists()
    kept = nbformat.read(folder / "unfinished-tiny.ipynb", as_version=4)
    assert any("ZeroDivisionError" in "".join(o.get("traceback", [])) for c in kept.cells for o in c.get("outputs", []))
    assert str(folder / "unfinished-tiny.ipynb") in failed.stderr


def test_record_keeps_the_outputs_in_the_notebook(tiny, here):
    before = nbformat.read(tiny, as_version=4)
    here("--record")
    after = nbformat.read(tiny, as_version=4)
    assert [c.source for c in after.cells] == [c.source for c in before.cells]
    assert [c.metadata for c in after.cells] == [c.metadata for c in before.cells]  # tags, and no trace of papermill
    assert [c.execution_count for c in after.cells if c.cell_type == "code"] == [1, 2, 3, 4]
    last = after.cells[-1].outputs[0]
    assert last.data["text/plain"] == "10" and last.execution_count == 4 and after.metadata == before.metadata
    assert "already complete" in here() and kernels(tiny) == 1  # outputs are no change


def test_record_of_other_parameters_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(jobs, "execute", lambda *a: None)
    monkeypatch.setattr(jobs, "record", lambda *a: None)
    monkeypatch.setenv("PDIFF_RUNS", str(tiny.parent / "runs"))
    with pytest.raises(ValueError, match="record"):
        cli.run(str(tiny), [], ["k_checkpoints=7"], record=True)


def test_plain_papermill_works_too(tiny):
    done = pdiff(tiny.parent, tiny, "out.ipynb", "-p", "k_checkpoints", "6", module="papermill")
    assert done.returncode == 0, done.stderr
    (folder,) = folders(tiny)
    assert (
        folder.name == runs.digest({"k": 6}) and json.loads((folder / "record.json").read_text())["numbers"]["k"] == 6
    )
