"""JupyterLab and Chromium for tests and benchmarks: servers of their own, a headless browser."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
         "--disable-component-update", "--no-first-run"]
HERE = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def served(command: list[str], log: Path, up: str = "", **environment: str):
    """A server; yields its address once it answers: `up`, or the one that its first line of output begins with."""
    with open(log, "w") as errors:
        server = subprocess.Popen(command, env={**os.environ, **environment}, stderr=errors, cwd=HERE, text=True,
                                  stdout=errors if up else subprocess.PIPE)
    try:
        address = up or (server.stdout.readline().split() or [""])[0]
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(address if up else address.partition("?")[0] + "voila/static/none", timeout=5)
                break
            except urllib.error.HTTPError:  # an answer
                break
            except OSError:
                time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait(60)


@contextlib.contextmanager
def lab(folder: Path, **environment: str):
    """A JupyterLab over the folder; yields what turns a notebook's name into its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    private = {f"JUPYTER{k}_DIR": str(folder / k) for k in ("_CONFIG", "_DATA", "LAB_SETTINGS", "LAB_WORKSPACES")}
    for name, text in {
            # All cells in the page, also those out of view, so that their figures can be found; and no question about news.
            "notebook-extension/tracker": '{"windowingMode": "none"}',
            "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}.items():
        settings = folder / "LAB_SETTINGS" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(text)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=secret"]
    with served(command, folder / "log", f"http://127.0.0.1:{port}/api/status?token=secret", **private, **environment):
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token=secret&reset"


@contextlib.contextmanager
def chromium():
    """A page of 1400 pixels in a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1400})
        page.set_default_timeout(120_000)  # what is waited for takes a second, or a hundred where others compute
        yield page
        browser.close()


def run_all(page, seconds: float = 300) -> None:
    """Run all cells of the open notebook, which has no outputs yet, to the end."""
    # A busy machine answers late, and JupyterLab asks what to do about it (which kernel, try again).
    dialog = page.locator(".jp-Dialog")
    # One answer may bring the next question: no_wait_after, or it would wait for the last to go before it answers that.
    page.add_locator_handler(dialog, lambda: dialog.locator(".jp-mod-accept").last.click(), no_wait_after=True)
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    idle.wait_for()
    until, waited = time.monotonic() + seconds, 0
    while not page.evaluate("""() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
                               .every(e => /\\d/.test(e.textContent)) || document.querySelector(
                               '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]') !== null"""):
        assert time.monotonic() < until, f"not at the end after {seconds:g} s: {page.locator('.jp-InputPrompt').all_text_contents()}"
        begun = page.locator(".jp-CodeCell .jp-InputPrompt").filter(has_text=re.compile(r"[\d*]")).count()
        waited = waited + 1 if idle.count() else 0
        if not begun or waited > 20:
            # A page that is still busy loses the click, and a kernel that has just come what it is asked.
            page.keyboard.press("Escape")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.locator('[data-command="runmenu:run-all"]').click()
            waited = 0
            page.wait_for_timeout(3000)
        page.wait_for_timeout(500)
    errors = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.all_text_contents() == []
