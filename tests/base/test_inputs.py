"""inputs.py and what is built on it: another content is another run, wherever it comes from; the same is the same."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import v4

from pdiff_lib.base import inputs, runs
from pdiff_lib.batches import cli, cluster, jobs, results, sweep

PARAMETERS = """dataset = "ds"
network = "resnet18"
weights = ""
k_checkpoints = 5
table = ""             # the notebook's own
rows = {}
later = \"\""""
READ = """from pathlib import Path
from pdiff_lib.base import runs
run = runs.Run("reads", {"dataset": dataset, "k_checkpoints": k_checkpoints, "rows": rows})
if later:
    exec(later)
files = sorted(p for p in Path(dataset).rglob("*") if p.is_file())
run.record({"read": [f"{p.relative_to(dataset)} {p.read_text()}" for p in files]})"""


def notebook(folder: Path, code: str = READ) -> Path:
    cells = [v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), v4.new_code_cell(code)]
    folder.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells), folder / "reads.ipynb")
    return folder / "reads.ipynb"


def classes(folder: Path, cat: str = "cat's", dog: str = "dog's") -> Path:
    """Two class folders with files of equal size and age."""
    for name, text in (("cat", cat), ("dog", dog)):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "1.png").write_text(text)
        os.utime(folder / "train" / name / "1.png", (1e9, 1e9))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("PDIFF_RUN_DIR", "PDIFF_STORAGE", "PDIFF_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def at_once(monkeypatch) -> list[str]:
    """Notebooks run in this process, which takes no second; returns what was made, a name per run."""
    made = []

    def papermill(job, _progress):
        made.append(job.folder.name)
        read, here = nbformat.read(job.notebook, as_version=4), Path.cwd()
        with monkeypatch.context() as m:
            m.setenv("PDIFF_RUN_DIR", str(job.folder))
            os.chdir(job.base)
            try:
                exec("\n".join(c.source for c in read.cells[1:]), dict(job.values))
            finally:
                os.chdir(here)
        nbformat.write(read, job.unfinished)

    monkeypatch.setattr(jobs, "_papermill", papermill)
    return made


@pytest.fixture
def pdiff(monkeypatch, capsys):
    def command(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["pdiff", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        if e.value.code:
            raise RuntimeError(e.value.code)
        return capsys.readouterr().out

    return command


def swap(folder: Path) -> None:
    a, b = folder / "train" / "cat", folder / "train" / "dog"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def edit(folder: Path) -> None:
    """As `cp -p` of another file of the same size: the time of the content is the old one."""
    (folder / "train" / "cat" / "1.png").write_text("CAT'S")
    os.utime(folder / "train" / "cat" / "1.png", (1e9, 1e9))


def swap_files(folder: Path) -> None:
    a, b = folder / "train" / "cat" / "1.png", folder / "train" / "dog" / "1.png"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


CHANGES = [swap, swap_files, edit, lambda f: (f / "train" / "cat" / "1.png").rename(f / "train" / "cat" / "2.png"),
           lambda f: (f / "train" / "cat" / "1.png").unlink(), lambda f: (f / "train" / "cat" / "2.png").write_text(""),
           lambda f: (f / "train" / "cow").mkdir(), lambda f: (f / "train" / "cow").symlink_to(f / "train" / "cat"),
           lambda f: (f / "train" / "cat").rename(f / "cat"), lambda f: (f / "train" / "cat" / "1.png").write_text("cat's\n")]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_folder_is_seen(home, monkeypatch, change, kept):
    monkeypatch.setattr(inputs, "JUST_NOW", -1e9 if kept else 1e12)
    folder = classes(home / "ds")
    before = inputs.digest(folder)
    assert bool(list(home.glob("runs/inputs/*"))) is kept  # with a digest kept it is the times that tell, else the content
    time.sleep(0.02)  # longer than a tick of the clock of the file system
    change(folder)
    assert inputs.digest(folder) != before


def test_what_changes_no_content_changes_no_digest(home, monkeypatch):
    monkeypatch.setattr(inputs, "JUST_NOW", -1e9)
    read, content = [], inputs._content
    monkeypatch.setattr(inputs, "_content", lambda p: read.append(p) or content(p))
    folder, elsewhere = classes(home / "ds"), classes(home / "elsewhere")
    before = inputs.digest(folder)
    assert inputs.digest(folder) == before and len(read) == 2, "the second time from what was kept"
    assert inputs.digest(elsewhere) == before
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / ".ipynb_checkpoints" / "1.png").write_text("x")
    (folder / ".DS_Store").write_text("x")
    (folder / "runs").mkdir()
    (folder / "runs" / "record.json").write_text("{}")
    monkeypatch.setenv("PDIFF_RUNS", str(folder / "runs"))
    (folder / "train" / "cat" / "1.png").touch()
    (folder / "train" / "cat" / "again").symlink_to(folder / "train")  # has no end
    looped = inputs.digest(folder)
    (folder / "train" / "cat" / "again").unlink()
    assert looped != before == inputs.digest(folder)
    for damaged in folder.glob("runs/inputs/*"):
        damaged.write_text("{")
    assert inputs.digest(folder) == before


def test_a_file_that_may_still_change_within_a_tick_is_read_again(home):
    (home / "w").write_text("1")
    inputs.digest(home / "w")
    assert not (home / "runs").exists()
    os.utime(home / "w", (time.time() + 1e6,) * 2)  # a clock that is ahead
    inputs.digest(home / "w")
    assert not (home / "runs").exists()


def folder_of(path: Path, **given) -> Path:
    return jobs.plan(path, given).folder


def test_every_way_to_name_a_file_identifies_it(home, monkeypatch):
    nb, data = notebook(home), home / "data"
    monkeypatch.setenv("PDIFF_DATA", "data")
    data.mkdir()
    (home / "a,b").mkdir()
    classes(home / "ds")
    for name in ("w.safetensors", "t.parquet", "a-train.parquet", "a-test.parquet", "data/cifar10-train.parquet",
                 "data/cifar10-test.parquet", "data/imagenet", "a,b/train.parquet"):
        (home / name).write_text("1")
    ways = {"ds": {}, "w.safetensors": {"weights": "w.safetensors"}, "t.parquet": {"table": "t.parquet"},
            "a-test.parquet": {"dataset": "a-train.parquet, a-test.parquet"},
            "a,b/train.parquet": {"dataset": "a,b/train.parquet,a-test.parquet"},
            "data/cifar10-test.parquet": {"dataset": "cifar10"}, "data/imagenet": {"dataset": "imagenet"}}
    ways = {**ways, "./w.safetensors": {"rows": {"other": {"weights": "w.safetensors"}}},
            "./t.parquet": {"rows": {"many": ["x", {"own": "t.parquet"}]}},
            "./data/cifar10-train.parquet": {"rows": {"a": {"dataset": "cifar10"}}}}
    for name, given in ways.items():
        first = folder_of(nb, **given)
        assert folder_of(nb, **given) == first
        file = home / name / "train" / "cat" / "1.png" if name == "ds" else home / name
        was = file.read_text()
        file.write_text("2")
        assert folder_of(nb, **given) != first, name
        file.write_text(was)
        assert folder_of(nb, **given) == first, name
    other = home / "other"
    shutil.copytree(data, other)
    same = folder_of(nb, dataset="cifar10")
    monkeypatch.setenv("PDIFF_DATA", str(other))
    assert folder_of(nb, dataset="cifar10") == same  # the same content, elsewhere
    (other / "cifar10-train.parquet").write_text("2")
    assert folder_of(nb, dataset="cifar10") != same


def test_what_is_no_file_is_no_input(home, monkeypatch):
    """Nor what torchvision downloads, and checks: the names of settings, words, and what lies around."""
    nb, data = notebook(home), home / "data"
    monkeypatch.setenv("PDIFF_DATA", str(data))
    for name in ("resnet18", "digits", "data/cifar10-batches-py"):
        (home / name).mkdir(parents=True)
    for given in ({"dataset": "digits"}, {"dataset": ""}, {"dataset": "digits", "table": "absent.csv"},
                  {"dataset": "digits", "table": "x" * 5000}, {"dataset": "digits", "table": "a\0b"}, {"dataset": "cifar10"},
                  *({"dataset": "digits", "table": text} for text in (".", "/", "..", "~", " ", "/..", str(home.parent)))):
        assert jobs.plan(nb, given).inputs == {}, given


def test_tables_are_meant_from_the_project_too(home):
    nb = notebook(home)
    found = jobs.plan(nb, {"dataset": "digits", "table": "figures/cifar10-k-results.parquet"}).inputs
    assert list(found["table"]) == [str(jobs.NOTEBOOKS.parent / "figures" / "cifar10-k-results.parquet")]


def test_a_module_beside_is_part_of_a_run(home):
    nb = notebook(home, "import mine, torch\nfrom package.part import x\nimport absent")
    classes(home / "ds")
    (home / "package").mkdir()
    for name in ("mine.py", "package/__init__.py", "package/part.py"):
        (home / name).write_text("x = 1")
    seen = {folder_of(nb)}
    for name in ("mine.py", "package/part.py"):
        (home / name).write_text("x = 2")
        seen.add(folder_of(nb))
    assert len(seen) == 3
    (home / "package" / "__pycache__").mkdir()
    (home / "package" / "__pycache__" / "part.pyc").write_text("x")
    assert folder_of(nb) in seen


def test_the_papers_tables_are_part_of_the_library(monkeypatch, tmp_path):
    copy = shutil.copytree(Path(jobs.__file__).parents[1], tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(jobs, "__file__", str(copy / "batches" / "jobs.py"))
    before = jobs._library.__wrapped__()
    file = next(copy.rglob("*.csv"))
    file.write_text(file.read_text() + "\n")
    assert jobs._library.__wrapped__() != before


def test_exchanged_classes_are_another_run_and_it_is_said_why(home, at_once, pdiff):
    nb = notebook(home)
    classes(home / "ds")
    assert "making it again" not in pdiff("run", nb)
    first = folder_of(nb)
    assert "already complete" in pdiff("run", nb) and len(at_once) == 1
    swap(home / "ds")
    said = pdiff("run", nb)
    assert f"{home / 'ds'} changed since run {first.name}: making it again" in said and len(at_once) == 2
    records = [home / "runs" / "reads" / name / "record.json" for name in at_once]
    numbers = [json.loads(record.read_text())["numbers"]["read"] for record in records]
    assert numbers == [["train/cat/1.png cat's", "train/dog/1.png dog's"], ["train/cat/1.png dog's", "train/dog/1.png cat's"]]
    told = yaml.safe_load((folder_of(nb) / "inputs.yaml").read_text())
    assert told == {"dataset": {str(home / "ds"): inputs.digest(home / "ds")}}
    swap(home / "ds")
    assert f"already complete: {first}" in pdiff("run", nb) and len(at_once) == 2


def test_one_name_in_two_working_folders(home, at_once, pdiff, monkeypatch):
    nb = notebook(home)
    classes(home / "a" / "ds")
    classes(home / "b" / "ds", dog="hot-d")
    for place in "ab":
        monkeypatch.chdir(home / place)
        said = pdiff("run", nb)
    assert len(set(at_once)) == 2 and f"{home / 'b' / 'ds'} (dataset) is another than {home / 'a' / 'ds'} since run" in said
    classes(home / "c" / "ds")
    monkeypatch.chdir(home / "c")
    assert "already complete" in pdiff("run", nb), "what is in a/ds is in c/ds"


def test_a_file_that_changes_under_a_run(home, at_once, pdiff):
    nb = notebook(home)
    classes(home / "ds")
    with pytest.raises(RuntimeError, match=f"dataset: {home / 'ds'} changed while the run was at work"):
        pdiff("run", nb, "-p", "later", "Path('ds/train/cat/1.png').write_text('new')")
    assert not list(home.glob("runs/reads/*/reads.ipynb"))
    job = jobs.plan(nb, {})
    swap(home / "ds")
    with pytest.raises(ValueError, match="changed after the run was planned"):
        jobs.execute(job)
    job = jobs.plan(nb, {})
    notebook(home, READ + "\n1")
    with pytest.raises(ValueError, match="reads.ipynb or the library changed after the run was planned"):
        jobs.execute(job)
    assert len(at_once) == 1


def test_a_notebook_that_shows_others_results_says_when_there_are_newer(home, at_once, pdiff):
    nb = notebook(home, "shown = 'results.records(...)'")
    classes(home / "ds")
    job = jobs.plan(nb, {})
    pdiff("run", nb)
    os.utime(job.done, (time.time() + 1e6,) * 2)  # the committed ones are as new as the checkout
    assert "newer" not in pdiff("run", nb)
    other = home / "runs" / "other" / "x"
    other.mkdir(parents=True)
    (other / "record.json").write_text("{}")
    os.utime(other / "record.json", (time.time() + 2e6,) * 2)
    assert "1 of the records there are now are newer" in pdiff("run", nb)


def grid_of(home: Path, nb: Path) -> Path:
    (home / "grid.yaml").write_text(yaml.safe_dump({"notebook": str(nb), "grid": {"k_checkpoints": list(range(5, 25))}}))
    return home / "grid.yaml"


def test_a_sweep_looks_at_each_input_once(home, monkeypatch):
    looked, digest = [], inputs.digest
    monkeypatch.setattr(inputs, "digest", lambda p: looked.append(p) or digest(p))
    nb = notebook(home)
    classes(home / "ds")
    assert len(sweep.load(grid_of(home, nb)).jobs) == 20 and looked == [home / "ds"]


def test_a_table_holds_no_runs_over_other_files(home, at_once):
    nb = notebook(home)
    classes(home / "ds")
    grid = sweep.load(grid_of(home, nb))
    for job in grid.jobs[:2]:
        jobs.execute(job)
    assert results.collect(grid).attrs["present"] == 2
    for job in grid.jobs[:2]:  # as if other code had made them: only the values, and what they say of their inputs, tell
        job.folder.rename(job.folder.with_name(job.folder.name[::-1]))
    assert results.collect(grid).attrs["present"] == 2
    swap(home / "ds")
    swapped = sweep.load(grid.path)
    with pytest.raises(ValueError, match="no run of"):
        results.collect(swapped)
    jobs.execute(swapped.jobs[0])
    assert results.collect(swapped).attrs["present"] == 1 and results.collect(grid).attrs["present"] == 2
    for told in home.glob("runs/reads/*/inputs.yaml"):  # as plain papermill leaves them: the record tells
        told.unlink()
    assert results.collect(swapped).attrs["present"] == 1 and results.collect(grid).attrs["present"] == 2


def test_a_command_that_is_executed_too_late_completes_nothing(home, at_once):
    nb = notebook(home)
    job = jobs.plan(nb, {"dataset": str(classes(home / "ds"))})
    swap(home / "ds")
    job.folder.mkdir(parents=True)
    jobs._papermill(job, False)  # as the line does: into the folder that was planned
    job.unfinished.rename(job.done)
    assert not jobs.complete(job)
    swap(home / "ds")
    assert jobs.execute(job) and jobs.complete(job) and len(at_once) == 2


def test_a_run_outside_of_pdiff_has_a_folder_per_content(home):
    classes(home / "ds")
    first = runs.Run("x", {"dataset": "ds"}).folder
    swap(home / "ds")
    assert runs.Run("x", {"dataset": "ds"}).folder != first
    swap(home / "ds")
    assert runs.Run("x", {"dataset": "ds"}).folder == first


def test_the_shared_storage_gives_out_what_was_made_of_the_same(home, at_once, monkeypatch):
    nb = notebook(home)
    classes(home / "ds")
    monkeypatch.setenv("PDIFF_STORAGE", str(home / "shared"))
    jobs.execute(jobs.plan(nb, {}))
    monkeypatch.setenv("PDIFF_RUNS", str(home / "another-machine"))
    assert jobs.complete(jobs.plan(nb, {})) and (jobs.plan(nb, {}).folder / "inputs.yaml").is_file()
    swap(home / "ds")
    assert not jobs.complete(jobs.plan(nb, {}))


def test_a_node_with_other_files_refuses(home, at_once, monkeypatch):
    nb = notebook(home)
    job = jobs.plan(nb, {"dataset": str(classes(home / "ds"))})
    task = str(nb), job.values, str(home), inputs.digests(job.inputs), job.folder.name, 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert cluster._task(*task, False)[1] == "" and len(at_once) == 1
    assert cluster._task(*task, False)[1] == "" and len(at_once) == 1
    assert cluster._task(*task, True)[1] == "" and len(at_once) == 2
    swap(home / "ds")
    assert "other files than the machine of the sweep for dataset" in cluster._task(*task, False)[1]
    shutil.rmtree(home / "ds")
    assert "other files than the machine of the sweep for dataset" in cluster._task(*task, False)[1] and len(at_once) == 2


def test_force_makes_a_sweep_again(home, at_once, monkeypatch, pdiff):
    nb = notebook(home)
    classes(home / "ds")
    grid, made = grid_of(home, nb), []

    def here(_sweep, todo, _workers, _gpu_share, _cpus, force):  # without processes
        for job in todo:
            made.append(jobs.execute(job, force))
            yield job, ""

    monkeypatch.setattr(sweep, "_here", here)
    pdiff("sweep", grid)
    pdiff("sweep", grid)
    assert len(at_once) == 20
    assert "20 runs, 0 of them complete" in pdiff("sweep", grid, "--force") and len(at_once) == 40
