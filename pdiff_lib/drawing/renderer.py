"""Pictures of figures: one browser draws all of a process, and ends with it."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing.util
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

CLOSING = 15.0  # seconds that a browser may take to close; when its process ends it closes by itself


class Renderer:
    """A browser without a window, driven from a thread of its own: a kernel's own event loop may be busy.

    `kaleido.start_sync_server` would do nearly this, but waits without end for a browser that does not start, and in a
    forked process.

    Raises:
        ChromeNotFoundError: there is no browser. Other errors of `kaleido` when it does not start.
    """

    def __init__(self):
        import kaleido  # a tenth of a second that only this needs

        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        try:
            self._browser = self._wait(self._opened(kaleido.Kaleido))
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        # Called once, at the end of this process, be it one of `multiprocessing` (where `atexit` is not), and of no fork of
        # it. By `atexit` before what is older: the removal of the browser's folder, which fails while the browser writes.
        self.close = multiprocessing.util.Finalize(None, self._close, exitpriority=0)
        atexit.register(self.close)

    @staticmethod
    async def _opened(kind: type) -> Any:
        browser = kind()  # takes hold of the loop that it is made in
        try:
            await browser.open()
        except BaseException:
            await browser.close()
            raise
        return browser

    def _wait(self, work: Coroutine, seconds: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def draw(self, fig: go.Figure, path: Path) -> None:
        """As `draw` below, by this browser or not at all."""
        self._wait(self._browser.write_fig(fig, path, cancel_on_error=True))

    def _close(self) -> None:
        try:
            self._wait(self._browser.close(), CLOSING)
        except Exception:  # dead, or stuck: it ends when this process lets go of it, and there is nobody to tell
            pass
        self._loop.call_soon_threadsafe(self._loop.stop)


_lock, _kept, _parents = threading.Lock(), None, None


def draw(fig: go.Figure, path: Path) -> None:
    """A picture of a figure, in the format of the path's ending.

    The first starts a browser (3 s), which the others share (0.3 s). One that has died since is started again; kaleido
    notices a dead tab in a live browser after 90 s.

    Raises:
        ChromeNotFoundError: there is no browser to draw with. Other errors of `kaleido` when it does not start or draw.
    """
    global _kept
    with _lock:
        for last in (_kept is None, True):
            _kept = _kept or Renderer()
            try:
                return _kept.draw(fig, path)
            except Exception:
                _kept.close()
                _kept = None
                if last:
                    raise


def _forked() -> None:
    """A fork has its parent's browser, but not the thread that drives it, nor a lock that another thread may have held."""
    global _lock, _kept, _parents
    _lock, _kept, _parents = threading.Lock(), None, _kept  # the parent's is not collected here: that would end it


os.register_at_fork(after_in_child=_forked)
