"""records.py: JSON that any reader takes, the device that was used, commits that exist."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from pdiff_lib.base import records, runs
from pdiff_lib.batches import cli, results

HERE = Path(records.__file__).parents[2]
COMMITTED = sorted((HERE / "figures").glob("*-record.json"))


def strict(text: str) -> dict:
    """As a reader of the standard, which has no NaN."""
    def refuse(name):
        raise ValueError(f"not JSON: {name}")
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    monkeypatch.delenv("PDIFF_RUN_DIR", raising=False)
    return tmp_path


ODD = {"plain": 1.5, "nan": math.nan,
       "list": [1, -math.inf, {"a/b ~c": torch.tensor(math.nan), "0": torch.tensor([math.inf])}], "none": None,
       "numpy": torch.tensor([math.nan]).double().numpy()[0], 3: {True: math.nan}}


def test_numbers_that_are_not_finite_are_null_in_a_record_and_come_back(home):
    path = runs.Run("x", {"k": 1}).record(ODD, {"stage": math.inf})
    content = strict(path.read_text())
    assert content["numbers"]["nan"] is None and content["numbers"]["list"] == [1, None, {"a/b ~c": None, "0": None}]
    assert len(content["not_finite"]) == 7 and content["not_finite"]["/numbers/list/2/a~1b ~0c"] == "nan"
    back = records.loads(path.read_text())
    assert "not_finite" not in back and back["numbers"]["none"] is None and back["numbers"]["plain"] == 1.5
    numbers = back["numbers"]
    assert all(map(math.isnan, (numbers["nan"], numbers["numpy"], numbers["list"][2]["a/b ~c"], numbers["3"]["true"])))
    assert numbers["list"][1] == -math.inf and numbers["list"][2]["0"] == math.inf == back["seconds_per_stage"]["stage"]


def test_a_record_without_such_numbers_is_as_before(home):
    numbers = {"a": [0.1, 1e-300, True, None, "text"], "b": {"c": 10**20}}
    assert records.dumps({"numbers": numbers}) == json.dumps({"numbers": numbers}, indent=1)


def test_a_setting_that_is_not_finite_is_refused(home):
    with pytest.raises(ValueError, match="/a/1: expected finite numbers"):
        runs.Run("x", {"a": [1, math.nan]})
    for key in ({"k": math.inf}, {"k": [{"l": -math.nan}]}):
        with pytest.raises(ValueError, match="/1/k.*: expected finite numbers"):
            runs.Store(home).stage("s", key, lambda _: pytest.fail("computed"))
    with pytest.raises(ValueError):
        runs.write(home / "x", {}, {"seconds": math.nan})


def test_records_of_both_times_are_found_and_counted_once(home):
    before = len(results.records())
    for name, text in (("a", '{"notebook": "x", "settings": {}, "numbers": {"v": NaN}}'),
                       ("b", records.dumps({"notebook": "x", "settings": {}, "numbers": {"v": math.nan}}))):
        (home / "x" / name).mkdir(parents=True)
        (home / "x" / name / "record.json").write_text(text)
    assert len(results.records()) == before + 1 and math.isnan(results.records("x")[0]["numbers"]["v"])


@pytest.mark.parametrize("notebook", ["../x", "a/b", "/etc/x", "..", "", ".hidden", "a\0b"])
def test_a_run_stays_in_its_folder(home, notebook):
    with pytest.raises(ValueError, match="expected a notebook's name"):
        runs.Run(notebook, {})
    assert not list(home.parent.glob("x*"))


def test_the_device_is_the_one_that_was_used(home, monkeypatch):
    def never(*_):
        pytest.fail("CUDA was asked")

    for name in ("get_device_name", "current_device"):
        monkeypatch.setattr(torch.cuda, name, never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    cpu = f"CPU, {torch.get_num_threads()} threads"
    assert runs.environment()["device"] == cpu == runs.environment("cpu")["device"]  # beside a GPU, which is not touched

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {torch.device(device).index or 0}")
    assert runs.environment("cuda:1")["device"] == "GPU 1"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert runs.environment()["device"] == "GPU 0" and runs.environment(torch.device("cpu"))["device"] == cpu
    devices = [json.loads(path.read_text())["device"] for path in (
        runs.Run("x", {"a": 1}, "cpu").record({}), runs.Run("x", {"a": 2}, device="cuda:1").record({}),
        runs.Run("x", {"a": 3}, "cuda:1").record({}, device="cpu"))]
    assert devices == [cpu, "GPU 1", cpu]
    for of_store, of_key, told in (("cuda:1", "cuda", "GPU 1"), (None, "cpu", cpu), (None, "cuda", "GPU 0")):
        runs.Store(home, device=of_store).stage(told, {"device": of_key}, lambda _: {"x": torch.zeros(1)})
        (path,) = (home / told).glob("*.safetensors")
        assert runs.read(path)[1]["device"] == told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.environment("cuda:1")["device"] == "cuda:1"  # a device that is only pretended


def git(*arguments: str, cwd: Path = HERE) -> str:
    return subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=cwd, capture_output=True,
                          text=True).stdout.strip()


@pytest.mark.parametrize("file", COMMITTED, ids=lambda p: p.stem)
def test_a_committed_record_names_a_commit_of_this_history_or_says_that_none_can_be_known(file):
    content = strict(file.read_text())
    if content["commit"] == "unknown":
        assert content["commit_note"].startswith("made from ")
        return
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no git history here, or a part of it only")
    records.check_commit(content["commit"])


@pytest.fixture
def history(tmp_path, monkeypatch) -> dict[str, str]:
    """A repository of two branches; commits by name."""
    there = tmp_path / "repository"
    there.mkdir()
    git("init", "-q", "-b", "main", cwd=there)
    commits = {}
    for name, branch in (("first", None), ("aside", "other"), ("last", "main")):
        if branch:
            git("checkout", "-q", *(["-b"] if branch == "other" else []), branch, cwd=there)
        (there / name).write_text(name)
        git("add", name, cwd=there)
        git("commit", "-q", "-m", name, cwd=there)
        commits[name] = git("describe", "--always", "--dirty", "--abbrev=10", cwd=there)
    git("tag", "-a", "-m", "x", "v1", cwd=there)
    monkeypatch.setattr(records, "PROJECT", there)
    return commits


@pytest.mark.parametrize("commit, message", [
    ("{last}-dirty", "changes that no commit holds"), ("unknown", "not in the history"), ("{aside}", "not in the history"),
    ("0123456789", "not in the history"), ("", "not in the history"), ("--help", "not in the history"),
    ("{last} {first}", "not in the history"), (None, "not in the history")])
def test_publish_refuses_a_commit_that_nobody_can_check_out(tmp_path, history, commit, message):
    run, to = tmp_path / "run", tmp_path / "figures"
    run.mkdir()
    (run / "a.svg").write_text("a")
    (run / "record.json").write_text(json.dumps({} if commit is None else {"commit": commit.format(**history)}))
    with pytest.raises(ValueError, match=message):
        cli.publish(run, "x", to)
    assert not to.exists()


def test_publish_takes_a_commit_of_the_history(tmp_path, history, monkeypatch):
    run, to = tmp_path / "run", tmp_path / "figures"
    run.mkdir()
    for n, commit in enumerate((history["first"], history["last"], "v1")):
        (run / "record.json").write_text(json.dumps({"commit": commit}))
        cli.publish(run, f"x{n}", to)
    assert sorted(p.name for p in to.iterdir()) == ["x0-record.json", "x1-record.json", "x2-record.json"]
    own = {"commit": "v1", "settings": {"dataset": "/home/me/my birds,/home/me/b-test.parquet", "rows": {"a": {"weights": "/data/w.pt"}}, "subset": "a/*"}}
    (run / "record.json").write_text(json.dumps(own))
    (run / "a.svg").write_text("<text>/home/me/my birds</text>")
    cli.publish(run, "y", to)
    assert json.loads((to / "y-record.json").read_text())["settings"] == {"dataset": "my birds,b-test.parquet", "rows": {"a": {"weights": "w.pt"}},
                                                                          "subset": "a/*"}
    assert (to / "y-a.svg").read_text() == "<text>my birds</text>"
    for name in ("../x", "a/b", "", "/tmp/x", ".x", "a b"):
        with pytest.raises(ValueError, match="as files will begin with it"):
            cli.publish(run, name, to)
    monkeypatch.setattr(records, "PROJECT", tmp_path)  # no repository
    with pytest.raises(ValueError, match="not in the history"):
        cli.publish(run, "x", to)
