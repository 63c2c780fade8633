"""plots.py: every figure shows the numbers it was given, where it says."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from pdiff_lib.drawing import palette, pictures, plots
from pdiff_lib.networks.subset import Subset

SUB = Subset(("a.weight", "a.bias", "b.weight", "b.bias"), ((60, 2), (60,), (3,), (7,)))


def frame():
    rng = np.random.default_rng(0)
    methods = ["original"] * 4 + ["average"] + ["p-diff"] * 3
    return pd.DataFrame({"method": methods, "index": [0, 1, 2, 3, 0, 0, 1, 2], "nearest": rng.integers(0, 4, 8),
                         **{c: rng.random(8) for c in ("accuracy", "max_similarity", "distance", "outside_span")}})


def test_scatter_has_a_trace_per_method_with_all_its_numbers():
    table = frame()
    fig = plots.scatter(table, "a title")
    assert sorted(t.name for t in fig.data) == ["average", "original", "p-diff"] and fig.layout.title.text == "a title"
    for trace in fig.data:
        part = table[table.method == trace.name]
        np.testing.assert_allclose(trace.x, part.max_similarity)
        np.testing.assert_allclose(trace.y, 100 * part.accuracy)
        want = part[["index", "nearest", "distance", "outside_span"]].to_numpy(float)
        np.testing.assert_allclose(np.asarray(trace.customdata, dtype=float), want)
        assert all(f"customdata[{i}]" in trace.hovertemplate for i in range(4))
    assert len({(t.marker.color, t.marker.symbol) for t in fig.data}) == 3


def test_grid_puts_weights_above_biases():
    theta = torch.arange(190.0)
    picture = plots.grid(SUB, theta)
    weights, biases = [*range(120), *range(180, 183)], [*range(120, 180), *range(183, 190)]
    rows = [math.ceil(len(part) / pictures.COLUMNS) for part in (weights, biases)]
    assert picture.shape == (sum(rows), pictures.COLUMNS)
    for part, block in zip((weights, biases), picture.split(rows)):
        assert block.flatten()[: len(part)].tolist() == part and block.flatten()[len(part):].isnan().all()


@pytest.mark.parametrize("kind, others", [("weight", "bias"), ("bias", "weight")])
def test_grid_of_one_kind_alone(kind, others):
    picture = plots.grid(Subset((f"a.{kind}",), ((70,),)), torch.arange(70.0))
    assert picture.shape == (2, 64) and picture.flatten()[:70].tolist() == [*range(70)]


@pytest.mark.parametrize("factor, every", [(1.0, 1), (1.1, 2), (2.0, 2), (2.5, 3)])
def test_grid_thins_long_vectors_evenly(factor, every):
    n = int(factor * pictures.HEATMAP_NUMBERS) // 2
    picture = plots.grid(Subset(("a.weight", "a.bias"), ((n,), (n,))), torch.arange(2.0 * n))
    shown = picture[~picture.isnan()].tolist()
    assert shown == [*range(0, n, every), *range(n, 2 * n, every)] and len(shown) <= pictures.HEATMAP_NUMBERS + 1


def test_heatmaps_share_a_scale_except_for_differences():
    a, b = torch.linspace(-1, 2, 190), torch.linspace(0, 5, 190)
    fig = plots.heatmaps(SUB, {"original": a, "p-diff": b, "difference": a - b}, "t", differences=["difference"])
    for trace, theta in zip(fig.data, (a, b, a - b)):
        np.testing.assert_array_equal(trace.z, plots.grid(SUB, theta).numpy())
    assert [t.name for t in fig.data] == ["original", "p-diff", "difference"]
    assert [t.coloraxis for t in fig.data] == ["coloraxis", "coloraxis", "coloraxis2"]
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-1, 5)
    limit = float((a - b).abs().max())
    assert (fig.layout.coloraxis2.cmin, fig.layout.coloraxis2.cmax) == (-limit, limit)


def test_trajectory_has_a_frame_and_a_slider_step_per_moment():
    t, theta, accuracy = [20, 10, 5, 0], torch.randn(4, 190), torch.rand(4, 3)
    fig = plots.trajectory(SUB, t, theta, accuracy, "t")
    (slider,) = fig.layout.sliders
    assert [f.name for f in fig.frames] == [s.label for s in slider.steps] == ["20", "10", "5", "0"]
    assert [s.args[0][0] for s in slider.steps] == ["20", "10", "5", "0"] and slider.active == 3
    for i, moment in enumerate(fig.frames):
        np.testing.assert_array_equal(moment.data[0].z, plots.grid(SUB, theta[i]).numpy())
        np.testing.assert_allclose(moment.data[1].y, 100 * accuracy[i].numpy())
        assert list(moment.data[1].x) == [i] * 3 and list(moment.traces) == [0, 1]
    curves = {trace.name: trace for trace in fig.data if (trace.name or "").startswith("seed")}
    assert list(curves) == ["seed 0", "seed 1", "seed 2"]
    for m, curve in enumerate(curves.values()):
        np.testing.assert_allclose(curve.y, 100 * accuracy[:, m].numpy())


@pytest.mark.parametrize("by, names", [("run", ["a", "b"]), (None, ["loss"])])
def test_lines_draws_a_curve_per_group(by, names):
    table = pd.DataFrame({"step": [1, 2, 1, 2], "loss": [4.0, 3.0, 2.0, 1.0], "run": ["a", "a", "b", "b"]})
    fig = plots.lines(table, "step", "loss", by, "t", x_title="step", y_title="loss", log_y=True)
    assert [trace.name for trace in fig.data] == names
    assert [y for trace in fig.data for y in trace.y] == [4, 3, 2, 1]
    assert (fig.layout.xaxis.type, fig.layout.yaxis.type) == ("linear", "log")
    # On a linear axis names are not drawn at all.
    fig = plots.lines(table, "run", "loss", None, "t", x_title="run", y_title="loss")
    assert fig.layout.xaxis.type == "category"
    long = plots.lines(table.assign(run=table.run + "-layer" * 20), "run", "loss", None, "t", x_title="run", y_title="loss")
    assert long.layout.xaxis.dtick == 1 and long.layout.height > fig.layout.height + 500


def test_columns_are_the_vectors():
    table = plots.columns({"original": torch.tensor([1.0, 2.0]), "p-diff": torch.tensor([3.0, 4.0])}, name=["w", "b"])
    assert table.to_dict("list") == {"name": ["w", "b"], "original": [1, 2], "p-diff": [3, 4]}


@pytest.mark.parametrize("browser", [None, "/usr/bin/chromium"])
def test_save_writes_html_and_numbers_and_a_picture_where_a_browser_is(tmp_path, monkeypatch, capsys, browser):
    drawn, fig = [], go.Figure(go.Scatter(x=[1, 2], y=[3.0, 4.0]))
    monkeypatch.setattr(plots.shutil, "which", lambda name: browser)
    monkeypatch.setattr(plots, "draw", lambda figure, path: drawn.append(path))
    numbers = pd.DataFrame({"x": [1, 2], "y": [1 / 3, 4.0]})
    assert plots.save(fig, tmp_path / "deep" / "one", numbers) is fig
    assert "plotly" in (tmp_path / "deep" / "one.html").read_text().lower()
    assert (tmp_path / "deep" / "one.csv").read_text().splitlines() == ["x,y", "1,0.333333", "2,4"]
    assert drawn == ([tmp_path / "deep" / "one.svg"] if browser else [])
    assert ("one.svg was not drawn" in capsys.readouterr().out) == (browser is None)
    plots.save(fig, tmp_path / "two")
    assert (tmp_path / "two.html").is_file() and not (tmp_path / "two.csv").exists()
    plots.save(fig, tmp_path / "noise-0.05", numbers)
    assert {p.name for p in tmp_path.glob("noise*")} == {"noise-0.05.html", "noise-0.05.csv"}
    monkeypatch.setenv("PDIFF_SVG", "0")
    count = len(drawn)
    plots.save(fig, tmp_path / "three")
    assert (tmp_path / "three.html").is_file() and len(drawn) == count


def test_violins_stand_in_the_order_of_the_setting():
    frame = pd.DataFrame({"method": ["a", "a", "b", "a"], "k": [100, 9, 9, 9], "s": [0.1, 0.2, 0.3, 0.4]})
    fig = plots.violins(frame, "k", "s", "Similarity", x_title="K", y_title="IoU")
    assert list(fig.layout.xaxis.categoryarray) == ["9", "100"] and fig.layout.xaxis.type == "category"
    assert [(t.name, list(t.x), list(t.y)) for t in fig.data] == [("a", ["100", "9", "9"], [0.1, 0.2, 0.4]), ("b", ["9"], [0.3])]
    assert len({t.line.color for t in fig.data}) == 2 and fig.layout.yaxis.title.text == "IoU"


def test_no_two_of_many_methods_look_alike():
    assert len({tuple(palette.look(i).values()) for i in range(81)}) == 81
    assert all(palette.look(i)["color"] in palette.mark(i) for i in range(20))
    text = dict(zip(palette.SYMBOLS, palette.SIGNS))
    assert all(text[palette.look(i)["symbol"]] in palette.mark(i) for i in range(20))


def test_scatters_have_a_panel_per_value_and_one_look_per_method():
    table = pd.concat([frame().assign(row=r) for r in ("b", "a")])
    fig = plots.scatters(table, "row", "t")
    assert [a.text for a in fig.layout.annotations][:2] == ["b", "a"] and len(fig.data) == 6
    looks = {(t.name, t.marker.color, t.marker.symbol) for t in fig.data}
    assert len(looks) == 3 and sum(t.showlegend for t in fig.data) == 3
    np.testing.assert_allclose(fig.data[0].y, 100 * table[(table.row == "b") & (table.method == "original")].accuracy)
    assert [t.marker.size for t in fig.data if t.name == "average"][0] > [t.marker.size for t in fig.data if t.name == "p-diff"][0]


def test_frontier_runs_along_its_edge_and_shows_every_method():
    points = pd.DataFrame({"method": list("abcd"), "label": ["a", "", "c", "d"], "group": ["s", "s", "s", "p"], "x": [0.1, 0.2, 0.3, 0.25],
                           "y": [1.0, 0.5, 2.0, 3.0], "x_spread": 0.01, "y_spread": [0.1, 0.2, 0.3, 0.4]})
    fig = plots.frontier(points, ["a", "c"], "t", x_title="x", y_title="y")
    edge, simple, other = fig.data
    assert (list(edge.x), list(edge.y), edge.mode) == ([0.1, 0.3], [1.0, 2.0], "lines")
    assert list(simple.customdata) == ["a", "b", "c"] and list(other.y) == [3.0]
    assert [(note.text, note.x, note.y) for note in fig.layout.annotations] == [("a", 0.1, 1.0), ("c", 0.3, 2.0), ("d", 0.25, 3.0)]
    assert list(simple.error_y.array) == [0.1, 0.2, 0.3]


def test_matrix_writes_its_numbers_and_leaves_the_missing_empty():
    values = pd.DataFrame([[1.0, float("nan")], [-0.25, 3.0]], index=["r", "s"], columns=["c", "d"])
    fig = plots.matrix(values, "t", bar="points", diverging=True, digits=2)
    assert [list(row) for row in fig.data[0].text] == [["+1.00", ""], ["-0.25", "+3.00"]] and (fig.data[0].zmin, fig.data[0].zmax) == (-3, 3)
    assert list(fig.data[0].x) == ["c", "d"] and list(fig.data[0].y) == ["r", "s"]
    assert plots.matrix(values * float("nan"), "t", bar="b", diverging=True).data[0].zmin is None


def test_facets_do_not_join_names_and_write_the_title_below_them():
    table = pd.DataFrame({"method": "m", "x": [1, 2, 4], "name": list("abc"), "y": [1.0, 2.0, 3.0], "spread": 0.1, "n": 5})
    numbers, names = [plots.facets(table, x, "y", None, "t", x_title="here", y_title="y") for x in ("x", "name")]
    assert [f.data[0].mode for f in (numbers, names)] == ["lines+markers", "markers"]
    # An axis moves its own title out of its labels' way; the one that panels share stays where it is.
    assert (numbers.layout.xaxis.title.text, names.layout.xaxis.title.text) == (None, "here")
    assert [[a.text for a in f.layout.annotations] for f in (numbers, names)] == [["here", "y"], ["y"]]
