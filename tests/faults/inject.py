"""Many runs under random faults, and the table of what was lost (`tests/faults/README.md` holds one).

    python tests/faults/inject.py --faults 30 --seed 0

Every few seconds a worker, a kernel or the sweep itself is killed (SIGKILL); a sweep that was killed is started again, and
half of the time two of them run over the same grid. At the end each run must have ended once, each stage must have been
computed once, and every file must be whole.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=24)
    arguments = parser.parse_args()
    chance, injected, start = random.Random(arguments.seed), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        s = harness.Sweep(Path(folder), list(range(2, 2 + arguments.runs // 3)), [0, 1, 2], seconds=2)
        sweeps, wrong = [s.start("--workers", "2")], []
        while injected.total() < arguments.faults:
            time.sleep(chance.uniform(3, 12))
            sweeps = [p for p in sweeps if p.poll() is None]
            if len(sweeps) < 1 + chance.randint(0, 1):
                sweeps.append(s.start("--workers", "2"))
                injected["a second sweep"] += len(sweeps) == 2
            what, p = chance.choice(["worker", "kernel", "kernel", "sweep"]), chance.choice(sweeps)
            kernels = harness.kernels(p)
            try:
                if what == "sweep":
                    harness.kill(p)
                elif kernels:
                    harness.kill(kernels[0] if what == "kernel" else kernels[0].parent())
                else:
                    continue
                injected[f"kill -9 of a {what}"] += 1
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass  # it had just ended
            wrong += s.look()
            print(f"{time.monotonic() - start:4.0f} s: {injected.total()} faults, {len(set(s.lines('run')))} runs ended", flush=True)
        for p in sweeps:
            p.wait(600)
        code, said = s.finish("--workers", "2", timeout=1200)
        lost = wrong + s.losses()
        again = len(s.again())
        begun, ended = len(s.lines("start")), len(s.lines("end"))
        resumed = sum(int(line.split()[3]) > 0 for line in s.lines("start"))
    print(*(f"| {what} | {n} |" for what, n in sorted(injected.items())), sep="\n")
    print(f"{arguments.runs} runs; stages: {ended} computed, begun {begun} times, {resumed} times from a checkpoint; "
          f"killed between its last cell and completion, and so executed again: {again}; "
          f"{time.monotonic() - start:.0f} s; exit code of the last sweep {code}; lost or done twice: {lost or 'nothing'}")
    raise SystemExit(bool(lost or code))


if __name__ == "__main__":
    main()
