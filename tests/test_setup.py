"""The files that install and test the project agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml

HERE = Path(__file__).parents[1]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
PINS = [*PROJECT["dependencies"], *(p for extra in PROJECT["optional-dependencies"].values() for p in extra)]


def test_every_version_is_pinned_once():
    assert len(PINS) > 20
    assert [p for p in PINS if not re.fullmatch(r"[a-z0-9_.-]+==[0-9]+(\.[0-9]+)+", p)] == []
    names = [p.split("==")[0] for p in PINS]
    assert sorted(set(names)) == sorted(names)


def test_environment_has_the_versions_of_pyproject():
    (pip,) = (
        d["pip"] for d in yaml.safe_load((HERE / "environment.yml").read_text())["dependencies"] if isinstance(d, dict)
    )
    assert sorted(p for p in pip if not p.startswith("-e")) == sorted(PINS)
    assert [p for p in pip if p.startswith("-e")] == ["-e ."]


def test_ci_runs_the_makes_tests():
    lines = [line.strip() for line in (HERE / ".ci" / "run").read_text().splitlines()]
    assert "make test" in lines and (HERE / ".ci" / "run").stat().st_mode & 0o111
    recipe = (HERE / "Makefile").read_text().partition("\ntest:")[2].split("\n\n")[0]
    assert re.search(r"^\t\S+ -m pytest \$\(WORKERS\) --durations", recipe, re.M) and re.search(r"^\t.*--nbval.* notebooks$", recipe, re.M)


def test_the_table_of_situations_names_tests_that_are_there():
    rows = [line.strip("| ").split(" | ") for line in (HERE / "tests" / "README.md").read_text().splitlines() if line.startswith("| ")]
    named = [(row[5], *re.match(r"(test_\w+)(?:: (.*))?$", part.strip()).groups()) for row in rows[1:] if row[5] != "the same"
             for part in row[5].split(";")]
    assert len(rows) > 60 and {len(row) for row in rows} == {6}
    for cell, file, words in named:
        (path,) = (HERE / "tests").rglob(f"{file}.py")
        source = path.read_text()
        assert [w for w in (words or "").split(", ") if not re.search(rf"def test_\w*{w}", source)] == [], cell


def test_the_front_page_is_short():
    assert len((HERE / "README.md").read_text().splitlines()) <= 150
