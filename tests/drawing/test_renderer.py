"""renderer.py: one browser draws the pictures of a process, whatever happens to either."""

import json
import subprocess
import sys

import psutil
import pytest

from browser import CHROMIUM

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")

START = """
import json, multiprocessing, os, pathlib, psutil, sys
import plotly.graph_objects as go
from pdiff_lib.drawing import renderer

folder = pathlib.Path(sys.argv[1])

def draw(name):
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4])).update_layout(title=f"this is {name}", width=400, height=300)
    renderer.draw(figure, folder / name)

def browsers():
    return [p.pid for p in psutil.Process().children()]
"""

DRAW = START + """
for name in ("one.svg", "two.svg", "three.png"):
    draw(name)
    print(json.dumps(browsers()))
fork = multiprocessing.get_context("fork")
worker = fork.Process(target=lambda: (draw("of-a-fork.svg"), print(json.dumps(browsers()), flush=True)))
worker.start()
worker.join(60)
print(worker.exitcode)
if os.fork() == 0:
    sys.exit()  # nothing of the parent's is closed
os.wait()
draw("after-a-fork.svg")
print(json.dumps(browsers()))
try:
    draw("four.txt")
except ValueError as e:
    print(repr(e))
print(json.dumps(browsers()))
draw("after-a-failure.svg")
psutil.Process().children()[0].kill()
draw("after-a-kill.svg")
print(json.dumps(browsers()))
"""

STAY = START + """
draw("one.svg")
print(json.dumps([p.pid for p in psutil.Process().children(recursive=True)]), flush=True)
sys.stdin.read()
"""


def test_one_browser_draws_all_and_ends_with_the_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", DRAW, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    *three, forked, code, after_fork, refused, after_failure, last = done.stdout.splitlines()
    assert len(three) == 3 and len({*three, after_fork}) == 1 and len(json.loads(three[0])) == 1, "one browser, and it stays"
    assert code == "0" and len(json.loads(forked)) == 1 and forked != three[0], "a fork has a browser of its own"
    assert "txt" in refused and json.loads(after_failure) == [], "a failure leaves no browser behind"
    assert len(json.loads(last)) == 1
    assert not any(psutil.pid_exists(pid) for line in (*three, forked, last) for pid in json.loads(line))
    for name in ("one", "two", "of-a-fork", "after-a-fork", "after-a-failure", "after-a-kill"):
        picture = (tmp_path / f"{name}.svg").read_text()
        assert f"this is {name}.svg" in picture and 'width="400"' in picture
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_leaves_no_browser(tmp_path, killed):
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen([sys.executable, "-c", STAY, str(tmp_path)], **pipes, text=True) as process:
        browsers = [psutil.Process(pid) for pid in json.loads(process.stdout.readline())]
        assert len(browsers) > 2
        if killed:
            process.kill()
        else:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0 and errors == "", "a quiet end"
    assert not psutil.wait_procs(browsers, timeout=60)[1]
