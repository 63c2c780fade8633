"""app.py: what others can reach asks for a token, at every door."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from pdiff_lib.batches import app, cli

SERVE = """import sys
from pathlib import Path
from pdiff_lib.batches import app
app.serve(Path(sys.argv[1]), {}, port=int(sys.argv[2]), open_browser=False, token=sys.argv[3])"""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_this_machines_own_addresses(host):
    assert app._loopback(host)


@pytest.mark.parametrize("host",
                         ["0.0.0.0", "", "::", "0", "10.0.0.1", "fe80::1", "192.168.1.1", "8.8.8.8", "no.such.name.invalid",
                          "127.0.0.1.example"])
def test_what_others_reach_needs_a_token(host, monkeypatch, tmp_path):
    monkeypatch.delenv("PDIFF_TOKEN", raising=False)
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pdiff", "app", "--host", host])
    with pytest.raises(SystemExit, match="expected a token"):
        cli.main()
    assert not list(tmp_path.iterdir())


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
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    cells = [v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}),
             v4.new_code_cell(f"open({str(tmp_path / 'ran')!r}, 'w')\nprint('SE' + 'CRET')")]
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "x.ipynb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PDIFF_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(Path(app.__file__).parents[2])}
    server = subprocess.Popen([sys.executable, "-c", SERVE, tmp_path / "x.ipynb", str(port), "a-token-of-ours"],
                              env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert f"http://127.0.0.1:{port}/?token=a-token-of-ours shows x.ipynb" in server.stdout.readline()
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
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
        for headers, door in (({}, "/?token=a-token-of-ours"), ({"Authorization": "token a-token-of-ours"}, "/")):
            status, text = get(url + door, **headers)
            assert status == 200 and "SECRET" in text
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
