"""allocator.py: what is freed stays with the process, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from pdiff_lib.base import runs
def step():
    return torch.empty(4_000_000).fill_(1.0).sum().item()  # 16 MB
assert step() == step() == 4e6
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library's malloc")
@pytest.mark.parametrize("environment, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_what_is_freed_is_kept_for_the_next_step(environment, kept):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", STEPS], env=plain | environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) == kept, done.stdout  # of 78,000 pages
