"""warm.py: a kernel that is a copy is a kernel like any other, ends with whoever started it, and never stands for one that differs."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from jupyter_client import KernelManager
from nbformat import v4

from pdiff_lib.batches import jobs, sweep, warm

PACKAGES = ("fractions", "no_such_package", "numpy", "ipykernel.kernelapp", "ipykernel.ipkernel")
IS_A_COPY = "'fractions' in sys.modules"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with libraries are safe on Linux alone")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "sets_a_variable.py").write_text("import os\nos.environ.setdefault('SET_BY_AN_IMPORT', 'yes')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), os.pathsep)
        patch.setenv("ANSWER", "41")
        with warm.kernels({"ANSWER": "42"}, ("sets_a_variable", *PACKAGES)):
            yield


def written(folder: Path, parameters: str, work: str) -> Path:
    cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), v4.new_code_cell(f"import os, sys\n{work}")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), folder / "short.ipynb")
    return folder / "short.ipynb"


@contextmanager
def started(**how):
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(**{"env": os.environ | {"ANSWER": "42"}} | how)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(60)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def said(client, expression: str):
    """The value of a literal expression in a kernel."""
    texts = []
    reply = client.execute_interactive(f"import os, random, sys, threading\nprint(repr({expression}))", timeout=30,
                                       output_hook=lambda m: texts.append(m["content"].get("text", "")))
    assert reply["content"]["status"] == "ok", reply
    return eval("".join(texts))


def gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_copy_is_a_kernel_of_its_own(kernels, tmp_path):
    environment = os.environ | {"ANSWER": "42", "PDIFF_RUNS": "elsewhere"}
    with started(cwd=str(tmp_path), env=environment) as (manager, one), started() as (_, other):
        assert said(one, IS_A_COPY) and said(other, IS_A_COPY)
        assert said(one, "(os.getcwd(), os.environ['PDIFF_RUNS'], os.environ['ANSWER'], sys.argv[1:3], sys.executable)") == (
            str(tmp_path), "elsewhere", "42", ["-f", manager.connection_file], sys.executable)
        # As a cold one: the folder of this module is not where it looks for others, nor are the library's own there before they are imported.
        assert str(Path(warm.__file__).parent) not in said(one, "sys.path")
        assert said(one, "[n for n in sys.modules if n.startswith('pdiff_lib')]") == []
        state = "(os.getpid(), os.getsid(0), random.random(), __import__('numpy').random.rand())"
        first, second = said(one, state), said(other, state)
        assert first[0] == first[1] and not {*first} & {*second}
        said(one, "setattr(sys, 'mine', 1)")
        assert not said(other, "hasattr(sys, 'mine')")


@pytest.mark.parametrize("own, copied", [
    ({"ANSWER": "43"}, False), ({"OF_NO_COPY": "1"}, False), ({"SET_BY_AN_IMPORT": "no"}, False), ({"SET_BY_AN_IMPORT": "yes"}, True), ({}, True)])
def test_a_copy_stands_for_no_kernel_of_another_environment(kernels, own, copied):
    with started(env=os.environ | {"ANSWER": "42"} | own) as (_, client):
        assert said(client, IS_A_COPY) == copied and said(client, f"[os.environ[n] for n in {[*own]}]") == [*own.values()]
        assert said(client, "os.environ.get('SET_BY_AN_IMPORT')") == ("yes" if copied else own.get("SET_BY_AN_IMPORT"))


def test_an_interrupt_reaches_the_cell_and_the_kernel_goes_on(kernels):
    with started() as (manager, client):
        assert said(client, "threading.current_thread() is threading.main_thread()")
        message = client.execute("import time\nfor _ in range(600): time.sleep(.1)")
        while client.get_iopub_msg(timeout=30)["content"].get("execution_state") != "busy":
            pass
        time.sleep(0.5)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != message:
            pass
        assert reply["content"]["ename"] == "KeyboardInterrupt" and said(client, "1 + 1") == 2


def test_ends_are_told_both_ways(kernels):
    for ending in ("copy", "place", "asked"):
        with started() as (manager, client):
            copy, place = said(client, "os.getpid()"), manager.provisioner.process
            assert copy != place.pid
            if ending == "copy":
                os.kill(copy, signal.SIGKILL)
                assert place.wait(10) == -signal.SIGKILL
            elif ending == "place":
                place.kill()
            else:
                client.shutdown()
                assert place.wait(10) == 0
            assert gone(copy)


def test_a_place_that_is_killed_while_it_asks_harms_no_other(kernels):
    with socket.socket(socket.AF_UNIX) as place:
        place.connect(f"{os.environ[warm.SERVING]}/socket")
        place.sendall(b'\n{"arguments": [')
    for _ in range(20):  # killed at once: before it asks, while a copy is made, or just after
        with subprocess.Popen([sys.executable, "-IS", warm.__file__, "stand", os.environ[warm.SERVING], "-m", "ipykernel_launcher", "-f", "none.json"],
                              env=os.environ | {"ANSWER": "42"}) as process:
            time.sleep(random.uniform(0.02, 0.1))
            process.kill()
    with started() as (_, client):
        assert said(client, IS_A_COPY)


def test_a_run_whose_copy_is_killed_has_died(kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ANSWER", "42")
    notebook = written(tmp_path, "kill = 0", f"assert {IS_A_COPY}\nos.kill(os.getpid(), kill) if kill else None")
    assert jobs.execute(jobs.plan(notebook, {}), progress=False).is_file()
    with pytest.raises(jobs.Died, match="short.ipynb died"):
        jobs.execute(jobs.plan(notebook, {"kill": 9}), progress=False)


def test_the_kernels_of_many_runs_are_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    for variable in (warm.SERVING, "JUPYTER_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(warm, "kernels", partial(warm.kernels, packages=PACKAGES))
    copied = f"assert ({IS_A_COPY}, os.environ['OMP_NUM_THREADS']) == (many, '3')"
    written(tmp_path, "i = 0\nmany = False", copied)
    for many, runs in ((True, sweep.MANY), (False, sweep.MANY - 1)):
        content = {"notebook": str(tmp_path / "short.ipynb"), "parameters": {"many": many}, "grid": {"i": list(range(runs))}}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
        outcomes = sweep.run(sweep.load(tmp_path / "x.yaml"), workers=2, cpus=3)
        assert [o.error for o in outcomes] == [""] * runs


WHO = """
import os, sys, time
from jupyter_client import KernelManager
from pdiff_lib.batches import warm
with warm.kernels(packages=("ipykernel.kernelapp",)):
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(60)
    client.execute_interactive("import os; print(os.getppid(), os.getpid(), flush=True)")
    print(manager.provisioner.process.pid, os.environ["PDIFF_KERNELS"], flush=True)
    time.sleep(100)
"""


def test_nothing_outlives_whoever_is_killed():
    outside = {name: value for name, value in os.environ.items() if name not in (warm.SERVING, "JUPYTER_PATH")}
    with subprocess.Popen([sys.executable, "-c", WHO], stdout=subprocess.PIPE, text=True, env=outside) as process:
        served, copy = map(int, process.stdout.readline().split())
        place, folder = process.stdout.readline().split()
        assert psutil.Process(copy).ppid() == served and copy != int(place) and served != process.pid and Path(folder, "socket").exists()
        process.kill()
        assert gone(served) and gone(copy) and gone(int(place)) and not os.path.exists(folder)


def test_afterwards_all_is_as_before(monkeypatch):
    monkeypatch.delenv(warm.SERVING, raising=False)
    monkeypatch.setenv("JUPYTER_PATH", "/elsewhere")
    before = dict(os.environ)
    with warm.kernels(packages=("ipykernel.kernelapp",)):
        folder = os.environ[warm.SERVING]
        assert os.environ["JUPYTER_PATH"] == f"{folder}{os.pathsep}/elsewhere"
        inside = dict(os.environ)
        with warm.kernels():
            assert dict(os.environ) == inside
    assert dict(os.environ) == before and not os.path.exists(folder)


def test_where_no_socket_can_lie_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.delenv(warm.SERVING, raising=False)
    (tmp_path / ("deep" * 20)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("deep" * 20)))
    with warm.kernels() as found:
        assert found == {} and warm.SERVING not in os.environ


def test_a_kernel_of_another_python_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(warm.SERVING, raising=False)
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(
        '{"argv": ["/opt/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with warm.kernels():
        assert os.environ["JUPYTER_PATH"] == str(tmp_path) and warm.SERVING not in os.environ
