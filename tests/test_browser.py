"""The committed quickstart in a real JupyterLab: its figures are drawn, the slider moves the denoising, a point answers."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "00_quickstart.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
         "--disable-component-update", "--no-first-run"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab of its own over a copy of the notebook; yields the notebook's address."""
    shutil.copy(NOTEBOOK, tmp_path / "x.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    private = {f"JUPYTER{k}_DIR": str(tmp_path / k) for k in ("_CONFIG", "_DATA", "LAB_SETTINGS", "LAB_WORKSPACES")}
    # All cells in the page, also those out of view, so that their figures can be found.
    settings = tmp_path / "LAB_SETTINGS" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token=secret"],
            env={**os.environ, **private}, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=secret", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/x.ipynb?token=secret&reset"
    finally:
        server.terminate()
        server.wait(20)


def test_figures_of_the_quickstart_answer(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1400})
        page.goto(lab)
        plots = page.locator(".jp-Notebook .js-plotly-plot")
        plots.nth(2).wait_for(state="attached", timeout=120_000)
        assert plots.count() == 3, "scatter, heatmap and trajectory"

        scatter = plots.nth(0)
        scatter.scroll_into_view_if_needed()
        point = scatter.locator(".points path.point").first
        box = point.bounding_box()
        page.mouse.move(box["x"] - 20, box["y"] - 20)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
        scatter.locator(".hoverlayer .hovertext").first.wait_for(timeout=10_000)
        assert "nearest original" in scatter.locator(".hoverlayer").text_content()

        trajectory = plots.nth(2)
        trajectory.scroll_into_view_if_needed()
        picture = trajectory.locator(".heatmaplayer image")
        label = trajectory.locator(".slider-label").first
        before, text = picture.evaluate("e => e.href.baseVal"), label.text_content()
        assert text.endswith(": 0")
        rail = trajectory.locator(".slider-rail-touch-rect").bounding_box()
        page.mouse.click(rail["x"] + 5, rail["y"] + rail["height"] / 2)
        page.wait_for_timeout(1500)
        assert label.text_content().endswith(": 1000")
        assert picture.evaluate("e => e.href.baseVal") != before, "the heatmap shows the other moment"
        browser.close()
