"""What explorers share that compute for a while: beside the kernel's other work, with a progress bar, and until someone presses Stop."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Callable, Coroutine

import ipywidgets as widgets


class Stopped(Exception):
    """Someone pressed Stop."""


class Work(widgets.VBox):
    """An explorer that computes on demand. Derived classes call `_work` before they are laid out."""

    def _work(self, *controls: widgets.Widget) -> None:
        """Make `stop_button`, `progress` and `status`.

        Args:
            controls: are not to be used while something is computed.
        """
        self._stop, self._controls = False, controls
        self.stop_button = widgets.Button(description="Stop", disabled=True, tooltip="keep what is complete, and stop")
        self.progress = widgets.FloatProgress(max=1.0, layout={"width": "220px"})
        self.status = widgets.HTML()
        self.stop_button.on_click(lambda _: self.stop())

    def _start(self, work: Coroutine) -> None:
        """Run beside the kernel's other work; without a loop (a script), here and now."""
        try:
            self.task = asyncio.get_running_loop().create_task(work)
        except RuntimeError:
            asyncio.run(work)

    def stop(self) -> None:
        """End what is being computed, at its next step."""
        self._stop = True

    async def _watched(self, work: Callable[[Callable[[], None]], Coroutine], total: int) -> None:
        """Await `work(tick)` with the progress bar at the share of `total` ticks; Stop ends it at a tick."""
        loop, done, drawn = asyncio.get_running_loop(), 0, 0.0

        def tick() -> None:  # in the thread that samples, which must not touch a widget
            nonlocal done, drawn
            if self._stop:
                raise Stopped
            done += 1
            if time.monotonic() - drawn > 0.1:
                drawn = time.monotonic()
                loop.call_soon_threadsafe(setattr, self.progress, "value", done / total)

        self._busy(True)
        try:
            self.status.value = await work(tick)
            self.progress.value = 1.0
        except Stopped:
            self.status.value = f"stopped; {self.status.value}"
        except Exception as e:  # no cell shows what happens after it has ended
            self.status.value = f"<b>{html.escape(f'{type(e).__name__}: {e}')}</b>"
        finally:
            self._busy(False)

    def _busy(self, busy: bool) -> None:
        self._stop, self.stop_button.disabled = False, not busy
        for control in self._controls:
            control.disabled = busy
