"""Figures that show parameter vectors as pictures. `plots` has them too: notebooks draw through `plots` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from pdiff_lib.base.score import ACCURACY, Score
from pdiff_lib.drawing.palette import COLOURS, DIVERGING, SEQUENTIAL, look
from pdiff_lib.networks.subset import Subset

HEATMAP_NUMBERS = 4096  # a heatmap shows every k-th number of longer vectors: more would not be seen, only stored
COLUMNS = 64


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
    return _picture_axes(fig)


def _picture_axes(fig: go.Figure, **where: int) -> go.Figure:
    """Axes of a picture made by `grid`."""
    fig.update_yaxes(autorange="reversed", showticklabels=False, ticks="", showgrid=False, **where)
    fig.update_xaxes(showticklabels=False, ticks="", showgrid=False, **where)
    return fig.update_yaxes(title="weights above, biases below", col=1)


def trajectory(sub: Subset, t: Sequence[int], theta: Float[Tensor, "S D"], accuracy: Float[Tensor, "S M"],
               title: str, score: Score = ACCURACY) -> go.Figure:
    """Denoising, step by step: a slider over the moments; decoded parameters, and accuracies along the way (Figure 5b).

    Args:
        sub: the subset that is generated.
        t: [S] remaining diffusion steps.
        theta: [S D], the first network's parameters at each moment.
        accuracy: [S M], of M networks, fractions; or another score.
        title: what, on what, at which scale.
        score: what it is.
    """
    fig = make_subplots(rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.22,
                        subplot_titles=["decoded parameters of network 0", f"{score.name} along the reverse process"])
    pictures = [grid(sub, v).cpu().numpy() for v in theta]
    x = list(range(len(t)))
    fig.add_heatmap(z=pictures[-1], coloraxis="coloraxis", row=1, col=1, hovertemplate="%{z:.4g}<extra></extra>")
    fig.add_scatter(x=[x[-1]] * accuracy.shape[1], y=score.scale * accuracy[-1].numpy(), mode="markers", row=1, col=2,
                    marker={"size": 11, "color": "black", "symbol": "circle-open", "line": {"width": 2}}, name="now",
                    showlegend=False)
    for m in range(accuracy.shape[1]):
        fig.add_scatter(x=x, y=score.scale * accuracy[:, m].numpy(), mode="lines+markers", name=f"seed {m}", row=1, col=2,
                        marker=look(m))
    fig.frames = [go.Frame(name=str(step), traces=[0, 1], data=[
        go.Heatmap(z=pictures[i]), go.Scatter(x=[i] * accuracy.shape[1], y=score.scale * accuracy[i].numpy())])
        for i, step in enumerate(t)]
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    fig.update_layout(
        title=title, width=1000, height=520, margin={"b": 120},
        coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": "value", "x": 0.4, "len": 0.9},
                   "cmin": float(theta[-1].min()), "cmax": float(theta[-1].max())},
        sliders=[{"active": len(t) - 1, "currentvalue": {"prefix": "diffusion steps that remain: "}, "pad": {"t": 45},
                  "steps": [{"label": str(s), "method": "animate", "args": [[str(s)], jump]} for s in t]}])
    _picture_axes(fig, col=1).update_xaxes(title="diffusion steps that remain", tickvals=x, ticktext=[str(s) for s in t], col=2)
    return fig.update_yaxes(title=score.label, col=2)


def denoising(sub: Subset, t: Sequence[int], theta: Float[Tensor, "S D"], latents: Float[Tensor, "S 2"],
              accuracy: Float[Tensor, "S"], encoded: Float[Tensor, "K 2"], originals: float, title: str,
              score: Score = ACCURACY) -> go.Figure:
    """One reverse process at its end: parameters, path of its latent, accuracy on the way; the traces of the present moment
    are the heatmap and the two named "now".

    Args:
        sub: the subset that is generated.
        t: [S] remaining diffusion steps, falling to 0.
        theta: [S D] decoded parameters.
        latents: [S 2] the latent in the plane of the encoded checkpoints' principal components.
        accuracy: [S] fractions; or another score.
        encoded: [K 2] the encoded checkpoints in that plane.
        originals: the mean of theirs.
        title: what, on what, at which scale.
        score: what it is.
    """
    fig = make_subplots(rows=1, cols=3, horizontal_spacing=0.12, column_widths=[0.36, 0.32, 0.32], subplot_titles=[
        "decoded parameters", "latent among the encoded checkpoints", f"{score.name} along the reverse process"])
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
    fig.add_scatter(x=list(t), y=score.scale * accuracy.numpy(), mode="lines+markers", name=score.name, row=1, col=3, showlegend=False,
                    marker={"color": COLOURS[0], "size": 4})
    fig.add_scatter(x=[t[-1]], y=score.scale * accuracy[-1:].numpy(), row=1, col=3, **now)
    fig.add_hline(score.scale * originals, line_dash="dash", line_color="#555", row=1, col=3, annotation_text="mean of the originals",
                  annotation_position="bottom left")
    fig.update_layout(title={"text": title, "y": 0.95}, width=1120, height=430, margin={"t": 90, "b": 90},
                      legend={"orientation": "h", "x": 0.4, "y": -0.22},
                      coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": "value", "x": 0.275, "len": 1.0, "thickness": 14},
                                 "cmin": float(theta[-1].min()), "cmax": float(theta[-1].max())})
    _picture_axes(fig, col=1).update_xaxes(title="first principal component", col=2).update_yaxes(title="second", title_standoff=5, col=2)
    fig.update_xaxes(title="diffusion steps that remain", autorange="reversed", col=3)
    return fig.update_yaxes(title=score.label, col=3)


def confusion(counts: Int[Tensor, "C C"], title: str, *, x_title: str, y_title: str) -> go.Figure:
    """How many images two networks put into which pair of classes; where they disagree is off the diagonal.

    Args:
        counts: [C C] images by class of the network on y and class of the network on x.
        title: what, on what, at which scale.
        x_title, y_title: the two networks.
    """
    # The agreements outnumber all else, and would set the scale: empty, and not NaN, which no message to a browser holds.
    colour, few = [[None if i == j else n for j, n in enumerate(row)] for i, row in enumerate(counts.tolist())], len(counts) <= 20
    highest = int(counts.clone().fill_diagonal_(0).max())
    fig = go.Figure(go.Heatmap(z=colour, text=[[str(n or "") for n in row] for row in counts.tolist()],
                               colorscale="Blues", zmin=0, zmax=max(highest, 1),
                               colorbar={"title": "images<br>off the<br>diagonal"}, texttemplate="%{text}" if few else None,
                               customdata=counts.numpy(), hovertemplate="%{y} and %{x}: %{customdata} images<extra></extra>"))
    fig.update_layout(title=title, width=520, height=480, plot_bgcolor="#eeeeee")
    fig.update_xaxes(title=f"class according to {x_title}", dtick=1 if few else 10, showgrid=False)
    return fig.update_yaxes(title=f"class according to {y_title}", dtick=1 if few else 10, showgrid=False, autorange="reversed")


def pairs(x: Float[Tensor, "N"], y: Float[Tensor, "N"], title: str, *, x_title: str, y_title: str) -> go.Figure:
    """What two networks give for the same items, a point per item; where they agree is the diagonal.

    Args:
        x, y: [N] one number per item, of either network; what is not finite is left out.
        title: what, on what, at which scale.
        x_title, y_title: the two networks.
    """
    shown = torch.isfinite(x) & torch.isfinite(y)
    x, y = x[shown].tolist(), y[shown].tolist()
    ends = [min([*x, *y], default=0.0), max([*x, *y], default=1.0)]
    fig = go.Figure(go.Scatter(x=ends, y=ends, mode="lines", line={"color": "#999999", "dash": "dash"}, hoverinfo="skip"))
    fig.add_scatter(x=x, y=y, mode="markers", marker={**look(0), "size": 6, "opacity": 0.6})
    fig.update_layout(title=title, width=520, height=480, showlegend=False)
    return fig.update_xaxes(title=f"output of {x_title}").update_yaxes(title=f"output of {y_title}")
