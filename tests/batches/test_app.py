"""app.py: the page asks for a token, at every door, also on the loopback that all users of a machine share."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from voila.app import Voila

from pdiff_lib.batches import app, cli

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
SERVE = """import sys
from pathlib import Path
from pdiff_lib.batches import app
app.serve(Path(sys.argv[1]), {}, port=0, open_browser=False)"""


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """`pdiff app` that starts no server: the Voila that it would start, with its arguments, and what it prints."""
    started = []
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    monkeypatch.delenv("PDIFF_TOKEN", raising=False)
    monkeypatch.setattr(Voila, "launch_instance", classmethod(lambda kind, arguments: started.append((kind, arguments))))

    def asked(*arguments):
        monkeypatch.setattr(sys, "argv", ["pdiff", "app", "--port", "0", *arguments])
        with pytest.raises(SystemExit, match="^0$"):
            cli.main()
        return *started.pop(), capsys.readouterr().out
    return asked


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0", ""])
def test_every_server_has_a_token_of_its_own_that_is_printed(ask, host):
    tokens = []
    for _ in range(2):
        _, arguments, printed = ask("--host", host)
        tokens += re.findall(r"^http://[^ /]+:\d+/\?token=([\w-]{32}) shows 50_explore.ipynb", printed)
        assert f"--Voila.token={tokens[-1]}" in arguments and f"--Voila.ip={host}" in arguments
    assert len(set(tokens)) == 2


def test_a_token_of_ones_own(ask, monkeypatch):
    monkeypatch.setenv("PDIFF_TOKEN", "from-the-environment")
    for given, token in (([], "from-the-environment"), (["--token", "from-the-command"], "from-the-command")):
        _, arguments, printed = ask(*given)
        assert f"--Voila.token={token}" in arguments and f"/?token={token} shows" in printed


def test_the_browser_opens_with_the_token_which_no_list_of_processes_shows(ask, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(app.webbrowser, "open", opened.append)
    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path))
    kind, _, _ = ask("--token", "secret-token")
    kind.launch_browser(None)
    file = Path(opened[0].removeprefix("file://"))
    assert "secret" not in opened[0] and "/?token=secret-token" in file.read_text() and file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("token", ["short", "None", '"aaaaaaaa"', "a b c d e", "a&b=cdefg", "äääääääää"])
def test_a_token_that_would_not_work_is_refused(token):
    with pytest.raises(ValueError, match="the token is too short, or holds"):
        app.serve(Path("x.ipynb"), {}, token=token)


def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and text, without following to the login page."""
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    try:
        with urllib.request.build_opener(Stay).open(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_a_real_server_lets_nobody_in_without_the_token(tmp_path):
    cells = [v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}),
             v4.new_code_cell(f"open({str(tmp_path / 'ran')!r}, 'w')\nprint('SE' + 'CRET')")]
    nbformat.write(v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / "x.ipynb")
    environment = {**os.environ, "PDIFF_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(Path(app.__file__).parents[2])}
    server = subprocess.Popen([sys.executable, "-c", SERVE, tmp_path / "x.ipynb"],
                              env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url, token = re.match(r"(http://127\.0\.0\.1:\d+)/\?token=(\S{32}) shows x.ipynb", server.stdout.readline()).groups()
        until = time.monotonic() + 60
        while True:
            try:
                get(f"{url}/login")
                break
            except urllib.error.URLError:
                assert time.monotonic() < until and server.poll() is None
                time.sleep(0.1)
        websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                     "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        some = "00000000-0000-0000-0000-000000000000"
        for door, headers in (("/", {}), ("/?token=another-token", {}), ("/", {"Authorization": "token another-token"}),
                              (f"/api/kernels/{some}", {}), (f"/api/kernels/{some}/channels", websocket),
                              ("/voila/files/x.ipynb", {}), (f"/voila/api/shutdown/{some}", {})):
            status, text = get(url + door, **headers)
            assert status in (302, 403) and "SECRET" not in text, door
        assert not (tmp_path / "ran").exists(), "no kernel was started"
        for headers, door in (({}, f"/?token={token}"), ({"Authorization": f"token {token}"}, "/")):
            status, text = get(url + door, **headers)
            assert status == 200 and "SECRET" in text
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_an_interrupt_ends_it_wherever_it_arrives(tmp_path):
    """Also where Python drops an exception: in what it calls when an object is forgotten."""
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})], metadata=KERNEL), tmp_path / "x.ipynb")
    forgotten = """import os, signal, weakref
from tornado.ioloop import IOLoop
class Thing: pass
thing = Thing()
watch = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
IOLoop.current().call_later(0.5, lambda: globals().pop("thing") and None)
"""
    environment = {**os.environ, "PDIFF_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(Path(app.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", forgotten + SERVE, tmp_path / "x.ipynb"], env=environment, cwd=tmp_path, check=True, timeout=60,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
