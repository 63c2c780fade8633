"""runs.py: what is written comes back bitwise or not at all; a stage is computed once and resumes."""

import errno
import importlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pdiff_lib.base import runs

TENSORS = {
    "float": torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), 1e-45, 3.0]]),
    "double": torch.rand(3).double(),
    "half": torch.tensor([1.0, 2.5]).half(),
    "bf16": torch.tensor([1.0, -3.0]).bfloat16(),
    "bool": torch.tensor([True, False, True]),
    "byte": torch.arange(256).byte(),
    "int": torch.tensor([-(2**62), 7]),
    "scalar": torch.tensor(3.25),
    "flag": torch.tensor(True),
    "empty": torch.empty(0, 4),
    "view": torch.arange(6.0).view(2, 3).T,
}


def raw(t: torch.Tensor) -> tuple:
    """Type, shape and bytes: equality that tells -0 from 0 and NaN from nothing."""
    return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(raw(a[k]) == raw(b[k]) for k in a)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def file(tmp_path) -> Path:
    """A whole file of `write`, alone in its folder."""
    path = tmp_path / "a" / "x.safetensors"
    runs.write(path, TENSORS, {"seconds": 1.5, "names": ["ä"]})
    return path


def test_what_is_written_comes_back_bitwise(file):
    tensors, note = runs.read(file)
    assert same(tensors, TENSORS) and note == {"seconds": 1.5, "names": ["ä"]}
    with safe_open(file, "pt") as f:  # a plain safetensors file, for any other reader
        assert set(f.keys()) == set(TENSORS)
    assert names(file.parent) == ["x.safetensors"]


def test_tensors_that_share_memory_are_written(tmp_path):
    base = torch.arange(6.0)
    runs.write(tmp_path / "x", {"a": base, "b": base[2:], "c": base})
    assert same(runs.read(tmp_path / "x")[0], {"a": base, "b": base[2:], "c": base})


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where, name", [(runs, "save_file"), (runs.os, "replace"), (runs.os, "fsync")])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(file, monkeypatch, where, name):
    monkeypatch.setattr(where, name, full_disk)
    with pytest.raises(OSError, match="No space left"):
        runs.write(file, {"other": torch.zeros(3)})
    assert same(runs.read(file)[0], TENSORS) and names(file.parent) == ["x.safetensors"]


def test_a_real_limit_of_the_file_system_is_an_os_error(file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # SIGXFSZ is ignored by Python: the write itself fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError):
            runs.write(file, {"other": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(runs.read(file)[0], TENSORS) and names(file.parent) == ["x.safetensors"]


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_file_is_damaged(file, keep):
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(runs.DamagedFile, match="x.safetensors"):
        runs.read(file)


def test_a_flipped_bit_of_any_tensor_is_noticed(file):
    whole, start = file.read_bytes(), header_end(file)
    for at in range(start, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(runs.DamagedFile, match="altered"):
            runs.read(file)


def test_any_changed_byte_of_the_header_is_noticed(file):
    whole, missed = file.read_bytes(), []
    for at in range(header_end(file)):
        if whole[at : at + 1] == b" ":  # padding, which means nothing
            continue
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            runs.read(file)
            missed.append((at, "accepted", whole[at - 10 : at + 10]))
        except runs.DamagedFile:
            pass
        except Exception as e:
            missed.append((at, type(e).__name__, whole[at - 10 : at + 10]))
    assert not missed


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("dump", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_pickle_is_refused_and_not_executed(tmp_path, dump):
    path, proof = tmp_path / "x.safetensors", tmp_path / "executed"
    dump({"x": Malicious(proof)}, path)
    with pytest.raises(runs.DamagedFile, match="refused"):
        runs.read(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    assert proof.is_dir()  # the file was armed


def test_a_safetensors_file_without_our_checksum_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(runs.DamagedFile, match="is no file of this workbook.*expected .*Zoo.save.*your own") as e:
        runs.read(tmp_path / "x")
    assert "altered" not in str(e.value)
    save_file({"x": torch.zeros(2)}, tmp_path / "x", metadata={"checksum": "of another", "format": "pt"})
    with pytest.raises(runs.DamagedFile, match="altered"):
        runs.read(tmp_path / "x")


def test_a_checkpoint_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    now, write = [0.0], runs.write

    def slow(path, state):
        write(path, state)
        now[0] += cost

    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs, "write", slow)
    checkpoint = runs.Checkpoint(tmp_path / "x")
    for cost, least in ((0.5, 30.0), (3.0, 60.0), (10.0, 200.0), (0.1, 30.0)):
        checkpoint.save({"x": torch.zeros(1)})
        start = now[0]
        now[0] = start + least - 0.01
        assert not checkpoint.due()
        now[0] = start + least + 0.01
        assert checkpoint.due()
    assert not runs.Checkpoint(None).due()


def test_tensor_digest_sees_name_type_shape_and_content_only():
    x = torch.arange(6.0)
    all_different = [
        {"a": x},
        {"b": x},
        {"a": x.double()},
        {"a": x.view(2, 3)},
        {"a": x.flip(0)},
        {"a": x, "b": x},
        {"a": torch.tensor([0.0])},
        {"a": torch.tensor([-0.0])},
        {"a": x.int()},
        {"a": x.view(torch.int32)},
    ]
    assert len({runs.tensor_digest(t) for t in all_different}) == len(all_different)
    y = torch.stack([x, x], 1)[:, 0].requires_grad_()  # other strides
    assert runs.tensor_digest({"a": y, "b": x}) == runs.tensor_digest({"b": x, "a": x})


BODY = "class C:\n    '''Doc.'''\n    rate = 0.1\n\n\ndef f(x):\n    '''Doc.'''\n    y = x * 2  # twice\n    return y\n"


def test_code_digest_ignores_prose_and_sees_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    variants = {
        "code_a": BODY,
        "code_prose": "'''Module.'''\n# remark\n" + BODY.replace("Doc.", "Other.").replace("twice", "2 x"),
        "code_layout": BODY.replace("    '''Doc.'''\n", "").replace("x * 2", "(x\n         * 2)"),
        "code_constant": BODY.replace("x * 2", "x * 3"),
        "code_attribute": BODY.replace("0.1", "0.2"),
        "code_name": BODY.replace("return y", "return x"),
    }
    digests = {}
    for name, text in variants.items():
        (tmp_path / f"{name}.py").write_text(text)
        module = importlib.import_module(name)
        digests[name] = [runs.code_digest(o) for o in (module, module.C, module.f)]
    a = digests["code_a"]
    assert digests["code_prose"] == digests["code_layout"] == a
    changed = {
        name: [x != y for x, y in zip(digests[name], a)] for name in ("code_constant", "code_attribute", "code_name")
    }
    assert changed == {
        "code_constant": [True, False, True],
        "code_attribute": [True, True, False],
        "code_name": [True, False, True],
    }
    assert runs.code_digest(module.C, module.f) != runs.code_digest(module.f, module.C)


class Counted:
    """A computation that counts its calls."""

    def __init__(self, result=None):
        self.calls, self.result = 0, result or TENSORS

    def __call__(self, checkpoint):
        self.calls += 1
        return self.result


def test_a_stage_is_computed_once_and_read_back_bitwise(tmp_path):
    compute, store = Counted(), runs.Store(tmp_path)
    first = store.stage("s", {"k": 1}, compute)
    seconds = store.seconds["s"]
    again = runs.Store(tmp_path)
    assert same(first, TENSORS) and same(again.stage("s", {"k": 1}, compute), TENSORS)
    assert compute.calls == 1 and again.seconds == {"s": seconds}  # what it cost then, not what reading it costs
    (path,) = (tmp_path / "s").glob("*.safetensors")
    assert runs.read(path)[1].items() >= {"name": "s", "key": {"k": 1}, "torch": torch.__version__}.items()


def test_what_a_stage_depends_on_decides(tmp_path):
    compute, store = Counted(), runs.Store(tmp_path)
    calls = [
        ("s", {"k": 1}, ()),
        ("s", {"k": 2}, ()),
        ("s", {"k": 1.5}, ()),
        ("s", {"k": 1, "l": 0}, ()),
        ("other", {"k": 1}, ()),
        ("s", {"k": 1}, (same,)),
        ("s", {"k": 1}, (same, names)),
    ]
    for _ in range(2):
        for name, key, code in calls:
            store.stage(name, key, compute, code)
        assert compute.calls == len(calls)
    store.stage("s", {"l": 0, "k": 1}, compute)  # the order of a key's entries means nothing
    assert compute.calls == len(calls)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: b"\x80" + b]
)
def test_a_damaged_stage_is_noticed_and_computed_again(tmp_path, damage):
    compute, store = Counted(), runs.Store(tmp_path)
    store.stage("s", {}, compute)
    (path,) = (tmp_path / "s").glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="computing the stage 's' again"):
        assert same(store.stage("s", {}, compute), TENSORS)
    store.stage("s", {}, compute)
    assert compute.calls == 2


def test_no_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    compute, store = Counted(), runs.Store(None)
    for _ in range(2):
        assert same(store.stage("s", {}, compute), TENSORS)
    assert compute.calls == 2 and names(tmp_path) == []


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, monkeypatch):
    compute, store = Counted(), runs.Store(tmp_path)
    store.stage("s", {"k": 1}, compute)
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space left"):
        m.setattr(runs, "save_file", full_disk)
        store.stage("s", {"k": 2}, compute)
    assert same(store.stage("s", {"k": 1}, compute), TENSORS) and compute.calls == 2
    assert same(store.stage("s", {"k": 2}, compute), TENSORS) and compute.calls == 3  # the lock was given back


def start(tmp_path: Path, text: str, *args: str) -> subprocess.Popen:
    """A Python process of its own that runs `text`."""
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, script, tmp_path, *args],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def wait_for(there, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)


TWO = """
import pathlib, sys, time, torch
from pdiff_lib.base import runs
folder, me = pathlib.Path(sys.argv[1]), sys.argv[2]

def compute(checkpoint):
    with open(folder / "computed", "a") as f:
        f.write(me + "\\n")
    time.sleep(1)
    return {"x": torch.arange(5)}

(folder / f"ready{me}").touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.005)
print(runs.Store(folder / "stages").stage("s", {}, compute)["x"].tolist())
"""


def test_two_processes_compute_a_stage_once(tmp_path):
    outputs = [finish(p) for p in [start(tmp_path, TWO, "1"), start(tmp_path, TWO, "2")]]
    assert len((tmp_path / "computed").read_text().split()) == 1
    assert all("[0, 1, 2, 3, 4]" in out for out in outputs)
    assert sum("another process is at work on the stage 's'" in out for out in outputs) == 1


TRAINING = """
import pathlib, sys, time, torch
from pdiff_lib.base import runs, training
folder, out, pause = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
runs.CHECKPOINT_SECONDS = 0.1
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 1))
seen = torch.zeros(40)

def loss_at(i):
    with open(folder / out, "a") as f:
        f.write(f"{i}\\n")
    time.sleep(pause)
    return net(torch.randn(12, 8, generator=torch.Generator().manual_seed(i))).square().mean()

def compute(checkpoint):
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    losses = training.loop(loss_at, 40, {"net": net}, optimizer, checkpoint=checkpoint, progress=False,
                           buffers={"seen": seen}, after=lambda i: seen[i].copy_(net[0].weight.detach().sum()))
    return {"losses": losses, "seen": seen, **net.state_dict()}

runs.Store(folder / ("clean" if out == "clean-steps" else "stages")).stage("s", {}, compute)
"""


def steps(path: Path) -> list[int]:
    return [int(i) for i in path.read_text().split()] if path.exists() else []


def stage_file(folder: Path) -> Path:
    (path,) = (p for p in (folder / "s").glob("*.safetensors") if "partial" not in p.name)
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict:
    """The stage of TRAINING, uninterrupted."""
    folder = tmp_path_factory.mktemp("clean")
    finish(start(folder, TRAINING, "clean-steps", "0"))
    assert steps(folder / "clean-steps") == list(range(40))
    return runs.read(stage_file(folder / "clean"))[0]


@pytest.fixture
def killed(tmp_path) -> Path:
    """A folder in which a training was killed with SIGKILL after its first checkpoint; returns its partial file."""
    process = start(tmp_path, TRAINING, "steps", "0.05")
    folder = tmp_path / "stages" / "s"
    try:
        wait_for(lambda: list(folder.glob("*.partial.safetensors")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < len(steps(tmp_path / "steps")) < 40 and process.returncode == -signal.SIGKILL
    (partial,) = folder.glob("*.partial.safetensors")
    return partial


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, killed, clean):
    finish(start(tmp_path, TRAINING, "more-steps", "0"))
    first, more = steps(tmp_path / "steps"), steps(tmp_path / "more-steps")
    assert more == list(range(more[0], 40)) and 0 < more[0] <= first[-1] + 1
    assert same(runs.read(stage_file(tmp_path / "stages"))[0], clean)
    assert not killed.exists()


def test_a_damaged_checkpoint_starts_anew(tmp_path, killed, clean):
    killed.write_bytes(killed.read_bytes()[:-5])
    process = start(tmp_path, TRAINING, "more-steps", "0")
    assert "starting this stage anew" in process.communicate(timeout=120)[1] and process.returncode == 0
    assert steps(tmp_path / "more-steps") == list(range(40))
    assert same(runs.read(stage_file(tmp_path / "stages"))[0], clean)


def test_the_folder_of_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("PDIFF_RUNS", raising=False)
    assert runs.root() == Path(runs.__file__).parents[2] / "runs"
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "elsewhere"))
    assert runs.root() == tmp_path / "elsewhere" and runs.Store().folder == tmp_path / "elsewhere" / "stages"


def test_a_run_has_its_folder_and_record(tmp_path, monkeypatch):
    monkeypatch.delenv("PDIFF_RUN_DIR", raising=False)
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    folders = {runs.Run("nb", settings).folder for settings in ({"k": 1}, {"k": 2}, {"k": 1})}
    assert len(folders) == 2 and all(f.parent == tmp_path / "nb" and f.is_dir() for f in folders)
    monkeypatch.setenv("PDIFF_RUN_DIR", str(tmp_path / "prepared"))
    run = runs.Run("nb", {"k": 1, "list": [1, 2]})
    path = run.record({"accuracy": torch.tensor(0.5), "nested": {"x": 1}}, {"zoo": 1.2345})
    assert path == tmp_path / "prepared" / "record.json" and names(path.parent) == ["record.json"]
    content = json.loads(path.read_text())
    assert (
        content.items()
        >= {
            "notebook": "nb",
            "settings": {"k": 1, "list": [1, 2]},
            "seconds_per_stage": {"zoo": 1.23},
            "numbers": {"accuracy": 0.5, "nested": {"x": 1}},
            "torch": torch.__version__,
        }.items()
    )
    assert 0 <= content["seconds"] < 60 and {"python", "commit", "device", "created"} <= content.keys()


def test_spent_is_what_the_stages_cost_when_they_were_computed(tmp_path):
    def slow(_checkpoint):
        time.sleep(0.3)
        return {"x": torch.zeros(1)}

    def both(store):
        return [store.stage(name, {}, slow)["x"] for name in ("a", "b")]

    first, again = runs.Store(tmp_path), runs.Store(tmp_path)
    _, computed = first.spent(lambda: both(first))
    start = time.perf_counter()
    result, kept = again.spent(lambda: both(again))
    assert time.perf_counter() - start < 0.3 and len(result) == 2
    assert kept == pytest.approx(computed, abs=1e-6) and 0.6 <= computed < 1.5
    _, once = again.spent(lambda: again.stage("a", {}, slow))  # those of this work only, though it was used before
    assert 0.3 <= once < computed
    nothing = runs.Store(None)
    assert 0.6 <= nothing.spent(lambda: both(nothing))[1] < 1.5  # by the clock
    assert again.spent(lambda: time.sleep(0.05))[1] == pytest.approx(0.05, abs=0.04)
