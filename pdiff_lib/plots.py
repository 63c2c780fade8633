"""Figures: a tidy DataFrame or a tensor in, a plotly figure out; nothing is computed here.

Titles state network, dataset and scale (pass them as `title`). Colours are Okabe and Ito's, safe for the colour-blind,
and symbols differ with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import torch
import torch.nn.functional as F
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from pdiff_lib.subset import Subset

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00", "#882255", "#999933"]
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "triangle-down", "star", "cross", "x", "pentagon"]
DIVERGING, SEQUENTIAL = "RdBu_r", "Viridis"
HEATMAP_NUMBERS = 4096  # a heatmap shows every k-th number of longer vectors: more would not be seen, only stored
COLUMNS = 64

pio.templates["pdiff"] = go.layout.Template(layout={
    "colorway": COLOURS, "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 12}, "paper_bgcolor": "white",
    "plot_bgcolor": "white", "title": {"x": 0.02, "font": {"size": 14}}, "margin": {"t": 70, "b": 55, "l": 65, "r": 25},
    "xaxis": {"gridcolor": "#e5e5e5", "linecolor": "#555", "zeroline": False, "ticks": "outside"},
    "yaxis": {"gridcolor": "#e5e5e5", "linecolor": "#555", "zeroline": False, "ticks": "outside"}})
pio.templates.default = "plotly+pdiff"


def scatter(frame: pd.DataFrame, title: str) -> go.Figure:
    """Accuracy against maximum similarity, a point per network (Figure 4).

    Args:
        frame: rows of `Experiment.frame`.
        title: what, on what, at which scale.
    """
    fig = go.Figure()
    methods = list(enumerate(frame.groupby("method", sort=False)))
    for i, (method, part) in sorted(methods, key=lambda m: len(m[1][1]) == 1):  # single networks on top of clouds
        single = len(part) == 1
        fig.add_scatter(
            x=part.max_similarity, y=100 * part.accuracy, mode="markers", name=method,
            customdata=part[["index", "nearest", "distance", "outside_span"]],
            hovertemplate=(f"{method} %{{customdata[0]}}<br>accuracy %{{y:.2f}} %<br>maximum similarity %{{x:.3f}}"
                           "<br>nearest original: %{customdata[1]}<br>distance to the nearest %{customdata[2]:.3g}"
                           "<br>outside the span %{customdata[3]:.2f}<extra></extra>"),
            marker={"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 15 if single else 7,
                    "opacity": 1 if single else 0.55, "line": {"width": 1 if single else 0, "color": "white"}})
    return fig.update_layout(title=title, width=820, height=520, xaxis_title="maximum similarity to the originals (IoU)",
                             yaxis_title="accuracy (%)", hovermode="closest",
                             legend={"itemsizing": "constant", "title": "networks"})


def grid(sub: Subset, theta: Float[Tensor, "D"]) -> Float[Tensor, "R C"]:
    """A parameter vector as a picture: weights above, biases below (Figure 1); NaN where a row is not full.

    Vectors of more than `HEATMAP_NUMBERS` numbers are thinned evenly.
    """
    tensors = sub.unflatten(theta)
    every = -(-sub.numel // HEATMAP_NUMBERS)
    blocks = []
    for below in (False, True):
        flat = torch.cat([theta[:0], *(t.reshape(-1) for n, t in tensors.items() if n.endswith("bias") == below)])[::every]
        rows = -(-len(flat) // COLUMNS)
        blocks.append(F.pad(flat, (0, rows * COLUMNS - len(flat)), value=float("nan")).view(rows, COLUMNS))
    return torch.cat(blocks)


def heatmaps(sub: Subset, panels: Mapping[str, Float[Tensor, "D"]], title: str,
             differences: Sequence[str] = ()) -> go.Figure:
    """Parameter vectors side by side, weights above and biases below (Figure 1).

    Args:
        sub: the subset they belong to.
        panels: vectors by panel title, drawn with one colour scale.
        title: what, on what, at which scale.
        differences: panels that get a scale of their own, centred on zero.
    """
    shared = torch.stack([v for k, v in panels.items() if k not in differences] or list(panels.values()))
    fig = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.04)
    for i, (name, theta) in enumerate(panels.items(), 1):
        axis = "coloraxis2" if name in differences else "coloraxis"
        fig.add_heatmap(z=grid(sub, theta).cpu().numpy(), coloraxis=axis, row=1, col=i, name=name,
                        hovertemplate="%{z:.4g}<extra></extra>")
    fig.update_layout(title={"text": title, "y": 0.96}, margin={"t": 105}, width=max(880, 200 * len(panels)), height=430,
                      coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": "value", "x": 1.0, "len": 0.9},
                                 "cmin": float(shared.min()), "cmax": float(shared.max())})
    if differences:
        limit = float(torch.stack([panels[d] for d in differences]).abs().max()) or 1.0
        both = len(differences) < len(panels)
        fig.update_layout(margin={"r": 190 if both else 90}, coloraxis2={
            "colorscale": DIVERGING, "cmin": -limit, "cmax": limit,
            "colorbar": {"title": "difference", "x": 1.15 if both else 1.0, "len": 0.9}})
    fig.update_yaxes(autorange="reversed", showticklabels=False, ticks="", showgrid=False)
    fig.update_xaxes(showticklabels=False, ticks="", showgrid=False)
    return fig.update_yaxes(title="weights above, biases below", col=1)


def trajectory(sub: Subset, t: Sequence[int], theta: Float[Tensor, "S D"], accuracy: Float[Tensor, "S M"],
               title: str) -> go.Figure:
    """Denoising, step by step: a slider over the moments; decoded parameters, and accuracies along the way (Figure 5b).

    Args:
        sub: the subset that is generated.
        t: [S] remaining diffusion steps.
        theta: [S D], the first network's parameters at each moment.
        accuracy: [S M], of M networks, fractions.
        title: what, on what, at which scale.
    """
    fig = make_subplots(rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.22,
                        subplot_titles=["decoded parameters of network 0", "accuracy along the reverse process"])
    pictures = [grid(sub, v).cpu().numpy() for v in theta]
    x = list(range(len(t)))
    fig.add_heatmap(z=pictures[-1], coloraxis="coloraxis", row=1, col=1, hovertemplate="%{z:.4g}<extra></extra>")
    fig.add_scatter(x=[x[-1]] * accuracy.shape[1], y=100 * accuracy[-1].numpy(), mode="markers", row=1, col=2,
                    marker={"size": 11, "color": "black", "symbol": "circle-open", "line": {"width": 2}}, name="now",
                    showlegend=False)
    for m in range(accuracy.shape[1]):
        fig.add_scatter(x=x, y=100 * accuracy[:, m].numpy(), mode="lines+markers", name=f"seed {m}", row=1, col=2,
                        marker={"symbol": SYMBOLS[m % len(SYMBOLS)], "color": COLOURS[m % len(COLOURS)]})
    fig.frames = [go.Frame(name=str(step), traces=[0, 1], data=[
        go.Heatmap(z=pictures[i]), go.Scatter(x=[i] * accuracy.shape[1], y=100 * accuracy[i].numpy())])
        for i, step in enumerate(t)]
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    fig.update_layout(
        title=title, width=1000, height=520, margin={"b": 120},
        coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": "value", "x": 0.4, "len": 0.9},
                   "cmin": float(theta[-1].min()), "cmax": float(theta[-1].max())},
        sliders=[{"active": len(t) - 1, "currentvalue": {"prefix": "diffusion steps that remain: "}, "pad": {"t": 45},
                  "steps": [{"label": str(s), "method": "animate", "args": [[str(s)], jump]} for s in t]}])
    fig.update_xaxes(showticklabels=False, ticks="", showgrid=False, col=1)
    fig.update_yaxes(autorange="reversed", showticklabels=False, ticks="", showgrid=False, col=1)
    fig.update_yaxes(title="weights above, biases below", col=1)
    fig.update_xaxes(title="diffusion steps that remain", tickvals=x, ticktext=[str(s) for s in t], col=2)
    return fig.update_yaxes(title="accuracy (%)", col=2)


def lines(frame: pd.DataFrame, x: str, y: str, by: str | None, title: str, *, x_title: str, y_title: str,
          log_x: bool = False, log_y: bool = False, markers: bool = True) -> go.Figure:
    """Curves from a tidy frame, one per value of the column `by`."""
    fig = go.Figure()
    for i, (name, part) in enumerate(frame.groupby(by, sort=False) if by else [(y_title, frame)]):
        fig.add_scatter(x=part[x], y=part[y], name=str(name), mode="lines+markers" if markers else "lines",
                        marker={"symbol": SYMBOLS[i % len(SYMBOLS)]}, line={"color": COLOURS[i % len(COLOURS)]})
    fig.update_layout(title=title, width=820, height=430, xaxis_title=x_title, yaxis_title=y_title, legend_title=by,
                      showlegend=by is not None)
    # On a logarithmic axis the values themselves are the ticks: they are few and chosen.
    fig.update_xaxes({"type": "log", "tickvals": sorted(set(frame[x]))} if log_x else {"type": "linear"})
    return fig.update_yaxes({"type": "log", "dtick": 1} if log_y else {"type": "linear"})


def columns(vectors: Mapping[str, Tensor], **more: Sequence) -> pd.DataFrame:
    """Vectors of one length as the columns of a table, for a figure's CSV."""
    return pd.DataFrame({**more, **{name: v.cpu().numpy() for name, v in vectors.items()}})


def save(fig: go.Figure, path: str | Path, numbers: pd.DataFrame | None = None) -> go.Figure:
    """Keep a figure: `path`.html (interactive), `path`.csv (its numbers), and `path`.svg where a Chrome or Chromium is.

    Returns:
        The figure, to be shown by the notebook.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.write_html(path.with_suffix(".html"), include_plotlyjs="cdn", full_html=True)
    if numbers is not None:
        numbers.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    if any(shutil.which(b) for b in ("chromium", "google-chrome", "chrome")):
        fig.write_image(path.with_suffix(".svg"))
    else:
        print(f"no Chrome or Chromium on this machine: {path.name}.svg was not drawn (the HTML was)")
    return fig
