"""Kernels of a notebook's imports, one after the other as a sweep starts them: copies of a process that has made them, or each from the start.

    python tests/benchmarks/bench_kernels.py

Both sides in this run, alternately, with the same threads; the warm side pays for its process in each round. Wall time from a kernel's start until it
has imported what the quickstart imports, and the processor time of all processes.
"""

import os
import resource
import time

from jupyter_client import KernelManager

from pdiff_lib.batches import jobs, warm

RUNS, ROUNDS = 8, 2
IMPORTS = next(c for c in jobs.code(jobs.find("00")) if c.startswith("import")).partition("\nrecipe")[0]


def kernel() -> None:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(jobs.NOTEBOOKS), extra_arguments=["--log-level=ERROR"])
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(120)
    reply = client.execute_interactive(IMPORTS, timeout=120)
    assert reply["content"]["status"] == "ok", reply
    client.stop_channels()
    manager.shutdown_kernel()


def spent() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def cold() -> None:
    for _ in range(RUNS):
        kernel()


def copies() -> None:
    with warm.kernels():
        cold()


def main():
    best = {}
    for _ in range(ROUNDS):
        for side in (cold, copies):
            start, before = time.perf_counter(), spent()
            side()
            found = time.perf_counter() - start, spent() - before
            best[side] = min(best.get(side, found), found)
    print(f"{RUNS} kernels, {os.environ.get('OMP_NUM_THREADS', 'all')} threads")
    for i, name in enumerate(("wall time", "processor time")):
        print(f"{name:16}{best[cold][i]:8.1f} s from the start{best[copies][i]:8.1f} s as copies{best[cold][i] / best[copies][i]:8.1f}x")


if __name__ == "__main__":
    main()
