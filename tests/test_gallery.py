"""The READMEs: their tables are those of the committed runs, their links and commands lead somewhere."""

import argparse
import json
import re
import runpy
import shlex
from pathlib import Path

import pandas as pd
import pytest

from pdiff_lib.base import parameters
from pdiff_lib.batches import jobs

HERE = Path(__file__).parents[1]
FIGURES = HERE / "figures"
PAGES = [HERE / "README.md", *HERE.glob("*/README.md"), *HERE.glob("tests/*/README.md")]
GALLERY = runpy.run_path(str(FIGURES / "gallery.py"))


def told(page):
    """What a page says: a README's text, the Markdown of a notebook."""
    if page.suffix == ".md":
        return page.read_text()
    return "\n".join("".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "markdown")


def links(page):
    """Targets of a page's links and pictures, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", told(page), flags=re.S)
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", t)]


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", told(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def table(text, name):
    """The cells of one generated table, its header first."""
    part = text.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if re.match(r"\| ", line)]


@pytest.mark.parametrize("page", GALLERY["FILES"], ids=lambda p: p.parent.name)
def test_tables_are_those_of_the_committed_runs(page):
    assert GALLERY["filled"](page.read_text()) == page.read_text(), "make gallery writes them anew"


def test_every_table_stands_once():
    named = re.findall(r"<!-- table: (.*?) -->", "".join(p.read_text() for p in GALLERY["FILES"]))
    assert sorted(named) == sorted(GALLERY["TABLES"])


@pytest.mark.parametrize("name", GALLERY["CELLS"])
def test_numbers_are_those_of_the_networks_in_the_figure(name):
    networks = pd.read_csv(FIGURES / f"{name}-scatter.csv").groupby("method")
    shown = {row[0]: row for row in table((FIGURES / "README.md").read_text(), name)[1:]}
    assert shown.keys() == set(networks.groups)
    for method, own in networks:
        mean, _, std = shown[method][2].partition(" +- ")
        numbers = [float(x) for x in (shown[method][1], mean, std or 0, shown[method][3], *shown[method][5:])]
        accuracy = 100 * own.accuracy
        want = [len(own), accuracy.mean(), accuracy.std(ddof=0), accuracy.max(),
                *own[["max_similarity", "distance", "outside_span"]].mean()]
        assert numbers == pytest.approx(want, abs=0.0051), method


@pytest.mark.parametrize("text, message", [
    ("<!-- table: acurracy -->\n<!-- end -->", "table 'acurracy': expected one of .*'audit'"),
    ("<!-- table: beside -->\n", "1 tables begin, 0 end"), ("<!-- end -->", "0 tables begin, 1 end")])
def test_a_marker_that_leads_nowhere_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        GALLERY["filled"](text)


def test_the_gallery_shows_every_figure():
    seen = {Path(t).name for p in GALLERY["FILES"] for t in links(p)}
    kept = {f.name for f in FIGURES.iterdir() if f.suffix in (".svg", ".html", ".csv", ".parquet", ".png", ".json")}
    assert len(kept) > 100 and kept - seen == set()


@pytest.mark.parametrize("page", [*PAGES, *sorted(HERE.glob("notebooks/*.ipynb"))], ids=lambda p: str(p.relative_to(HERE)))
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_front_page_is_readable_and_names_every_notebook():
    text = (HERE / "README.md").read_text()
    assert [line for line in text.splitlines() if len(line) > 127 and not line.startswith("|")] == []
    assert len(table(text, "front")) + 1 <= 15  # and the line below the header
    assert {f"notebooks/{p.name}" for p in HERE.glob("notebooks/*.ipynb")} <= set(links(HERE / "README.md"))


def commands():
    found = set()
    for page in (*GALLERY["FILES"], HERE / "notebooks" / "README.md", HERE / "params" / "README.md"):
        shown = r"^ {4}(?:\.venv/bin/)?pdiff (.*)$|`pdiff ((?:run|sweep|results|app) [^`]*)`"
        for line in re.findall(shown, page.read_text(), re.M):
            found.add(" ".join(shlex.split("".join(line), comments=True)))
    return sorted(c for c in found if not re.search(r"\b(X|RUN|NOTEBOOK|RECIPE)\b", c))


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_is_there(command):
    verb, *words = command.split()
    line = argparse.ArgumentParser(exit_on_error=False)
    line.add_argument("what", nargs="?")
    line.add_argument("-f", action="append", default=[])
    line.add_argument("-p", action="append", nargs=2, default=[])
    line.add_argument("--workers", type=int)
    line.add_argument("--dry-run", action="store_true")
    given = line.parse_args(words)
    if verb in ("sweep", "results"):
        assert (HERE / given.what).is_file()
    elif verb in ("run", "app"):
        notebook = jobs.find(given.what or "50_explore")
        own, values = jobs.defaults(notebook), {}
        for file in given.f:
            values |= parameters.load(HERE / file)
        values |= {name: parameters.typed(name, text, own.get(name)) for name, text in given.p}
        assert jobs.check(notebook, values).items() >= {n: v for n, v in values.items() if n in own}.items()
    else:
        assert verb == "data"
