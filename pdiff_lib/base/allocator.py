"""Memory that a training step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import os

LARGEST = 32 * 2**20  # bytes of what is kept so; glibc takes no more
KEPT = 2**30  # bytes that may lie unused at the end of the heap
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed() -> bool:
    """Have glibc keep freed memory, where it would give large blocks back to the system, which hands them out again page by page, each filled with
    zeros: an eighth of the processor time of a ResNet-18's training step. Whether it does: not where there is no glibc, or where the environment
    says how it is to be (`MALLOC_..._THRESHOLD_`)."""
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, KEPT))
