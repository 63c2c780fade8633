"""A plugin of pytest (`-p tests.warm`): kernels that its processes start begin warm."""

import contextlib

from pdiff_lib.batches import warm

session = contextlib.ExitStack()


def pytest_configure():
    session.enter_context(warm.kernels())


def pytest_unconfigure():
    session.close()
