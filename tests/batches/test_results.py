"""results.py: what runs have recorded is found, each once. (Tables of sweeps are in test_sweep.py.)"""

import json

import pytest

from pdiff_lib.base import runs
from pdiff_lib.batches import results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    return tmp_path


def leave(folder, notebook, name, numbers, **settings):
    run = folder / notebook / name
    run.mkdir(parents=True)
    (run / "record.json").write_text(json.dumps({"notebook": notebook, "settings": settings, "numbers": numbers}))


def test_records_are_those_committed_and_those_of_this_machine(folder):
    before = results.records()
    assert len(before) > 4 and all("figures" in r["where"] for r in before)  # a fresh clone has the committed ones
    leave(folder, "x", "1", {"a": 1}, network="n", dataset="d", image_size=32)
    leave(folder, "x", "2", {"a": 2, "scale": "by hand"}, network="n")
    leave(folder, "y", "1", {"a": 1})
    assert len(results.records()) == len(before) + 3
    found = {r["numbers"]["a"]: r["scale"] for r in results.records("x")}
    assert found == {1: "n, d, 32 px", 2: "by hand"}
    assert [r["scale"] for r in results.records("y")] == [""] and runs.root() == folder


def test_a_run_that_was_published_counts_once(folder):
    committed = results.records()[0]
    leave(folder, committed["notebook"], "again", committed["numbers"], **committed["settings"])
    assert len(results.records()) == len({r["where"] for r in results.records()})
    assert not any("again" in r["where"] for r in results.records())


def test_a_run_counts_once_too_where_its_record_lost_its_folders(folder):
    leave(folder, "x", "1", {"a": 1}, dataset="/home/me/birds")
    leave(folder, "x", "2", {"a": 1}, dataset="birds")
    assert len(results.records("x")) == 1
