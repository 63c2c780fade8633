"""In a real browser: the committed quickstart's figures, and the explorers in JupyterLab and as a page of their own."""

import re
import shutil
import sys
from urllib.parse import urlsplit

import nbformat
import pandas as pd
import pytest
import yaml

from browser import CHROMIUM, HERE, chromium, lab, run_all, served
from pdiff_lib.base import runs
from pdiff_lib.batches import app, jobs, warm

NOTEBOOKS = HERE / "notebooks"
SMALL = {"train_images": 100, "test_images": 100, "network": "test_resnet", "base_epochs": 15, "base_lr": 0.01, "k_checkpoints": 12, "zoo_batch": 16,
         "ae_channels": [2, 2], "latent_dim": 4, "ae_steps": 3, "denoiser_channels": [2, 2, 2], "diffusion_steps": 3, "T": 40,
         "sampling_steps": 10, "samples": 5}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What all servers are started with: where small runs keep their stages, no SVG of a figure, and kernels that begin warm."""
    own = {"PDIFF_RUNS": str(tmp_path_factory.mktemp("runs")), "PDIFF_SVG": "0", "OMP_NUM_THREADS": "1"}
    with warm.kernels(own) as kernels:
        yield own | kernels


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Where a table of a small sweep lies: two seeds at three K."""
    rows = [{"k_checkpoints": k, "seed": s, "method": m, "index": i, "accuracy": 0.5 + k / 1000 + i / 50 + s / 50 + len(m) / 100,
             "max_similarity": 0.9 - i / 50 - k / 200, "nearest": 0, "distance": 1.0, "outside_span": 0.0}
            for k in (1, 10, 50) for s in (0, 1) for m in ("original", "p-diff") for i in (0, 1, 2)]
    path = tmp_path_factory.mktemp("table") / "results.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, stages):
    """A JupyterLab; yields its folder and what gives a notebook's address."""
    folder = tmp_path_factory.mktemp("lab")
    with lab(folder, **stages) as address:
        yield folder, address


@pytest.fixture(scope="module")
def pictures():
    folder = runs.root() / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def small(name: str, folder, monkeypatch, stages, **more):
    """A copy of a notebook with small parameters."""
    monkeypatch.setenv("PDIFF_RUNS", stages["PDIFF_RUNS"])
    path = jobs.find(name)
    shutil.copy(app.page(path, jobs.check(path, {**SMALL, **more})), folder / f"{name}.ipynb")
    return f"{name}.ipynb"


def test_figures_of_the_quickstart_answer(desk):
    folder, address = desk
    shutil.copy(NOTEBOOKS / "00_quickstart.ipynb", folder / "x.ipynb")
    with chromium() as page:
        page.goto(address("x.ipynb"))
        plots = page.locator(".jp-Notebook .js-plotly-plot")
        plots.nth(2).wait_for(state="attached")
        assert plots.count() == 3, "scatter, heatmap and trajectory"

        scatter = plots.nth(0)
        scatter.scroll_into_view_if_needed()
        point = scatter.locator(".points path.point").first
        box = point.bounding_box()
        page.mouse.move(box["x"] - 20, box["y"] - 20)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
        scatter.locator(".hoverlayer .hovertext").first.wait_for()
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


def test_explorers_in_jupyterlab(desk, pictures, monkeypatch, stages, table):
    folder, address = desk
    name = small("50_explore", folder, monkeypatch, stages, source=table, vary_values=[5])
    with chromium() as page:
        page.goto(address(name))
        run_all(page)
        page.keyboard.press("Control+b")  # the file browser makes room
        use_scatter(page, pictures / "lab")
        use_denoising(page, pictures / "lab")
        use_sweep(page, pictures / "lab")
        page.keyboard.press("Control+s")
        page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')",)
    saved = folder / name
    assert all(c.execution_count for c in nbformat.read(saved, as_version=4).cells if c.cell_type == "code")
    assert saved.stat().st_size < 1_000_000


def cut(page, address: str) -> list[str]:
    """No host but that of the address answers the page; where it asked for something else comes into the list."""
    asked, own = [], urlsplit(address).netloc

    def answer(route):
        if urlsplit(route.request.url).netloc == own:
            return route.continue_()
        asked.append(route.request.url)
        return route.abort()

    page.route(re.compile("^(?!data:|blob:)"), answer)
    page.on("websocket", lambda socket: asked.append(socket.url) if urlsplit(socket.url).netloc != own else None)
    return asked


def test_explorers_as_a_page_without_a_network(tmp_path, pictures, stages, table):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, "source": table, "vary_values": [5]}))
    command = [sys.executable, "-m", "pdiff_lib.batches.cli", "app", "-f", str(tmp_path / "small.yaml"), "--port", "0", "--no-browser"]
    with served(command, tmp_path / "log", **stages) as address, chromium() as page:
        assert address.startswith("http://127.0.0.1:")
        asked = cut(page, address)
        door, token = address.split("?token=")
        page.goto(door)
        page.locator("#password_input").fill(token)
        page.locator("#login_submit").click(timeout=300_000)
        use_scatter(page, pictures / "app")
        use_denoising(page, pictures / "app")
        use_sweep(page, pictures / "app")
        icon = page.locator(".pdiff-denoising .widget-play .fa-play")
        assert "Font Awesome" in icon.evaluate("e => getComputedStyle(e).fontFamily")
        assert page.evaluate("() => [...document.fonts].some(f => f.family.includes('Font Awesome') && f.status == 'loaded')")
        assert asked == []
        assert page.locator("text=Traceback").count() == 0


def test_explorers_of_the_quickstart(desk, monkeypatch, stages):
    folder, address = desk
    name = small("00_quickstart", folder, monkeypatch, stages)
    with chromium() as page:
        page.goto(address(name))
        run_all(page)
        for explorer in ("scatter", "denoising"):
            assert page.locator(f".pdiff-{explorer}").count() == 1
        move_through_the_chain(page)


def test_a_body_forms_without_a_network(desk, pictures, monkeypatch, stages):
    folder, address = desk
    monkeypatch.setenv("PDIFF_RUNS", stages["PDIFF_RUNS"])
    path = jobs.find("63_shapes")
    few = {"train_images": 16, "test_images": 8, "field_points": 400, "field_test_points": 200, "network": "field-12-12", "k_checkpoints": 10, "held_out": 4,
           "base_epochs": 40, "base_batch": 100, "methods": ["copy", "flow"], "generators": {"flow": {"steps": 20, "width": 16, "solver_steps": 10}},
           "cells": 14, "points": 16, "latent_dim": 4, "diffusion_steps": 3, "sampling_steps": 5, "samples": 4}
    shutil.copy(app.page(path, jobs.check(path, few)), folder / "63_shapes.ipynb")
    with chromium() as page:
        asked = cut(page, address("63_shapes.ipynb"))
        page.goto(address("63_shapes.ipynb"))
        run_all(page)
        explorer = page.locator(".pdiff-fields")
        figure, slider = explorer.locator(".js-plotly-plot").first, labelled(explorer, "moment", ".noUi-handle")
        body = "e => (e._fullData ?? []).length < 5 ? '' : Array.from(e._fullData.find(t => t.name == 'field').x).join()"
        wait_for(page, lambda: figure.evaluate(body) != "")
        last = figure.evaluate(body)
        slider.focus()
        page.keyboard.press("Home")
        wait_for(page, lambda: explorer.locator("text=moment 0 of").count() == 1)
        wait_for(page, lambda: figure.evaluate(body) != last)
        page.keyboard.press("End")
        wait_for(page, lambda: figure.evaluate(body) == last)
        explorer.screenshot(path=f"{pictures}/lab-fields.png")
        explorer.get_by_role("button", name="Generate").click()
        wait_for(page, lambda: explorer.locator("b", has_text=", seed 1").count() == 1)
        wait_for(page, lambda: figure.evaluate(body) != last)
        assert asked == [] and page.locator("text=Traceback").count() == 0


def test_the_contest_answers(desk, pictures):
    folder, address = desk
    few = {"dataset": "digits", "image_size": 8, "train_images": 60, "test_images": 40, "network": "mlp-3", "pretrained": False, "subset": "all",
           "crop_scale": 1.0, "flip": False, "k_checkpoints": 8, "base_epochs": 6, "ae_kind": "pca", "latent_dim": 2,
           "denoiser_kind": "mlp", "diffusion_steps": 2, "sampling_steps": 2, "samples": 3}
    steps = {name: {"steps": 2, "batch": 4} for name in ("flow", "unit flow", "SANE", "hyper-rep", "RPG", "HyperDiffusion")}
    code = f"""from pdiff_lib import explore
from pdiff_lib.arena import Arena
from pdiff_lib.recipe import Recipe
kinds = {{"independent": "independent", "one training": "trajectory"}}
contest = explore.Contest({{n: Arena(Recipe.of(**{few!r} | {{"zoo_mode": kind}}), 4, settings={steps!r}) for n, kind in kinds.items()}})"""
    nbformat.write(nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, (code, "contest"))], metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3"}}), folder / "contest.ipynb")
    with chromium() as page:
        page.goto(address("contest.ipynb"))
        run_all(page)
        explorer = page.locator(".pdiff-contest")
        field, heatmaps = (explorer.locator(".js-plotly-plot").nth(i) for i in (0, 1))
        facts, title = explorer.locator(".widget-html", has_text="maximum similarity").first, field.locator(".gtitle")
        wait_for(page, lambda: facts.text_content().startswith("flow 0"))
        explorer.scroll_into_view_if_needed()
        picture = heatmaps.locator(".heatmaplayer image").first
        before = picture.evaluate("e => e.href.baseVal")
        click(page, field, "flow", 2)
        wait_for(page, lambda: facts.text_content().startswith("flow 2:") and picture.evaluate("e => e.href.baseVal") != before)
        assert labelled(explorer, "index", "input").input_value() == "2"

        labelled(explorer, "generator", "select").select_option("noise")
        labelled(explorer, "strength", ".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        strength = explorer.locator(".widget-readout").first
        wait_for(page, lambda: facts.text_content().startswith(f"noise {strength.text_content()} 0:"))
        labelled(explorer, "order", "select").select_option("raw")
        wait_for(page, lambda: "raw order" in title.text_content())
        labelled(explorer, "zoo", "select").select_option("one training")
        wait_for(page, lambda: "checkpoints of one training" in title.text_content())
        wait_for(page, lambda: "checkpoints of one training" in heatmaps.locator(".gtitle").text_content())
        explorer.screenshot(path=f"{pictures}/lab-contest.png")
        assert len(exported(page, explorer, "csv").splitlines()) > 3 * 20 and page.locator("text=Traceback").count() == 0


def labelled(explorer, label: str, kind: str):
    """The control of a widget with this description."""
    return explorer.locator(".widget-inline-hbox", has=explorer.page.locator(f'.widget-label >> text="{label}"')).locator(kind).first


def points(figure, method: str) -> int:
    """How many points of a method a figure shows."""
    return figure.evaluate("""(e, name) => e._fullData.find(t => t.name == name).opacity == 0 ? 0 : e.querySelectorAll(
        `.scatterlayer .trace${e._fullData.find(t => t.name == name).uid} path.point`).length""", method)


def box(explorer, method: str):
    """The check box of a method."""
    return explorer.locator(".widget-checkbox", has_text=re.compile(rf"(^|[\s\u200b]){method}\s*$")).locator("input")


def wait_for(page, what, seconds=60.0):
    """Poll a condition on the page."""
    for _ in range(int(seconds / 0.1)):
        if what():
            return
        page.wait_for_timeout(100)
    raise AssertionError("the page did not come to show the change")


def use_scatter(page, picture):
    """Hide, slide, colour, click, type, lasso, export."""
    explorer = page.locator(".pdiff-scatter")
    explorer.locator(".js-plotly-plot .points path.point").first.wait_for()
    explorer.scroll_into_view_if_needed()
    figure, plane, heatmaps, _confusion = (explorer.locator(".js-plotly-plot").nth(i) for i in range(4))
    facts = explorer.locator(".widget-html", has_text="maximum similarity").first
    wait_for(page, lambda: facts.text_content().startswith("p-diff 0"))
    page.wait_for_timeout(500)
    explorer.screenshot(path=f"{picture}-scatter.png")

    slider = labelled(explorer, "noise scale (std)", ".noUi-handle")
    assert points(figure, "noise 0.001") == points(plane, "noise 0.15") == 10
    slider.focus()
    page.keyboard.press("ArrowRight")  # from "all" to the smallest
    wait_for(page, lambda: points(figure, "noise 0.15") == points(plane, "noise 0.05") == 0)
    assert points(figure, "noise 0.001") == points(plane, "noise 0.001") == 10

    for method in ("p-diff", "noise 0.001", "noise 0.05", "noise 0.15", "average", "interpolation", "gaussian"):
        box(explorer, method).uncheck()
    wait_for(page, lambda: points(plane, "gaussian") == points(figure, "p-diff") == 0)
    before = heatmaps.locator(".heatmaplayer image").first.evaluate("e => e.href.baseVal")
    click(page, plane, "original", 3)
    wait_for(page, lambda: facts.text_content().startswith("original 3:"))
    wait_for(page, lambda: heatmaps.locator(".heatmaplayer image").first.evaluate("e => e.href.baseVal") != before)
    assert "original 3" in heatmaps.locator(".infolayer").text_content()
    assert labelled(explorer, "index", "input").input_value() == "3"

    index = labelled(explorer, "index", "input")
    index.fill("5")
    index.press("Enter")
    wait_for(page, lambda: facts.text_content().startswith("original 5:"))

    labelled(explorer, "colour by", "select").select_option("step")
    figure.locator(".colorbar").wait_for()
    colours = "(e, name) => e._fullData.find(t => t.name == name).marker.color"
    assert [float(c) for c in figure.evaluate(colours + ".length ? Array.from(e._fullData.find(t => t.name == name).marker.color) : []",
                                              "original")] == [*range(12)] * 2

    frame = figure.locator(".nsewdrag").first.bounding_box()
    left, top, right, bottom = frame["x"] + 2, frame["y"] + 2, frame["x"] + frame["width"] - 2, frame["y"] + frame["height"] - 2
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
        page.mouse.move(x, y, steps=6)
    page.mouse.up()
    wait_for(page, lambda: "Selected: 24 networks" in explorer.text_content())
    assert plane.evaluate("e => e._fullData.find(t => t.name == 'original').selectedpoints.length") == 24
    explorer.screenshot(path=f"{picture}-scatter-used.png")

    assert len(exported(page, explorer, "csv").splitlines()) == 1 + 24


def exported(page, explorer, kind: str) -> str:
    """The file that the export button gives to the browser."""
    labelled(explorer, "as", "select").select_option(kind)
    explorer.get_by_role("button", name="Export").click()
    link = explorer.locator(f'a[download$=".{kind}"]')
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    return download.value.path().read_text()


def click(page, figure, method: str, number: int) -> None:
    """Click the middle of a point."""
    figure.scroll_into_view_if_needed()
    x, y = figure.evaluate("""(e, [name, i]) => {
        const t = e._fullData.find(t => t.name == name), l = e._fullLayout, box = e.getBoundingClientRect();
        return [box.x + l.xaxis._offset + l.xaxis.c2p(t.x[i]), box.y + l.yaxis._offset + l.yaxis.c2p(t.y[i])]}""", [method, number])
    page.mouse.move(x - 15, y - 15)
    page.mouse.move(x, y, steps=3)
    page.wait_for_timeout(250)
    page.mouse.click(x, y)


def move_through_the_chain(page):
    """The slider by keyboard; heatmap, path and accuracy follow."""
    explorer = page.locator(".pdiff-denoising")
    figure = explorer.locator(".js-plotly-plot")
    figure.locator(".heatmaplayer image").wait_for()
    explorer.scroll_into_view_if_needed()
    label = explorer.locator(".widget-label", has_text="steps remain")
    assert label.text_content().startswith("0 of 40 ")
    now = "e => e._fullData.filter(t => t.name == 'now').map(t => [t.x[0], t.y[0]])"
    before, places = figure.locator(".heatmaplayer image").evaluate("e => e.href.baseVal"), figure.evaluate(now)
    labelled(explorer, "moment", ".noUi-handle").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    wait_for(page, lambda: label.text_content().startswith("20 of 40 "))
    wait_for(page, lambda: figure.evaluate(now)[1][0] == 20 and figure.evaluate(now)[0] != places[0])
    wait_for(page, lambda: figure.locator(".heatmaplayer image").evaluate("e => e.href.baseVal") != before)
    return explorer, figure, label


def use_denoising(page, picture):
    """Slide, play, follow another chain, generate, stop."""
    explorer, figure, label = move_through_the_chain(page)
    play = explorer.locator(".widget-play button")
    play.first.click()
    wait_for(page, lambda: label.text_content().startswith("0 of 40 "))
    explorer.screenshot(path=f"{picture}-denoising.png")

    seed = labelled(explorer, "seed", "input")
    seed.fill("7")
    seed.press("Enter")
    labelled(explorer, "sampler", "select").select_option("ddpm")
    steps = labelled(explorer, "sampling steps (of 40)", "input")
    steps.fill("40")
    steps.press("Enter")
    explorer.get_by_role("button", name="Follow").click()
    wait_for(page, lambda: "seed 7, DDPM with 40 steps" in figure.locator(".infolayer").text_content())
    assert figure.evaluate("e => e._fullData.find(t => t.name == 'path').x.length") == 41

    scatter = page.locator(".pdiff-scatter .js-plotly-plot").first
    networks = labelled(explorer, "networks", "input")
    networks.fill("12")
    networks.press("Enter")
    generate, stop = (explorer.get_by_role("button", name=n) for n in ("Generate", "Stop"))
    generate.click()
    wait_for(page, lambda: "12 of 12 networks" in explorer.text_content())
    wait_for(page, lambda: points(scatter, "generated here") == 12)
    networks.fill("5000")
    networks.press("Enter")
    wait_for(page, lambda: generate.is_enabled())
    generate.click()
    wait_for(page, lambda: points(scatter, "generated here") > 12)
    stop.click()
    status = explorer.locator(".widget-html", has_text="stopped")
    status.wait_for()
    kept = int(re.search(r"stopped; (\d+) of 5000", status.text_content())[1])
    wait_for(page, lambda: points(scatter, "generated here") == 12 + kept)
    assert 10 <= kept < 5000
    explorer.screenshot(path=f"{picture}-denoising-used.png")
    page.locator(".pdiff-scatter").screenshot(path=f"{picture}-scatter-generated.png")


def use_sweep(page, picture):
    """Another measure, panels, a method less."""
    explorer = page.locator(".pdiff-sweep")
    figure = explorer.locator(".js-plotly-plot")
    figure.locator(".points path.point").first.wait_for()
    explorer.scroll_into_view_if_needed()
    title = figure.locator(".gtitle")
    assert "accuracy (%) against k_checkpoints" in title.text_content() and points(figure, "p-diff") == 3
    labelled(explorer, "y", "select").select_option("max_similarity")
    wait_for(page, lambda: "maximum similarity to the originals (IoU) against" in title.text_content())
    labelled(explorer, "panels by", "select").select_option("seed")
    wait_for(page, lambda: "seed = 1" in figure.locator(".infolayer").text_content() and figure.locator(".subplot").count() == 2)
    wait_for(page, lambda: "Pooled" not in explorer.text_content())
    explorer.screenshot(path=f"{picture}-sweep.png")
    labelled(explorer, "panels by", "select").select_option("(none)")
    wait_for(page, lambda: figure.locator(".subplot").count() == 1)
    labelled(explorer, "x", "select").select_option("seed")
    wait_for(page, lambda: "against seed" in title.text_content())
    box(explorer, "original").uncheck()
    wait_for(page, lambda: points(figure, "original") == 0 and points(figure, "p-diff") == 2)
    wait_for(page, lambda: "k_checkpoints (3 values)" in explorer.text_content())
    svg = exported(page, explorer, "svg")
    assert svg.startswith("<svg") and "seed of network and zoo" in svg
    explorer.screenshot(path=f"{picture}-sweep-used.png")
