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
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from pdiff_lib.subset import Subset

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00", "#882255", "#999933"]
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "triangle-down", "star", "cross", "x", "pentagon"]
SIGNS = "●◆■▲▼★✚✖⬟"  # the symbols, as text
DIVERGING, SEQUENTIAL = "RdBu_r", "Viridis"
HEATMAP_NUMBERS = 4096  # a heatmap shows every k-th number of longer vectors: more would not be seen, only stored
COLUMNS = 64
# What a column of `Experiment.frame` means, with its unit, for axes; accuracies are drawn in percent.
LABELS = {"accuracy": "accuracy (%)", "max_similarity": "maximum similarity to the originals (IoU)",
          "distance": "distance to the nearest original (raw parameter units)",
          "outside_span": "share of the deviation outside the originals' span",
          "seconds": "seconds per run", "step": "fine-tuning step (of the nearest original)", "k_checkpoints": "K (checkpoints in the zoo)",
          "sigma_v": "sigma_v (std of the noise on a standardised vector)", "sigma_z": "sigma_z (std of the noise on a latent)",
          "latent_dim": "L (numbers in a latent)", "pdiff_seed": "seed of autoencoder, diffusion and samples",
          "seed": "seed of network and zoo", "T": "T (diffusion steps)", "sampling_steps": "sampling steps"}

pio.templates["pdiff"] = go.layout.Template(layout={
    "colorway": COLOURS, "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 12}, "paper_bgcolor": "white",
    "plot_bgcolor": "white", "title": {"x": 0.02, "font": {"size": 14}}, "margin": {"t": 70, "b": 55, "l": 65, "r": 25},
    "xaxis": {"gridcolor": "#e5e5e5", "linecolor": "#555", "zeroline": False, "ticks": "outside"},
    "yaxis": {"gridcolor": "#e5e5e5", "linecolor": "#555", "zeroline": False, "ticks": "outside"}})
pio.templates.default = "plotly+pdiff"


def mark(i: int) -> str:
    """Symbol and colour of the i-th method as HTML, for legends outside of figures."""
    return f'<span style="color: {COLOURS[i % len(COLOURS)]}">{SIGNS[i % len(SIGNS)]}</span>'


def scatter(frame: pd.DataFrame, title: str) -> go.Figure:
    """Accuracy against maximum similarity, a point per network (Figure 4).

    Args:
        frame: rows of `Experiment.frame`.
        title: what, on what, at which scale.
    """
    fig = _clouds(frame.assign(accuracy=100 * frame.accuracy), "max_similarity", "accuracy",
                  "accuracy %{y:.2f} %<br>maximum similarity %{x:.3f}<br>nearest original: %{customdata[1]}"
                  "<br>distance to the nearest %{customdata[2]:.3g}<br>outside the span %{customdata[3]:.2f}",
                  ["index", "nearest", "distance", "outside_span"])
    return fig.update_layout(title=title, width=820, height=520, xaxis_title=LABELS["max_similarity"],
                             yaxis_title=LABELS["accuracy"])


def projection(frame: pd.DataFrame, explained: Sequence[float], title: str) -> go.Figure:
    """Networks in the plane of the zoo's two first principal components, a point per network.

    Args:
        frame: columns `method`, `index`, `accuracy` (fraction), `PC1`, `PC2` (raw parameter units).
        explained: share of the zoo's variance that each of the two components holds.
        title: what, on what, at which scale.
    """
    fig = _clouds(frame.assign(accuracy=100 * frame.accuracy), "PC1", "PC2", "accuracy %{customdata[1]:.2f} %",
                  ["index", "accuracy"])
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
            marker={"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 15 if single else 7,
                    "opacity": 1 if single else 0.55, "line": {"width": 1 if single else 0, "color": "white"}})
    return fig.update_layout(hovermode="closest", legend={"itemsizing": "constant", "title": "networks"})


def confusion(counts: Int[Tensor, "C C"], title: str, *, x_title: str, y_title: str) -> go.Figure:
    """How many images two networks put into which pair of classes; where they disagree is off the diagonal.

    Args:
        counts: [C C] images by class of the network on y and class of the network on x.
        title: what, on what, at which scale.
        x_title, y_title: the two networks.
    """
    colour = counts.double().fill_diagonal_(float("nan"))  # the agreements outnumber all else, and would set the scale
    few = len(counts) <= 20
    fig = go.Figure(go.Heatmap(z=colour.numpy(), text=[[str(n or "") for n in row] for row in counts.tolist()],
                               colorscale="Blues", zmin=0, zmax=max(float(colour.nan_to_num(0).max()), 1),
                               colorbar={"title": "images<br>off the<br>diagonal"}, texttemplate="%{text}" if few else None,
                               customdata=counts.numpy(), hovertemplate="%{y} and %{x}: %{customdata} images<extra></extra>"))
    fig.update_layout(title=title, width=520, height=480, plot_bgcolor="#eeeeee")
    fig.update_xaxes(title=f"class according to {x_title}", dtick=1 if few else 10, showgrid=False)
    return fig.update_yaxes(title=f"class according to {y_title}", dtick=1 if few else 10, showgrid=False, autorange="reversed")


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


def denoising(sub: Subset, t: Sequence[int], theta: Float[Tensor, "S D"], latents: Float[Tensor, "S 2"],
              accuracy: Float[Tensor, "S"], encoded: Float[Tensor, "K 2"], originals: float, title: str) -> go.Figure:
    """One reverse process at its end: parameters, path of its latent, accuracy on the way; the traces of the present moment
    are the heatmap and the two named "now".

    Args:
        sub: the subset that is generated.
        t: [S] remaining diffusion steps, falling to 0.
        theta: [S D] decoded parameters.
        latents: [S 2] the latent in the plane of the encoded checkpoints' principal components.
        accuracy: [S] fractions.
        encoded: [K 2] the encoded checkpoints in that plane.
        originals: their mean accuracy, a fraction.
        title: what, on what, at which scale.
    """
    fig = make_subplots(rows=1, cols=3, horizontal_spacing=0.12, column_widths=[0.36, 0.32, 0.32], subplot_titles=[
        "decoded parameters", "latent among the encoded checkpoints", "accuracy along the reverse process"])
    now = {"mode": "markers", "name": "now", "showlegend": False,
           "marker": {"size": 13, "color": COLOURS[6], "symbol": "circle-open", "line": {"width": 3}}}
    fig.add_heatmap(z=grid(sub, theta[-1]).numpy(), coloraxis="coloraxis", row=1, col=1, hovertemplate="%{z:.4g}<extra></extra>",
                    name="parameters")
    fig.add_scatter(x=encoded[:, 0].numpy(), y=encoded[:, 1].numpy(), mode="markers", name="encoded checkpoints", row=1, col=2,
                    marker={"color": "#999999", "size": 5, "opacity": 0.6})
    fig.add_scatter(x=latents[:, 0].numpy(), y=latents[:, 1].numpy(), mode="lines+markers", name="path", row=1, col=2,
                    customdata=list(t), hovertemplate="%{customdata} steps remain<extra></extra>",
                    marker={"color": COLOURS[0], "size": 4})
    fig.add_scatter(x=latents[-1:, 0].numpy(), y=latents[-1:, 1].numpy(), row=1, col=2, **now)
    fig.add_scatter(x=list(t), y=100 * accuracy.numpy(), mode="lines+markers", name="accuracy", row=1, col=3, showlegend=False,
                    marker={"color": COLOURS[0], "size": 4})
    fig.add_scatter(x=[t[-1]], y=100 * accuracy[-1:].numpy(), row=1, col=3, **now)
    fig.add_hline(100 * originals, line_dash="dash", line_color="#555", row=1, col=3, annotation_text="mean of the originals",
                  annotation_position="bottom left")
    fig.update_layout(title={"text": title, "y": 0.95}, width=1120, height=430, margin={"t": 90, "b": 90},
                      legend={"orientation": "h", "x": 0.4, "y": -0.22},
                      coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": "value", "x": 0.275, "len": 1.0, "thickness": 14},
                                 "cmin": float(theta[-1].min()), "cmax": float(theta[-1].max())})
    fig.update_xaxes(showticklabels=False, ticks="", showgrid=False, col=1)
    fig.update_yaxes(autorange="reversed", showticklabels=False, ticks="", showgrid=False,
                     title="weights above, biases below", col=1)
    fig.update_xaxes(title="first principal component", col=2).update_yaxes(title="second", title_standoff=5, col=2)
    fig.update_xaxes(title="diffusion steps that remain", autorange="reversed", col=3)
    return fig.update_yaxes(title="accuracy (%)", col=3)


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
    fig = make_subplots(rows=down, cols=across, shared_yaxes=True, shared_xaxes=True, horizontal_spacing=0.03,
                        vertical_spacing=0.3 / down, x_title=x_title, y_title=y_title,
                        subplot_titles=[f"{facet} = {value}" for value, _ in panels] if facet else None)
    order = {method: i for i, method in enumerate(frame.method.unique())}
    for at, (_, panel) in enumerate(panels):
        for method, part in panel.groupby("method", sort=False):
            i = order[method]
            fig.add_scatter(
                x=part[x], y=part[y], error_y={"array": part.spread, "thickness": 1, "width": 4}, customdata=part[["spread", "n"]],
                name=method, legendgroup=method, showlegend=at == 0, mode="lines+markers", row=at // across + 1,
                col=at % across + 1, line={"color": COLOURS[i % len(COLOURS)]}, marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
                hovertemplate=f"{method}<br>{x} %{{x}}<br>%{{y:.4g}} +- %{{customdata[0]:.2g}} (%{{customdata[1]}} networks)"
                              "<extra></extra>")
    fig.update_layout(title=title, width=1120, height=160 + 300 * down, margin={"t": 100, "b": 75, "l": 85},
                      legend={"title": "networks"}).update_annotations(font_size=13)
    values = sorted(set(frame[x]))
    if log_x or (pd.api.types.is_numeric_dtype(frame[x]) and len(values) < 6):  # values that were chosen, not a range
        fig.update_xaxes(tickvals=values)
    return fig.update_xaxes(type="log") if log_x else fig


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
