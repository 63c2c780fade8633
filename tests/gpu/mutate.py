"""Whether a test of `test_gpu.py` notices when the library forgets to move a tensor: one move after the other is dropped.

    python tests/gpu/mutate.py [--list] [module ...]

A move: `.to` somewhere, `.cpu()`, `.cuda()`, a `device=` in a call, the device of a `torch.Generator`. It is dropped in a copy
of the package, and the tests that reach its line run until one fails. Named modules ("pdiff zoo") instead of all; `--list`
only names the moves. Each copy runs in a fork of this process, which has imported torch.
"""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import pytest

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "pdiff_lib"
LIMIT = 300  # seconds for the tests of one move; what takes longer counts as noticed


class Move(NamedTuple):
    file: str
    first: int  # its lines
    last: int
    number: int  # among the moves of its file
    text: str


class Dropping(ast.NodeTransformer):
    """Finds all moves of a module; takes out the one with a number."""

    def __init__(self, file: str, drop: int | None = None):
        self.file, self.drop, self.moves = file, drop, []

    def _is_dropped(self, node: ast.Call, text: str) -> bool:
        self.moves.append(Move(self.file, node.lineno, node.end_lineno, len(self.moves), text))
        return self.moves[-1].number == self.drop

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in ("cpu", "cuda") and not node.args and self._is_dropped(node, f".{name}()"):
            return node.func.value
        places = [a for a in node.args if not _is_type(a)] if name in ("to", "Generator") else []
        if places and self._is_dropped(node, f"{name}({ast.unparse(places[0])})"):
            node.args = [a for a in node.args if a not in places]
            return node if node.args or node.keywords or name == "Generator" else node.func.value
        for keyword in [k for k in node.keywords if k.arg == "device" and ast.unparse(k.value) != "None"]:
            if self._is_dropped(node, f"{ast.unparse(node.func)}(device={ast.unparse(keyword.value)})"):
                node.keywords.remove(keyword)
        return node


def _is_type(argument: ast.AST) -> bool:
    text = ast.unparse(argument)
    return text.startswith(("torch.float", "torch.int", "torch.uint", "torch.bool")) or text.endswith("dtype")


def moves_of(file: Path) -> list[Move]:
    found = Dropping(str(file.relative_to(PACKAGE)))
    found.visit(ast.parse(file.read_text()))
    return found.moves


class Reach:
    """Which tests pass, how long they take, and which of some lines each of them executes: a plugin of pytest."""

    def __init__(self, lines: set[tuple[str, int]]):
        self.lines, self.reached, self.seconds, self.test = lines, defaultdict(set), {}, ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.test = item.nodeid
        sys.settrace(self._enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration

    def _enter(self, frame, event, value):
        path = Path(frame.f_code.co_filename) if "pdiff_lib" in frame.f_code.co_filename else None
        return self._step if path and "pdiff_lib" in path.parts else None

    def _step(self, frame, event, value):
        here = frame.f_code.co_filename.rpartition("pdiff_lib/")[2], frame.f_lineno
        if here in self.lines:
            self.reached[here].add(self.test)
        return self._step

    def tests_of(self, move: Move) -> list[str]:
        """The tests that reach a move, the shortest first."""
        tests = set().union(*(self.reached[move.file, line] for line in range(move.first, move.last + 1)))
        return sorted(tests & self.seconds.keys(), key=self.seconds.get)


def run(package: Path, *arguments: str, plugins=()) -> int:
    """pytest, on the package in this folder."""
    sys.path.insert(0, str(package))
    return pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *arguments], plugins=[*plugins])


def notices(move: Move, tests: list[str]) -> bool:
    """Whether one of the tests fails without the move."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "pdiff_lib"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        dropping = Dropping(move.file, move.number)
        tree = dropping.visit(ast.parse((PACKAGE / move.file).read_text()))
        (copy / move.file).write_text(ast.unparse(ast.fix_missing_locations(tree)))
        child = os.fork()
        if child == 0:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            signal.alarm(LIMIT)
            jaxtyping.install_import_hook = lambda *_: None  # without checks of types, half the time
            os._exit(int(run(Path(folder), *tests)))
        return os.waitpid(child, 0)[1] != 0


def main() -> None:
    os.chdir(TESTS.parent)
    wanted = [a for a in sys.argv[1:] if not a.startswith("-")]
    files = [f for f in sorted(PACKAGE.rglob("*.py")) if not wanted or f.stem in wanted]
    moves = [m for f in files for m in moves_of(f)]
    if "--list" in sys.argv:
        print("\n".join(f"{m.file}:{m.first} {m.text}" for m in moves), f"\n{len(moves)} moves")
        return
    reach = Reach({(m.file, line) for m in moves for line in range(m.first, m.last + 1)})
    reader, writer = os.pipe()
    if os.fork() == 0:  # so that this process never imports the package as it is
        run(TESTS.parent, "--maxfail=1000", "tests/test_gpu.py", plugins=[reach])
        with os.fdopen(writer, "w") as file:
            file.write(repr((dict(reach.reached), reach.seconds)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        reached, reach.seconds = ast.literal_eval(file.read())
    reach.reached.update(reached)
    found: Counter[str] = Counter()
    for move in moves:
        start, tests = time.monotonic(), reach.tests_of(move)
        result = "not reached" if not tests else "noticed" if notices(move, tests) else "unnoticed"
        found[result] += 1
        took = f"{len(tests)} tests, {time.monotonic() - start:.0f} s"
        print(f"{result:12} {move.file}:{move.first} {move.text} ({took})", flush=True)
    print(f"{len(moves)} moves: " + ", ".join(f"{n} {result}" for result, n in found.items()))


if __name__ == "__main__":
    for slow in ("timm", "torch._dynamo", "torchvision.transforms.v2", "pandas", "pyarrow.parquet", "plotly.graph_objects",
                 "sklearn.decomposition", "scipy.optimize", "ipywidgets", "papermill"):
        importlib.import_module(slow)  # once for all forks
    main()
