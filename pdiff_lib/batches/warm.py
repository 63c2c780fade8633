"""Kernels that begin warm: copies (forks) of one process in which torch, timm and the rest are imported already.

The imports of a notebook's kernel cost 6 s of processor time, which a grid of runs pays once per run, and the tests once per notebook. As long
as `kernels()` lasts, a kernel "python3" is a copy of one process that has paid them: whoever starts such a kernel (papermill, nbval, Voila)
gets a small program in its place, which asks for a copy, hands on signals, and ends as the copy ends. A kernel that a copy could not stand
for, as it has other variables that Python, libc or OpenMP read when a process begins, starts as ever.

This file is also that program, and the process that is copied. Both need the standard library alone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What notebooks import of others' packages. None of ours: a copy reads the code that is there when it begins.
PACKAGES = ("numpy", "torch", "torch._dynamo", "torch.export", "torchvision.transforms.v2", "timm", "pandas", "pyarrow.parquet",
            "sklearn.datasets", "sklearn.decomposition", "scipy.optimize", "scipy.stats", "plotly.graph_objs._figure", "plotly.subplots",
            "ipywidgets", "anywidget", "PIL.Image", "IPython", "ipykernel.kernelapp", "ipykernel.ipkernel")
# Variables that are read anew each time they are needed: processes that differ in these alone are alike.
ANEW = ("PDIFF_", "JPY_", "JUPYTER_", "PYTEST_", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PATH", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES")
SERVING = "PDIFF_KERNELS"  # the folder of the process that is copied
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def kernels(environment: Mapping[str, str] = {}, packages: Sequence[str] = PACKAGES) -> Iterator[dict[str, str]]:
    """Within it, kernels "python3" begin warm in this process and in those that it starts. On other systems than Linux, where "python3" is a
    kernel of another Python than this one, within another `kernels()`, and where temporary files lie too deep for a socket, nothing changes.

    Args:
        environment: variables that these kernels will have and this process has not.
        packages: modules that they begin with; those not installed are left out.

    Yields:
        The variables by which a process finds them, for those that are not started from here.
    """
    spec = _usual() if sys.platform == "linux" and SERVING not in os.environ else None
    if spec is None or len(os.fsencode(tempfile.gettempdir())) > 70:  # of a socket's name Linux takes 107 bytes
        yield {}
        return
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="pdiff-kernels-") as folder, socket.socket(socket.AF_UNIX) as listening:
        file = Path(folder, "kernels", "python3", "kernel.json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(spec | {"argv": [sys.executable, "-IS", __file__, "stand", folder, *spec["argv"][1:]]}))
        listening.bind(f"{folder}/socket")
        listening.listen(64)  # from now on: who asks while it imports waits as long as imports take
        # It ends when its standard input does: with this process, however that ends.
        process = subprocess.Popen([sys.executable, __file__, "serve", str(listening.fileno()), *packages], start_new_session=True,
                                   env={**os.environ, **environment}, pass_fds=[listening.fileno()], stdin=subprocess.PIPE)
        listening.close()
        found = {SERVING: folder, "JUPYTER_PATH": os.pathsep.join([folder, before] if before else [folder])}
        os.environ |= found
        try:
            yield found
        finally:
            process.stdin.close()
            process.wait()
            del os.environ[SERVING], os.environ["JUPYTER_PATH"]
            if before is not None:
                os.environ["JUPYTER_PATH"] = before


def _usual() -> dict[str, Any] | None:
    """How a kernel "python3" starts; None if not as one of this Python."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec("python3").to_dict()
    except NoSuchKernel:
        return None
    ours = spec["argv"][0] in ("python", "python3", sys.executable) and spec["argv"][1:3] == ["-m", "ipykernel_launcher"]
    return spec if ours else None


def _matters(environment: Mapping[str, str]) -> dict[str, str]:
    """What two processes must have in common for the one to stand for the other."""
    return {name: value for name, value in environment.items() if name != "_" and not name.startswith(ANEW)}


def _stand(folder: str, *how: str) -> None:
    """In a kernel's place: stand for a copy, or else become a kernel. `how`: -m ipykernel_launcher, and its arguments."""
    parent, place = os.getppid(), socket.socket(socket.AF_UNIX)
    what = {"arguments": how[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    try:
        place.connect(f"{folder}/socket")
        socket.send_fds(place, [b"\n"], [0, 1, 2])
        place.sendall(json.dumps(what).encode() + b"\n")
        said = place.makefile("rb")
        copy = int(said.readline())
    except (OSError, ValueError):  # nobody there, or it declined
        os.execv(sys.executable, [sys.executable, *how])
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(copy, number))
    with selectors.DefaultSelector() as selector:
        selector.register(place, selectors.EVENT_READ)
        while not selector.select(1):
            if os.getppid() != parent:  # a kernel ends with whoever started it; and a copy, when its place is empty
                os._exit(1)
    code = int(said.readline() or -signal.SIGKILL)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve(listening: socket.socket, *packages: str) -> None:
    """Be the process that is copied. Returns in a copy alone, which then is to become a kernel."""
    before = dict(os.environ)
    if sys.path[0] == str(Path(__file__).parent):  # of this file, as a program
        del sys.path[0]
    for package in packages:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    imported = dict(os.environ.items() - before.items())  # what imports set, as they have in whoever has made the same ones
    gc.freeze()  # so that collecting garbage in a copy writes to no page that it shares
    whole = threading.active_count() == 1 and _cuda_starts_in_copies()  # a copy would lack any other thread
    ended, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    places: dict[int, socket.socket] = {}  # by the copy's process id
    with selectors.DefaultSelector() as selector:
        for source in (0, ended, listening):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:  # `kernels()` is over
                    for pid in places:
                        _end(pid)
                    shutil.rmtree(Path(listening.getsockname()).parent, ignore_errors=True)  # which a killed process leaves
                    os._exit(0)
                elif key.fileobj == ended:
                    os.read(ended, 4096)
                    _report(places, selector)
                elif key.fileobj is listening:
                    place, _ = listening.accept()
                    what, files = _asked(place)
                    if what is None or not whole or _matters(imported | what["environment"]) != _matters(os.environ):
                        place.close()
                    elif pid := os.fork():
                        places[pid] = place
                        selector.register(place, selectors.EVENT_READ, pid)
                        with contextlib.suppress(OSError):  # of a place that was killed meanwhile, as is seen next
                            place.sendall(b"%d\n" % pid)
                    else:
                        for connection in (listening, place, *places.values()):
                            connection.close()
                        what["environment"] = imported | what["environment"]
                        return _begin(what, files, (ended, waking))
                    for file in files:
                        os.close(file)
                elif key.data in places:  # a place is empty
                    _end(key.data)
                    selector.unregister(key.fileobj)


def _cuda_starts_in_copies() -> bool:
    """Not if an import has asked for the GPUs: torch refuses CUDA to a fork of a process that has."""
    if not hasattr(getattr(sys.modules.get("torch"), "_C", None), "_cuda_isInBadFork"):
        return True
    if not (pid := os.fork()):
        os._exit(sys.modules["torch"]._C._cuda_isInBadFork())
    return os.waitpid(pid, 0)[1] == 0


def _asked(place: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What is wanted, and the files that will be its input, output and errors; None from a place that was killed meanwhile."""
    files: list[int] = []
    try:
        _, files, *_ = socket.recv_fds(place, 1, 3)
        with place.makefile("rb") as said:
            return json.loads(said.readline()), files
    except (OSError, ValueError):
        return None, files


def _end(pid: int) -> None:
    """Kill a copy and what it started; itself alone where it has no group of its own yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _report(places: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tell the places of copies that have ended how they ended."""
    while places:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        place = places.pop(pid)
        with contextlib.suppress(KeyError):  # it was empty
            selector.unregister(place)
        with contextlib.suppress(OSError):
            place.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        place.close()


def _begin(what: Mapping[str, Any], files: list[int], mine: tuple[int, ...]) -> None:
    """In a copy: what a process of its own would have."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    parent = os.getppid()
    os.setsid()
    for to, file in enumerate(files):
        os.dup2(file, to)
    for file in (*files, *mine):
        os.close(file)
    os.chdir(what["folder"])
    os.environ.clear()
    os.environ |= what["environment"]
    sys.argv = ["ipykernel_launcher", *what["arguments"], f"--IPKernelApp.parent_handle={parent}"]  # with which a kernel ends
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # a process of its own has a state that no other has


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "stand":
        _stand(where, *rest)
    else:
        _serve(socket.socket(fileno=int(where)), *rest)
        importlib.import_module("ipykernel.kernelapp").launch_new_instance()
