"""sweep.py: a grid is checked before anything starts; what is killed goes on; each run ends once; the table of what is there."""

import ctypes
import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from faults import harness

from pdiff_lib.base import runs, storage
from pdiff_lib.batches import cli, jobs, results, sweep

QUICKSTART = jobs.NOTEBOOKS / "00_quickstart.ipynb"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("PDIFF_RUN_DIR", raising=False)
    monkeypatch.delenv("PDIFF_STORAGE", raising=False)
    return tmp_path


def written(folder: Path, **content) -> Path:
    (folder / "x.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "x.yaml"


def test_a_grid_is_every_combination_over_the_base(home):
    (home / "base.yaml").write_text("zoo_lr: 1e-3\nsamples: 7\n")
    (home / "sub").mkdir()
    file = written(home / "sub", notebook="00", base="../base.yaml", parameters={"samples": 9},
                   grid={"k_checkpoints": [10, 50], "sigma_z": [0, "1e-1"]}, seeds=[3, 4])
    grid = sweep.load(file)
    varied = ["k_checkpoints", "sigma_z", "seed", "pdiff_seed"]
    assert grid.varied == varied and len(grid.jobs) == 8 == len({j.folder for j in grid.jobs})
    assert [tuple(j.values[n] for n in varied) for j in grid.jobs] == [
        (k, z, s, s) for k in (10, 50) for z in (0.0, 0.1) for s in (3, 4)]
    assert {(j.values["zoo_lr"], j.values["samples"], j.values["dataset"]) for j in grid.jobs} == {(1e-3, 9, "digits")}
    assert grid.label(grid.jobs[0]) == "k_checkpoints=10 sigma_z=0.0 seed=3 pdiff_seed=3"
    assert grid.jobs[0] == jobs.plan(QUICKSTART, {"zoo_lr": 1e-3, "samples": 9, "k_checkpoints": 10, "sigma_z": 0.0, "seed": 3,
                                                  "pdiff_seed": 3})


@pytest.mark.parametrize("file", sorted((jobs.NOTEBOOKS.parent / "params" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_committed_sweeps_can_be_run(file):
    assert len(sweep.load(file).jobs) > 1


GOOD = {"notebook": "00", "grid": {"k_checkpoints": [10]}}


@pytest.mark.parametrize("change, message", [
    ({"grids": {}}, "unknown key 'grids': did you mean 'grid'?"),
    ({"notebook": None}, "notebook is None: expected a notebook's name"),
    ({"notebook": "99"}, "notebook '99': expected one of 00_quickstart"),
    ({"grid": {"k_checkpoint": [10]}}, "unknown parameter of 00_quickstart 'k_checkpoint'"),
    ({"grid": {"k_checkpoints": [10, "many"]}}, "k_checkpoints is 'many'"),
    ({"grid": {"k_checkpoints": [10, 1]}}, "k_checkpoints is 1: expected at least 2"),
    ({"grid": {"k_checkpoints": []}}, "k_checkpoints is []: expected a list of values, not empty"),
    ({"grid": {"k_checkpoints": 10}}, "k_checkpoints is 10: expected a list"),
    ({"grid": {"k_checkpoints": [10, 50, 10]}}, "{'k_checkpoints': 10} is in the grid twice"),
    ({"grid": {"sigma_z": [0, 0.0]}}, "is in the grid twice"),
    ({"grid": ["k_checkpoints"]}, "grid is ['k_checkpoints']: expected 'name: value' lines"),
    ({"grid": {}}, "expected a grid, or seeds"),
    ({"seeds": 3}, "seeds is 3: expected a list"),
    ({"seeds": [0, 0]}, "twice"),
    ({"seeds": [-1]}, "seed is -1: expected at least 0"),
    ({"parameters": {"k_checkpoints": 10}}, "k_checkpoints is in the grid and in parameters"),
    ({"parameters": {"samples": "a"}}, "samples is 'a'"),
    ({"base": "absent.yaml"}, "no parameter file"),
])
def test_a_grid_that_cannot_be_run_is_refused(home, change, message):
    with pytest.raises(ValueError) as e:
        sweep.load(written(home, **GOOD | change))
    assert message in str(e.value) and not (home / "runs").exists()


def test_seeds_of_a_notebook_without(home):
    cell = nbformat.v4.new_code_cell("k_checkpoints = 10", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), home / "none.ipynb")
    with pytest.raises(ValueError, match="none has no parameter seed or pdiff_seed"):
        sweep.load(written(home, notebook=str(home / "none.ipynb"), seeds=[0]))


@pytest.mark.parametrize("how, message", [({"workers": -1}, "workers is -1"), ({"gpu_share": 0}, "gpu_share is 0"),
                                          ({"cpus": -2}, "cpus is -2"), ({"storage_url": "no://where"}, "storage 'no://where'")])
def test_how_is_checked_too(home, how, message):
    with pytest.raises(ValueError, match=message):
        sweep.run(sweep.load(written(home, **GOOD)), **how)


def test_each_gpu_has_a_name(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert sweep._devices() == ["5", "GPU-ab"]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_a_killed_worker_and_a_killed_kernel_are_made_good(tmp_path):
    s = harness.Sweep(tmp_path, [2, 3], [0], seconds=2)
    process = s.start("--workers", "2")
    s.wait_for(1)
    time.sleep(0.7)
    harness.kill(s.at_work())
    s.wait_for(2)
    assert int(s.lines("start")[1].split()[3]) > 0, "the other run took the stage over, from its checkpoint"
    harness.kill(s.at_work().parent())
    assert process.wait(120) == 0, s.said()
    assert s.losses() == s.again() == [] and s.said().count("killed; it goes on") == 2


def test_a_killed_sweep_takes_its_workers_along_and_goes_on_when_started_again(tmp_path, monkeypatch, capsys):
    s = harness.Sweep(tmp_path, [2, 3], [0], seconds=1.5)
    process = s.start("--workers", "2")
    s.wait_for(1, "end")
    s.wait_for(2)  # a stage is whole, and another at work
    time.sleep(0.4)
    children = psutil.Process(process.pid).children(recursive=True)
    harness.kill(process)
    process.wait()
    assert children and gone(children)
    begun = len(s.lines("start"))
    code, said = s.finish("--workers", "2")
    assert code == 0 and s.losses() == s.again() == [], said
    assert int(s.lines("start")[begun].split()[3]) > 0, "it goes on from its checkpoint"
    monkeypatch.setenv("PDIFF_RUNS", str(s.runs))
    assert [o.error for o in sweep.run(sweep.load(s.file))] == ["", ""] and s.losses() == s.again() == []
    assert "2 runs, 2 of them complete" in capsys.readouterr().out


def test_two_sweeps_over_one_grid(tmp_path):
    s = harness.Sweep(tmp_path, [2, 3], [0], seconds=0.5)
    both = [s.start("--workers", "1"), s.start("--workers", "1")]
    assert [p.wait(180) for p in both] == [0, 0], s.said()
    assert s.losses() == s.again() == []


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    s = harness.Sweep(tmp_path, [2, 3], [0], seconds=0.1, fail_at=2)
    code, said = s.finish("--workers", "1")
    assert code == 1 and "1 of 2 runs failed:\n  k_checkpoints=2 seed=0: AssertionError in cell" in said and "asked to" in said
    assert s.lines("run") == ["run 0 3"]
    (left,) = s.runs.glob("faulty/*/unfinished-faulty.ipynb")
    text = left.read_text()
    assert "asked to fail" in text and "Traceback" in text and str(left) in said

    monkeypatch.setenv("PDIFF_RUNS", str(s.runs))  # the table of those that are there
    table = results.collect(sweep.load(s.file))
    assert table.attrs["present"] == 1 and table.attrs["missing"] == ["k_checkpoints=2 seed=0"]
    assert table.attrs["other_code"] == 0 and list(table["k_checkpoints"]) == [3] and list(table["sum"]) == [harness.SUM * 4]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MB, in this process's tree alone where it is allowed to be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=5m"):
        pytest.skip(f"this user may not mount a file system: {os.strerror(ctypes.get_errno())}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, small_disk):
    s = harness.Sweep(tmp_path / "sweep", [2, 3], [0], seconds=0.5, runs=small_disk)
    process = s.start("--workers", "1")
    s.wait_for(1, "run")
    s.wait_for(3, "start")  # the second run's own stage
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    assert process.wait(120) == 1 and "1 of 2 runs failed" in s.said() and "No space left on device" in s.said(), s.said()
    (whole,) = small_disk.glob("faulty/*/faulty.ipynb")
    nbformat.validate(nbformat.read(whole, as_version=4))
    assert all(runs.read(p) for p in small_disk.rglob("*.safetensors") if "partial" not in p.name)
    filler.unlink()
    code, said = s.finish("--workers", "1")
    assert code == 0 and "2 runs, 1 of them complete" in said and s.losses() == s.again() == []


def test_a_dry_run_prints_commands_that_do_the_same(tmp_path, monkeypatch, capsys):
    s = harness.Sweep(tmp_path, [2, 3], [0], seconds=0.1)
    code, said = s.finish("--dry-run")
    lines = said.splitlines()
    assert code == 0 and len(lines) == 2 and not s.runs.exists()
    assert all(" papermill " in line and "PDIFF_RUN_DIR=" in line for line in lines)
    environment = s.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", lines[1]], check=True, env=environment, capture_output=True, timeout=120)
    monkeypatch.setenv("PDIFF_RUNS", str(s.runs))
    table = results.collect(sweep.load(s.file))
    assert list(table["k_checkpoints"]) == [3] and table.attrs["missing"] == ["k_checkpoints=2 seed=0"]
    todo = []  # what a sweep would still make
    monkeypatch.setattr(sweep, "_here", lambda grid, runs, *how: ((todo.append(grid.label(run)) or run, "") for run in runs))
    sweep.run(sweep.load(s.file))
    assert todo == ["k_checkpoints=2 seed=0"] and "2 runs, 1 of them complete" in capsys.readouterr().out


def test_what_one_machine_made_another_fetches(tmp_path):
    url = f"file://{tmp_path / 'shared'}"
    here = harness.Sweep(tmp_path / "here", [2], [0], seconds=0.1)
    assert here.finish("--storage", url, "--workers", "1")[0] == 0 and here.losses() == here.again() == []
    there = harness.Sweep(tmp_path / "here", [2, 3], [0], seconds=0.1, runs=tmp_path / "there")
    code, said = there.finish("--storage", url, "--workers", "1")
    assert code == 0 and "2 runs, 1 of them complete" in said
    # Nothing was computed twice: the shared stage came from there too; the own stage of the fetched run was not needed.
    assert [x for x in there.losses() if not x.startswith("2 files of stages")] == []
    assert not [p for p in (tmp_path / "shared").rglob(".*")], "nothing half-written is left"


def test_a_storage_that_fails_later_costs_nothing(home, monkeypatch):
    (home / "runs").mkdir()
    runs.write_text(home / "runs" / "a", "x")
    monkeypatch.setenv("PDIFF_STORAGE", "no://where")
    with pytest.warns(UserWarning, match="storage no://where: ValueError.*going on with what is on this machine"):
        assert storage.push(home / "runs" / "a") is False
    with pytest.warns(UserWarning):
        assert storage.fetch(home / "runs" / "b") is False


def frame(k: int) -> pd.DataFrame:
    return pd.DataFrame({"method": ["original", "p-diff", "p-diff"], "index": [0, 0, 1], "accuracy": [0.5, k / 100, 0.9],
                         "max_similarity": [0.9, 0.5, 0.7], "nearest": 0, "distance": 1.0, "outside_span": 0.0})


def test_results_have_a_row_per_network_and_take_the_newest(home, monkeypatch, capsys):
    grid = sweep.load(written(home, **GOOD | {"grid": {"k_checkpoints": [10, 20, 30], "ae_channels": [[8, 16]]}}))
    with pytest.raises(ValueError, match="no run of .* is present"):
        results.collect(grid)
    for job, folder in ((grid.jobs[0], grid.jobs[0].folder), (grid.jobs[1], grid.jobs[1].folder.with_name("older-code")),
                        (grid.jobs[1], grid.jobs[1].folder)):
        monkeypatch.setenv("PDIFF_RUN_DIR", str(folder))
        runs.Run("00_quickstart", job.values).record({"x": 1}, networks=frame(job.values["k_checkpoints"]))
        (folder / "parameters.yaml").write_text(yaml.safe_dump(job.values))
        time.sleep(1.1 if folder.name == "older-code" else 0)  # the record's time is in seconds
    table = results.collect(grid)
    assert len(table) == 6 and table.attrs["present"] == 2 and table.attrs["other_code"] == 0
    assert table.attrs["missing"] == [grid.label(grid.jobs[2])] and set(table["ae_channels"]) == {"[8, 16]"}
    assert table.attrs["title"] == "resnet18, digits, 32 px, last_norms:2"
    assert set(table[table.k_checkpoints == 20]["run"]) == {grid.jobs[1].folder.name}
    (grid.jobs[1].folder / "record.json").unlink()
    assert results.collect(grid).attrs["other_code"] == 1

    line = results.summary(table).loc[(10, "[8, 16]", "p-diff")]
    assert (line["n"], line["mean"], line["best"], line["max_similarity"]) == (2, 0.5, 0.9, 0.6)
    assert line["std"] == pytest.approx(0.4)
    parquet, csv = results.save(table, home / "t" / "x.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), table)
    assert pd.read_parquet(parquet).attrs == table.attrs and len(pd.read_csv(csv)) == 6
    pd.testing.assert_frame_equal(results.table(parquet), table)
    assert len(results.table(grid.path)) == 6
    with pytest.raises(ValueError, match="no table of results 'absent.parquet'"):
        results.table("absent.parquet")

    monkeypatch.setattr(sys, "argv", ["pdiff", "results", str(grid.path)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    said = capsys.readouterr().out
    assert not e.value.code and "2 of 3 runs are present; 1 of them were made by another version of the code" in said
    assert sorted(p.name for p in (home / "runs" / "sweeps").iterdir()) == ["x.csv", "x.parquet"]


@pytest.mark.alone
def test_two_nodes_of_a_cluster_of_which_one_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # or the cluster notices only after a quarter of a minute
    from ray.cluster_utils import Cluster

    s = harness.Sweep(tmp_path, [2], [0, 1], seconds=2)
    monkeypatch.setenv("PYTHONPATH", s.environment["PYTHONPATH"])  # of the nodes' workers
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        process = s.start("--ray", cluster.address, "--cpus", "1")
        s.wait_for(2)  # a run on each node
        cluster.remove_node(second, allow_graceful=False)
        assert process.wait(180) == 0, s.said()
    finally:
        cluster.shutdown()
    assert s.losses() == s.again() == [] and "2 runs, 0 of them complete" in s.said()
    assert s.said().count("Ray gives none of the cluster's 2 GPUs to runs that ask for none") == 1
    pids = [line.split()[-1] for line in s.lines("start")]
    assert len(set(pids)) > 2 and len(pids) > len(s.lines("end")), "a stage was begun, lost with its node and made again"


@pytest.mark.parametrize("there, gpus, warned", [(2, 0.0, True), (2, 0.5, False), (0, 0.0, False)])
def test_gpus_that_no_run_asks_for_are_said_once(home, monkeypatch, there, gpus, warned):
    class Ray(types.ModuleType):  # as the real one, as far as it is asked
        exceptions = types.SimpleNamespace(RayError=RuntimeError)

        def __getattr__(self, name):
            return {"cluster_resources": lambda: {"CPU": 2.0, **({"GPU": there} if there else {})}, "get": lambda done: done,
                    "wait": lambda waiting: (waiting[:1], []), "init": lambda **_: None, "shutdown": lambda: None,
                    "remote": lambda **_: lambda _: types.SimpleNamespace(remote=lambda *of: ("node", f"made {of[4]}"))}[name]

    monkeypatch.setitem(sys.modules, "ray", Ray("ray"))
    grid = sweep.load(written(home, **GOOD | {"grid": {"k_checkpoints": [10, 20]}}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outcomes = sweep.run(grid, ray="auto", gpus=gpus)
    assert [o.error for o in outcomes] == [f"made {job.folder.name}" for job in grid.jobs]
    said = [str(w.message) for w in said if "GPU" in str(w.message)]
    assert len(said) == warned and all("the cluster's 2 GPUs" in s and "expected --gpus 1" in s for s in said)


def test_a_cluster_that_is_not_there(home):
    s = harness.Sweep(home, [2], [0])
    code, said = s.finish("--ray", "127.0.0.1:1")
    assert code == 1 and "no Ray cluster at '127.0.0.1:1'" in said and "Traceback" not in said
