"""A sweep in real processes, and the ways to disturb it."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat import v4

HERE = Path(__file__).resolve().parents[2]
CELLS = ["""k_checkpoints = 2
seed = 0
seconds = 1.0
fail_at = 0
log = ''""", """from work import note, stage
from pdiff_lib.base import runs
run = runs.Run("faulty", {"k_checkpoints": k_checkpoints, "seed": seed})""",
         'shared = stage(log, "shared", {"seed": seed}, seconds)',
         'own = stage(log, "own", {"seed": seed, "k": k_checkpoints}, seconds)',
         "assert k_checkpoints != fail_at, 'asked to fail'",
         """run.record({"sum": float((shared + k_checkpoints * own).double().sum())})
note(log, "run", seed, k_checkpoints)"""]
SUM = 45 * 999 * 500  # of a stage: ten steps i, each adding arange(1000) * i


class Sweep:
    """A sweep file over a notebook of two stages per run, one of them shared by the runs of a seed, in a folder of its own."""

    def __init__(self, folder: Path, ks: list[int], seeds: list[int], seconds: float = 1.0, runs: Path | None = None, **fixed):
        self.folder, self.ks, self.seeds, self.log = folder, ks, seeds, folder / "log"
        self.runs, self.file, self.count = runs or folder / "runs", folder / "grid.yaml", 0
        self.seen: dict[Path, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        cells = [v4.new_code_cell(source) for source in CELLS]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
        nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), folder / "faulty.ipynb")
        self.file.write_text(yaml.safe_dump({
            "notebook": str(folder / "faulty.ipynb"),
            # A bare path would be an input, which must not change while a run reads it.
            "parameters": {"seconds": seconds, "log": f"file:{self.log}", **fixed},
            "grid": {"k_checkpoints": ks}, "seeds": seeds}))
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PDIFF_RUN_DIR", "PDIFF_STORAGE")} | {
            "PDIFF_RUNS": str(self.runs), "PYTHONPATH": f"{HERE}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str) -> subprocess.Popen:
        """The sweep in a process of its own."""
        self.count += 1
        with open(self.folder / f"out-{self.count}", "w") as out:
            return subprocess.Popen([sys.executable, "-m", "pdiff_lib.batches.cli", "sweep", str(self.file), *arguments], stdout=out,
                                    stderr=out, env=self.environment, cwd=self.folder)

    def finish(self, *arguments: str, timeout: float = 240) -> tuple[int, str]:
        """The sweep to its end: exit code and output."""
        process = self.start(*arguments)
        out = self.folder / f"out-{self.count}"
        return process.wait(timeout), out.read_text()

    def lines(self, kind: str) -> list[str]:
        return [x for x in (self.log.read_text().splitlines() if self.log.exists() else []) if x.split()[0] == kind]

    def wait_for(self, count: int, kind: str = "start", timeout: float = 90) -> None:
        """Until the log holds so many lines of a kind."""
        until = time.monotonic() + timeout
        while len(self.lines(kind)) < count:
            assert time.monotonic() < until, self.said()
            time.sleep(0.05)

    def at_work(self) -> psutil.Process:
        """The kernel that began a stage last."""
        return psutil.Process(int(self.lines("start")[-1].split()[4]))

    def said(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("out-*")))

    def look(self) -> list[str]:
        """Note which runs are complete; returns those that were complete before and have been written again."""
        now = {p: p.stat().st_ino for p in self.runs.glob("faulty/*/faulty.ipynb")}
        again = [f"{p} was complete and is {now.get(p)} now" for p, inode in self.seen.items() if now.get(p) != inode]
        self.seen = now
        return again

    def again(self) -> list[str]:
        """Runs whose last cell was executed more than once: killed after it, before they were complete."""
        return [r for r, n in Counter(self.lines("run")).items() if n > 1]

    def losses(self) -> list[str]:
        """Everything that is not as it should be after the end: empty when each run is complete, and whole."""
        from pdiff_lib.base import runs

        wrong = self.look()
        every = {f"run {s} {k}" for s in self.seeds for k in self.ks}
        if set(self.lines("run")) != every:
            wrong.append(f"runs without an end: {sorted(every - set(self.lines('run')))}")
        wrong += [f"computed {n} times: {what}" for what, n in Counter(self.lines("end")).items() if n != 1]
        folders = [p for p in (self.runs / "faulty").iterdir() if p.is_dir()]
        if len(folders) != len(every):
            wrong.append(f"{len(folders)} folders, expected {len(every)}")
        for folder in folders:
            if {p.name for p in folder.iterdir()} != {"faulty.ipynb", "record.json", "parameters.yaml"}:
                wrong.append(f"{folder} holds {sorted(p.name for p in folder.iterdir())}")
            nbformat.validate(nbformat.read(folder / "faulty.ipynb", as_version=4))
        stages = [p for p in (self.runs / "stages").rglob("*") if p.is_file() and p.suffix != ".lock"]
        if len(stages) != len(self.seeds) * (1 + len(self.ks)):
            wrong.append(f"{len(stages)} files of stages: {stages}")
        for file in stages:
            if runs.read(file)[0]["sum"].double().sum() != SUM:
                wrong.append(f"{file} is not what its steps add up to")
        return wrong


def kernels(sweep: subprocess.Popen) -> list[psutil.Process]:
    """The kernels under a sweep."""
    found = []
    for process in psutil.Process(sweep.pid).children(recursive=True):
        try:
            if any("ipykernel_launcher" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def kill(process) -> None:
    """As the kernel of the operating system does when memory is short: no warning, no cleaning up."""
    os.kill(process.pid, signal.SIGKILL)
