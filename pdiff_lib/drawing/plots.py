"""Figures: a tidy DataFrame or a tensor in, a plotly figure out; nothing is computed here.

Titles state network, dataset and scale (pass them as `title`); colours and symbols are those of `palette`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from pdiff_lib.base import score as scores
from pdiff_lib.drawing.palette import COLOURS, DIVERGING, LABELS, SEQUENTIAL, look
from pdiff_lib.drawing.pictures import confusion, denoising, grid, heatmaps, pairs, trajectory  # noqa: F401
from pdiff_lib.drawing.renderer import draw
from pdiff_lib.drawing.seen import detections, made, masks  # noqa: F401
from pdiff_lib.drawing.sheets import forming, moving, sheet  # noqa: F401
from pdiff_lib.drawing.standings import field, standings  # noqa: F401


def scatter(frame: pd.DataFrame, title: str) -> go.Figure:
    """Accuracy, or the score of another task, against maximum similarity, a point per network (Figure 4).

    Args:
        frame: rows of `Experiment.frame`.
        title: what, on what, at which scale.
    """
    score = scores.of(frame)
    fig = _clouds(_in_units(frame, score), "max_similarity", score.column,
                  f"{score.name} %{{y:.2f}} {score.unit}<br>maximum similarity %{{x:.3f}}<br>nearest original: %{{customdata[1]}}"
                  "<br>distance to the nearest %{customdata[2]:.3g}<br>outside the span %{customdata[3]:.2f}",
                  ["index", "nearest", "distance", "outside_span"])
    return fig.update_layout(title=title, width=820, height=520, xaxis_title=_similarity(score),
                             yaxis_title=score.label)


def _similarity(score: scores.Score) -> str:
    return f"maximum similarity to the originals ({score.similarity})"


def _in_units(frame: pd.DataFrame, score: scores.Score) -> pd.DataFrame:
    return frame.assign(**{score.column: score.scale * frame[score.column]})


def scatters(frame: pd.DataFrame, by: str, title: str) -> go.Figure:
    """`scatter`, a panel per value of a column, each with axes of its own (Figures 3, 4, 5a).

    Args:
        frame: rows of `Experiment.frame` with the column `by`.
        by: column; the panels come in the order of its values.
        title: what, on what, at which scale.
    """
    panels, score = list(frame.groupby(by, sort=False)), scores.of(frame)
    fig = make_subplots(rows=1, cols=len(panels), subplot_titles=[str(name) for name, _ in panels], horizontal_spacing=0.06,
                        x_title=_similarity(score), y_title=score.label)
    order = {method: i for i, method in enumerate(frame.method.unique())}
    for col, (_, panel) in enumerate(panels, 1):
        for method, part in panel.groupby("method", sort=False):
            fig.add_scatter(x=part.max_similarity, y=score.scale * part[score.column], mode="markers", name=method, legendgroup=method,
                            showlegend=col == 1, row=1, col=col, hovertemplate=f"{method}<br>%{{y:.2f}} {score.unit}<br>%{{x:.3f}}<extra></extra>",
                            marker={**look(order[method]), "size": 14 if part["index"].max() == 0 else 5})
    fig.update_layout(title=title, width=1120, height=470, margin={"t": 100, "l": 95, "b": 75}, legend={"itemsizing": "constant"})
    return _common_titles(fig)


def _common_titles(fig: go.Figure) -> go.Figure:
    """Titles of panels and of the axes that panels share, in the size of other axes; clear of the tick labels."""
    return fig.update_annotations(font_size=13).update_annotations({"xshift": -55}, {"textangle": -90})


def projection(frame: pd.DataFrame, explained: Sequence[float], title: str) -> go.Figure:
    """Networks in the plane of the zoo's two first principal components, a point per network.

    Args:
        frame: columns `method`, `index`, `accuracy` (fraction; or `score`), `PC1`, `PC2` (raw parameter units).
        explained: share of the zoo's variance that each of the two components holds.
        title: what, on what, at which scale.
    """
    score = scores.of(frame)
    fig = _clouds(_in_units(frame, score), "PC1", "PC2", f"{score.name} %{{customdata[1]:.2f}} {score.unit}",
                  ["index", score.column])
    fig.update_layout(title=title, width=820, height=520)
    for axis, order, share in zip(("xaxis", "yaxis"), ("first", "second"), explained):
        fig.update_layout({axis: {"title": f"{order} principal component ({100 * share:.0f} % of the zoo's variance)"}})
    return fig


def _clouds(frame: pd.DataFrame, x: str, y: str, hover: str, details: list[str]) -> go.Figure:
    """A trace of points per method, in the colours and symbols that all figures of one frame share."""
    fig = go.Figure()
    methods = list(enumerate(frame.groupby("method", sort=False, observed=False)))
    for i, (method, part) in sorted(methods, key=lambda m: len(m[1][1]) == 1):  # single networks on top of clouds
        single = len(part) == 1
        fig.add_scatter(
            x=part[x], y=part[y], mode="markers", name=method, customdata=part[details],
            hovertemplate=f"{method} %{{customdata[0]}}<br>{hover}<extra></extra>",
            marker={**look(i), "size": 15 if single else 7,
                    "opacity": 1 if single else 0.55, "line": {"width": 1 if single else 0, "color": "white"}})
    return fig.update_layout(hovermode="closest", legend={"itemsizing": "constant", "title": "networks"})


def matrix(values: pd.DataFrame, title: str, *, bar: str, diverging: bool = False, digits: int = 1) -> go.Figure:
    """A table as a heatmap with its numbers; cells without one stay empty ("not run").

    Args:
        values: rows and columns as they are to be named.
        title: what, on what, at which scale.
        bar: what the numbers are, with unit.
        diverging: a scale centred on zero.
        digits: after the point.
    """
    filled = values.astype(float)
    limit = {"zmin": -filled.abs().max().max(), "zmax": filled.abs().max().max()} if diverging and filled.notna().any(axis=None) else {}
    text = [["" if pd.isna(v) else f"{v:+.{digits}f}" if diverging else f"{v:.{digits}f}" for v in row] for row in filled.to_numpy()]
    fig = go.Figure(go.Heatmap(z=filled.to_numpy(), x=list(filled.columns), y=list(filled.index), text=text, texttemplate="%{text}",
                               colorscale=DIVERGING if diverging else SEQUENTIAL, colorbar={"title": bar}, **limit,
                               hovertemplate="%{y} / %{x}: %{z}<extra></extra>"))
    fig.update_layout(title=title, width=200 + 110 * len(filled.columns), height=170 + 42 * len(filled), plot_bgcolor="#eeeeee")
    return fig.update_xaxes(showgrid=False).update_yaxes(showgrid=False, autorange="reversed")


def lines(frame: pd.DataFrame, x: str, y: str, by: str | None, title: str, *, x_title: str, y_title: str,
          log_x: bool = False, log_y: bool = False, markers: bool = True) -> go.Figure:
    """Curves from a tidy frame, one per value of the column `by`."""
    fig = go.Figure()
    for i, (name, part) in enumerate(frame.groupby(by, sort=False) if by else [(y_title, frame)]):
        fig.add_scatter(x=part[x], y=part[y], name=str(name), mode="lines+markers" if markers else "lines",
                        marker=look(i), line={"color": look(i)["color"]})
    fig.update_layout(title=title, width=820, height=430, xaxis_title=x_title, yaxis_title=y_title, legend_title=by,
                      showlegend=by is not None)
    # On a logarithmic axis the values themselves are the ticks: they are few and chosen.
    fig.update_xaxes({"type": "log", "tickvals": sorted(set(frame[x]))} if log_x else {"type": "linear"})
    if not pd.api.types.is_numeric_dtype(frame[x]):  # each name is written, and has room below the figure
        fig.update_xaxes(type="category", dtick=1, tickangle=90, tickfont_size=10)
        fig.update_layout(width=max(820, 190 + 13 * frame[x].nunique()), height=430 + 6 * frame[x].str.len().max())
    return fig.update_yaxes({"type": "log", "dtick": 1} if log_y else {"type": "linear"})


def facets(frame: pd.DataFrame, x: str, y: str, facet: str | None, title: str, *, x_title: str, y_title: str,
           log_x: bool = False) -> go.Figure:
    """Means with their spread against one setting, a curve per method and a panel per value of another setting.

    Args:
        frame: a row per point of a curve: `method`, the columns `x` and `y`, `spread` (of y, drawn up and down), `n`
            (networks behind the point), and the column `facet`.
        x, y, facet: columns; no facet: one panel.
        title: what, on what, at which scale.
        x_title, y_title: with units.
        log_x: logarithmic x.
    """
    panels = list(frame.groupby(facet, sort=True)) if facet else [("", frame)]
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    named = not pd.api.types.is_numeric_dtype(frame[x])
    fig = make_subplots(rows=down, cols=across, shared_yaxes=True, shared_xaxes=True, horizontal_spacing=0.03,
                        vertical_spacing=0.3 / down, x_title=None if named else x_title, y_title=y_title,
                        subplot_titles=[f"{facet} = {value}" for value, _ in panels] if facet else None)
    order = {method: i for i, method in enumerate(frame.method.unique())}
    mode = "markers" if named else "lines+markers"  # nothing lies between two names
    for at, (_, panel) in enumerate(panels):
        for method, part in panel.groupby("method", sort=False):
            i = order[method]
            fig.add_scatter(
                x=part[x], y=part[y], error_y={"array": part.spread, "thickness": 1, "width": 4}, customdata=part[["spread", "n"]],
                name=method, legendgroup=method, showlegend=at == 0, mode=mode, row=at // across + 1,
                col=at % across + 1, line={"color": look(i)["color"]}, marker={**look(i), "size": 8},
                hovertemplate=f"{method}<br>{x} %{{x}}<br>%{{y:.4g}} +- %{{customdata[0]:.2g}} (%{{customdata[1]}} networks)"
                              "<extra></extra>")
    fig.update_layout(title=title, width=1120, height=160 + 300 * down, margin={"t": 100, "b": 75, "l": 95},
                      legend={"title": "networks", "tracegroupgap": 0})
    _common_titles(fig)
    values = sorted(set(frame[x]))
    if named:  # the title below the names, however long they are
        fig.update_xaxes(title={"text": x_title, "font_size": 13}, row=down)
    elif log_x or len(values) < 6:  # values that were chosen, not a range
        fig.update_xaxes(tickvals=values)
    return fig.update_xaxes(type="log") if log_x else fig


def frontier(frame: pd.DataFrame, edge: Sequence[str], title: str, *, x_title: str, y_title: str) -> go.Figure:
    """Methods as points with the spread of their seeds, and the frontier of the simple ones as a line.

    Args:
        frame: a row per method: `method`, `label` (written beside the point), `group` (a colour and a symbol each), `x`, `y`,
            `x_spread`, `y_spread`.
        edge: the methods on the frontier, in the order of rising x.
        title: what, on what, at which scale.
        x_title, y_title: with units.
    """
    fig = go.Figure()
    line = frame.set_index("method").loc[list(edge)]
    fig.add_scatter(x=line.x, y=line.y, mode="lines", line={"color": "#777777", "dash": "dash"},
                    name="frontier of the simple")
    for i, (group, part) in enumerate(frame.groupby("group", sort=False)):
        bars = {f"error_{a}": {"array": part[f"{a}_spread"], "thickness": 1, "width": 3} for a in "xy"}
        fig.add_scatter(x=part.x, y=part.y, mode="markers", customdata=part.method, name=group, **bars, marker={**look(i), "size": 10},
                        hovertemplate=f"%{{customdata}}<br>%{{y:.3f}}<br>{x_title} %{{x:.3f}}<extra></extra>")
        for at in part[part.label != ""].itertuples():  # away from the points, which may lie on each other: each group in its direction
            fig.add_annotation(x=at.x, y=at.y, text=at.label, ax=(-35, 35, 0)[i % 3], ay=60 if i % 2 else -35, arrowhead=0, arrowwidth=1,
                               arrowcolor=look(i)["color"], font={"size": 11, "color": look(i)["color"]})
    return fig.update_layout(title=title, width=1120, height=620, xaxis_title=x_title, yaxis_title=y_title,
                             legend={"orientation": "h", "y": -0.12})


def violins(frame: pd.DataFrame, x: str, y: str, title: str, *, x_title: str, y_title: str) -> go.Figure:
    """Distributions over networks, a violin per method at each value of a setting (Figure 5c).

    Args:
        frame: a row per network: `method` and the columns `x` and `y`.
        x, y: columns; the values of x stand at equal distances.
        title: what, on what, at which scale.
        x_title, y_title: with units.
    """
    fig = go.Figure()
    values = [str(v) for v in sorted(set(frame[x]))]
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        fig.add_violin(x=part[x].astype(str), y=part[y], name=method, legendgroup=method, scalegroup=method, points=False,
                       meanline={"visible": True}, line={"color": COLOURS[i % len(COLOURS)], "width": 1.5}, spanmode="hard")
    fig.update_layout(title=title, width=820, height=470, violinmode="group", xaxis_title=x_title, yaxis_title=y_title,
                      legend_title="networks")
    return fig.update_xaxes(type="category", categoryorder="array", categoryarray=values)


def columns(vectors: Mapping[str, Tensor], **more: Sequence) -> pd.DataFrame:
    """Vectors of one length as the columns of a table, for a figure's CSV."""
    return pd.DataFrame({**more, **{name: v.cpu().numpy() for name, v in vectors.items()}})


def save(fig: go.Figure, path: str | Path, numbers: pd.DataFrame | None = None) -> go.Figure:
    """Keep a figure: `path`.html (interactive), `path`.csv (its numbers), and `path`.svg where a Chrome or Chromium is, unless $PDIFF_SVG is 0.

    The HTML fetches plotly.js from its CDN (4.7 MB in each file otherwise): without a network it shows nothing, the SVG does.

    Returns:
        The figure, to be shown by the notebook.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.write_html(f"{path}.html", include_plotlyjs="cdn", full_html=True)
    if numbers is not None:
        numbers.to_csv(f"{path}.csv", index=False, float_format="%.6g")
    if os.environ.get("PDIFF_SVG") == "0":
        pass
    elif any(shutil.which(b) for b in ("chromium", "google-chrome", "chrome")):
        draw(fig, Path(f"{path}.svg"))  # no `with_suffix`: of "noise-0.15" it would leave "noise-0"
    else:
        print(f"no Chrome or Chromium on this machine: {path.name}.svg was not drawn (the HTML was)")
    return fig
