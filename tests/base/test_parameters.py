"""parameters.py: text means what it says, to us as to papermill; what could mean two things, run code or grow is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import v4
from papermill.cli import _resolve_type
from papermill.iorw import NoDatesSafeLoader

from pdiff_lib.base import parameters
from pdiff_lib.batches import jobs, sweep

TEXTS = ["True", "False", "None", "true", "false", "none", "null", "yes", "no", "on", "off", "~", "", " ", "0", "1", "-1",
         "+1", "012", "1_000", " 5 ", "1.", ".5", "-0.0", "1e-4", "1E5", "1e", "e1", "1e400", "nan", "NaN", "-inf", "Infinity",
         ".nan", "0x1F", "0b1", "12:30", "2024-01-01", "[1, 2]", "{a: 1}", "(1,)", "a,b", "'a'", '"1"', "a: b", "# x",
         "!!str x", "&a", "*a", "1 2", "٣", "9" * 400, "9" * 5000, "1/2", "../x", "$(touch x)", "`x`", "a\nb", "\\", "ä",
         "\u2028"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t)[:20])
@pytest.mark.parametrize("default", [None, 3, 0.5, True])
def test_text_on_the_command_line_is_what_papermill_makes_of_it(text, default):
    ours, theirs = parameters.typed("x", text, default), _resolve_type(text)
    assert type(ours) is type(theirs) and repr(ours) == repr(theirs)


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t)[:20])
def test_text_stays_text_where_text_is_expected(text):
    assert parameters.typed("x", text, "a") == text


@pytest.mark.parametrize("text, default, value", [
    ("[0,1,2]", [0], [0, 1, 2]), ("[a,b]", [], ["a", "b"]), ("[]", [1], []), ("[1e-4, 2]", [0.1], [1e-4, 2]),
    ("[001, yes, 1e5, null]", ["a"], ["001", "yes", "1e5", "null"]),
    ("[001, yes, 12:30, '1', true]", [], ["001", "yes", "12:30", "1", True]), ("{a: 1, b: [x]}", {}, {"a": 1, "b": ["x"]}),
    ("{1: 2, yes: no}", {}, {"1": 2, "yes": "no"}), ("[[8, 16]]", [[1]], [[8, 16]])])
def test_lists_and_mappings_are_yaml(text, default, value):
    assert parameters.typed("x", text, default) == value


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("-2E+3", -2000.0), (".5", 0.5), ("1.", 1.0), ("+3", 3), ("1_000", 1000), ("0", 0), ("-0", 0),
    ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None), ("yes", "yes"), ("No", "No"), ("on", "on"),
    ("OFF", "OFF"), ("012", "012"), ("001", "001"), ("0o17", "0o17"), ("0x1F", "0x1F"), ("12:30", "12:30"),
    ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"), ("2001-12-14t21:59:43Z", "2001-12-14t21:59:43Z"), ("'1'", "1"),
    ('"true"', "true"), ("1__0", "1__0"), ("=", "="), ("1e", "1e"), ("9" * 5000, "9" * 5000)])
def test_a_scalar_of_yaml(text, value):
    found = parameters.parse("x", f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


REFUSED = [("a: 1\na: 2", "found 'a' twice"), ("{a: {b: 1, 'b': 2}}", "found 'b' twice"),
           ("a: &x [1]\nb: *x", "anchor or alias x"), ("*x", "alias x"), ("a: {<<: *x}", "alias x"),
           ("a: !!int '012'", "tag tag:yaml.org,2002:int"), ("!!python/object/apply:os.mkdir [x]", "tag tag:yaml.org"),
           ("a: !!python/name:os.system", "tag tag:yaml.org"), ("!x a", "tag !x"), ("a: !!binary aGk=", "tag tag"),
           ("? [1]\n: 2", "a key that is not text"), ("a: [1", "is not YAML"), ("a: 1\n---\nb: 2", "another document"),
           ("a: \x00", "not allowed"), ("[" * 500_000, "at most 20 levels"), ("- " * 5000, "at most 20 levels"),
           ("{a: " * 5000, "at most 20 levels"), ("a" * 1_000_001, "1,000,001 characters: expected at most 1,000,000"),
           ("a: &a [x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")),
            "anchor or alias a")]


@pytest.mark.parametrize("text, message", REFUSED, ids=[m for _, m in REFUSED])
def test_what_could_run_code_grow_or_mean_two_things_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_text(text)
    start = time.perf_counter()
    for read in (lambda: parameters.load("given.yaml"), lambda: parameters.parse("given.yaml", text)):
        with pytest.raises(ValueError) as e:
            read()
        assert "given.yaml" in str(e.value) and len(str(e.value).splitlines()) == 1
        assert message in str(e.value) or "1,000,001 bytes" in str(e.value)
    assert time.perf_counter() - start < 10 and [p.name for p in tmp_path.iterdir()] == ["given.yaml"]


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match="x.yaml is not YAML"):
        parameters.load(tmp_path / "x.yaml")


SHARED = [1, 2]
NASTY = {  # values that shells, YAML, papermill's formatting or Python's quotes could make something else of
    "text": ["", " ", "it's", '"', "'\"'", "\\", "\\n", "a\nb", "\r\n", "\t", "$(touch pwned)", "`touch pwned`", "${HOME}",
             "$1", "!", "%s", "{dataset}", "{{x}}", "a b", " a", "a ", "../../x", "/..", "~", "-n", "--help", "#x", "a #b",
             "a: b", "[1]", "{a}", "*", "&a", "!!int 1", "%", "@", "|", ">", "?", ":", "1", "1e-4", "0x1", "012", "1_0", "yes",
             "No", "null", "true", "12:30", "2024-01-01", "=", "<<", ".inf", "ä", "日本", "\U0001f600", "\u2028\u2029\x85",
             "\x00\x07\x7f", "\ufeff", "\"\"\"", "'''", "f'{1+1}'", "\\u0041", "\\x41", "x" * 300],
    "numbers": [0, -1, 10**30, 1e-05, 1e22, 0.1, -0.0, 5e-324, 1.7976931348623157e308, True, False, None],
    "deep": {"a": {"b": [{"c": [1, "1", 1.0]}]}, "1": "one", "yes": 2, "": 3, "a: b": SHARED, "k" * 200: SHARED, "'": "'",
             "ä\n": 1}}


@pytest.mark.parametrize("lines", [True, False])
def test_what_is_written_is_read_back_by_us_and_by_papermill(lines):
    text = parameters.dump(NASTY, lines)
    for read in (parameters.parse("x", text), yaml.load(text, NoDatesSafeLoader)):
        assert read == NASTY and repr(read) == repr(NASTY)
    assert lines or len(text.splitlines()) == 1


CODE = """import json, os
seen = {"text": text, "numbers": numbers, "deep": deep, "cwd": os.getcwd(), "data": os.environ.get("PDIFF_DATA")}
json.dump(seen, open(os.environ["PDIFF_RUN_DIR"] + "/seen.json", "w"))"""


def test_values_reach_a_kernel_as_they_are_by_a_run_and_by_a_command_of_a_shell(tmp_path, monkeypatch):
    """In folders whose names are as bad as the values."""
    home = tmp_path / "it's {dataset} $(touch pwned) `x`; \"a\" ä"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("PDIFF_RUNS", str(home / "runs"))
    monkeypatch.delenv("PDIFF_RUN_DIR", raising=False)
    monkeypatch.setenv("PDIFF_DATA", "da ta")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    cells = [v4.new_code_cell("dataset = ''\ntext = []\nnumbers = []\ndeep = {}", metadata={"tags": ["parameters"]}),
             v4.new_code_cell(CODE)]
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), home / "own.ipynb")

    job = jobs.plan(Path("own.ipynb"), {"dataset": "x", **NASTY})
    jobs.execute(job, progress=False)
    other = jobs.plan(Path("own.ipynb"), {"dataset": "y", **NASTY})
    (line,) = sweep.command(other).splitlines()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PDIFF_DATA": "other"}
    done = subprocess.run(["sh", "-c", line], env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for made, data in ((job, "da ta"), (other, str(home / "da ta"))):
        seen = json.loads((made.folder / "seen.json").read_text())
        assert seen.pop("cwd") == str(home) and seen.pop("data") == data
        assert seen == NASTY and repr(seen) == repr(NASTY) and jobs.complete(made)
    assert parameters.load(job.folder / "parameters.yaml") == job.values
    assert not list(tmp_path.rglob("pwned"))


def own(folder: Path, source: str) -> Path:
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source, metadata={"tags": ["parameters"]})]), folder / "own.ipynb")
    return folder / "own.ipynb"


@pytest.mark.parametrize("default, value, kept", [
    ("[]", ["a", 1, [2]], None), ("[]", [], None), ("None", ["a"], None), ("None", 3, None), ("None", None, None),
    ("None", {"a": 1}, None), ("[None]", ["a"], None), ("[1, 'a']", ["b", 2.5], None), ("[1, 2.5]", [3], [3.0]),
    ("(1, 2)", [3], None), ("[[8, 16]]", [[4]], None), ("{}", {"a": [1]}, None), ("[{}]", [{"a": 1}], None),
    ("None", (1, (2,)), [1, [2]]), ("[True]", [False], None)])
def test_a_default_without_a_type_takes_any_value(tmp_path, default, value, kept):
    values = jobs.check(own(tmp_path, f"x = {default}"), {"x": value})
    assert repr(values["x"]) == repr(value if kept is None else kept)


@pytest.mark.parametrize("default, value, message", [
    ("[]", "a", r"x is 'a' \(str\): expected list"), ("[]", None, "x is None"), ("{}", [1], "expected dict"),
    ("[1, 'a']", 1, "expected list"), ("None", float("nan"), "x is nan: expected a finite number"),
    ("[]", [1, [float("inf")]], "x is inf"), ("{}", {"a": {1: 2}}, "expected text as keys"),
    ("None", {1}, r"\(set\): expected text, a number"), ("None", b"a", r"\(bytes\)"),
    ("''", "\ud800", "expected text in UTF-8"), ("[1.5]", ["a"], "x is 'a'"),
    ("True", "true", r"x is 'true' \(str\): expected bool \(True or False\)")])
def test_a_value_that_no_kernel_could_be_given_is_refused(tmp_path, unchecked, default, value, message):
    with pytest.raises(ValueError, match=message):
        jobs.check(own(tmp_path, f"x = {default}"), {"x": value})


@pytest.mark.parametrize("source, message", [
    ("x = 1\ny = {1: 'a'}", "line 2: .*expected text as keys"), ("x = {1, 2}", "line 1: .*set"), ("x = 1e999", "x is inf"),
    ("%matplotlib inline", "line 1"), ("x = 1\ny = = 2", "line 2"), ("x = open('/etc/passwd').read()", "line 1"),
    ("x = __import__('os').mkdir('pwned')", "line 1"), ("x = " + "[" * 300 + "]" * 300, "line 1"), ("x = f'{1}'", "line 1")])
def test_a_parameters_cell_that_papermill_would_make_something_else_of_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"own.ipynb, parameters cell, {message}" if message.startswith("line") else message):
        jobs.defaults(own(tmp_path, source))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content",
                         [b"", b"{", b"[]", b"3", b"\xff\xfe", b"{}",
                          b'{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
                          b'{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
                          b'{"cells": [], "metadata": 3, "nbformat": 4, "nbformat_minor": 5}',
                          b'{"nbformat": 9}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path, content):
    (tmp_path / "x.ipynb").write_bytes(content)
    for read in (jobs.defaults, lambda path: jobs.plan(path, {})):
        with pytest.raises(ValueError, match="x.ipynb is not a notebook"):
            read(tmp_path / "x.ipynb")


def test_a_notebook_that_is_broken_after_its_parameters_is_not_planned(tmp_path):
    path = own(tmp_path, "x = 1")
    content = json.loads(path.read_text())
    content["cells"].append({"cell_type": "code", "source": "", "metadata": {}, "outputs": 3, "execution_count": None, "id": "a"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="own.ipynb is not a notebook"):
        jobs.plan(path, {})
