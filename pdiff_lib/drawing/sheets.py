"""Figures of forms: pictures in rows, and a form while noise leaves its parameters. `plots` has them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from PIL import Image
from plotly.subplots import make_subplots
from torch import Tensor

from pdiff_lib.drawing.palette import COLOURS

GAP = 3  # cells between pictures
INK = ("#f1f1ee", "#111111")  # paper, and ink
LEVELS = 250  # of brightness
Mesh = tuple[Float[Tensor, "_ 3"], Int64[Tensor, "_ 3"]]
LIGHTING = {"ambient": 0.35, "diffuse": 0.85, "specular": 0.1, "roughness": 0.8}


def sheet(rows: Mapping[str, Float[Tensor, "n h w"]], title: str, lit: bool = False) -> go.Figure:
    """Pictures in rows.

    Args:
        rows: by what stands before each row; brightness from 0 to 1, NaN for nothing. Rows may differ in length.
        title: what, on what, at which scale.
        lit: pictures of bodies, as a camera sees them; else ink on paper.
    """
    (h, w), longest = next(iter(rows.values())).shape[1:], max(len(r) for r in rows.values())
    high, strips = h + GAP, []
    for row in rows.values():
        row = torch.cat([row, row.new_full((longest - len(row), h, w), torch.nan)])
        strips.append(torch.cat([*F.pad(row, (0, GAP, 0, GAP), value=torch.nan)], dim=1))
    z, share = torch.cat(strips).clamp(0, 1) * LEVELS, LEVELS / 255  # bytes, which are a quarter of the size; above the levels: nothing
    (dark, bright), nothing = ("#000000", "#ffffff") if lit else INK, [[share + 0.001, "white"], [1, "white"]]
    fig = go.Figure(go.Heatmap(z=z.round().nan_to_num(255).byte().cpu().numpy(), zmin=0, zmax=255, showscale=False, hoverinfo="skip",
                               colorscale=[[0, dark], [share, bright], *nothing]))
    scale = min(960 / (longest * (w + GAP)), 110 / h)
    fig.update_xaxes(visible=False).update_yaxes(autorange="reversed", scaleanchor="x", showgrid=False, ticks="", linecolor="white",
                                                 tickvals=[i * high + h / 2 for i in range(len(rows))], ticktext=list(rows))
    wide = max(round(scale * longest * (w + GAP)) + 230, 8 * max(map(len, title.split("<br>"))) + 40)  # a long title is not cut off
    return fig.update_layout(title=title, width=wide, height=round(scale * len(rows) * high) + 100,
                             margin={"l": 200, "t": 70, "b": 15, "r": 15})


def moving(pictures: Float[Tensor, "S n h w"], path: Path, milliseconds: int = 100, side: int = 240) -> Path:
    """A moving picture: n pictures side by side at S moments, there and, after a while, from the beginning. WebP, some 100 KB.

    Args:
        pictures: brightness from 0 to 1, NaN for nothing.
        path: where to.
        milliseconds: of each moment; the last stays for two seconds.
        side: pixels of each picture.

    Raises:
        ValueError: a path that does not end in .webp.
    """
    if path.suffix != ".webp":
        raise ValueError(f"{path.name}: expected a name that ends in .webp")
    large = F.interpolate(pictures.nan_to_num(1.0).clamp(0, 1).cpu(), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    frames = [Image.fromarray((255 * torch.cat([*moment], dim=1)).round().byte().numpy()) for moment in large]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[*[milliseconds] * (len(frames) - 1), 2000], loop=0, quality=70)
    return path


def forming(form: Float[Tensor, "h w"] | Mesh, nearest: Float[Tensor, "h w"] | Mesh, t: Sequence[int | float], distance: Float[Tensor, "S"],
            title: str, *, usual: float, moment: int, axis: str, measure: str, up: int = 1) -> go.Figure:
    """A form on its way from noise, the training object that it ends nearest to, and how far it is from it.

    Args:
        form, nearest: pictures, brightness from 0 to 1, or vertices and faces: then both are bodies in one space, side by side.
        t: [S] moments.
        distance: [S] to the nearest training object at each of them; NaN where there is no form.
        title: what, on what, at which scale.
        usual: the distance of held-out networks, a line.
        moment: which of them is shown.
        axis, measure: what t and distance are.
        up: the axis of bodies that points up, 1 (y) or 2 (z).
    """
    bodies = isinstance(form, tuple)
    panels = ["the field, and the training object it ends nearest to", "distance to the nearest training object"]
    if bodies:
        fig = make_subplots(rows=1, cols=2, column_widths=[0.62, 0.38], specs=[[{"type": "scene"}, {"type": "xy"}]], subplot_titles=panels)
        light = {"x": -2000, "y": 3000 if up == 1 else -4000, "z": 4000 if up == 1 else 3000}
        for mesh, right, colour, name in ((form, -1.1, COLOURS[0], "field"), (nearest, 1.1, "#999999", "nearest")):
            fig.add_mesh3d(**coordinates(mesh, right), color=colour, name=name, lighting=LIGHTING, lightposition=light, hoverinfo="skip", row=1, col=1)
        hidden = {"visible": False}
        fig.update_scenes(aspectmode="data", xaxis={**hidden, "range": [-2.2, 2.2]}, yaxis={**hidden, "range": [-1.1, 1.1]},
                          zaxis={**hidden, "range": [-1.1, 1.1]}, camera={"up": {"x": 0, "y": 2 - up, "z": up - 1}, "eye": {"x": 0.3, "y": 0.3 if up == 1 else -1.6, "z": 1.6 if up == 1 else 0.3}})
    else:
        fig = make_subplots(rows=1, cols=3, column_widths=[0.3, 0.3, 0.4], subplot_titles=["the field", "the training object it ends nearest to", panels[1]])
        ink = {"zmin": 0, "zmax": 1, "showscale": False, "colorscale": [[0, INK[0]], [1, INK[1]]], "hoverinfo": "skip"}
        fig.add_heatmap(z=form.cpu().numpy(), name="field", **ink, row=1, col=1)
        fig.add_heatmap(z=nearest.cpu().numpy(), name="nearest", **ink, row=1, col=2)
        for col in (1, 2):
            fig.update_xaxes(visible=False, constrain="domain", row=1, col=col)
            fig.update_yaxes(visible=False, autorange="reversed", scaleanchor=f"x{col if col > 1 else ''}", constrain="domain", row=1, col=col)
    last = 2 if bodies else 3
    x, y = list(range(len(t))), distance.cpu().numpy()
    fig.add_scatter(x=x, y=y, mode="lines", name="this one", line={"color": COLOURS[0]}, row=1, col=last)
    fig.add_scatter(x=[x[0], x[-1]], y=[usual] * 2, mode="lines", name="held-out networks (median)", line={"color": "#555", "dash": "dash"}, row=1, col=last)
    fig.add_scatter(x=[moment], y=[y[moment]], mode="markers", name="now", showlegend=False, row=1, col=last,
                    marker={"size": 13, "color": "#D55E00", "symbol": "circle-open", "line": {"width": 3}})
    shown = sorted({round(i * (len(t) - 1) / 4) for i in range(5)})
    fig.update_xaxes(title=axis, tickvals=shown, ticktext=[f"{t[i]:.3g}" for i in shown], row=1, col=last)
    fig.update_yaxes(title=measure, rangemode="tozero", row=1, col=last)
    return fig.update_layout(title=title, width=960, height=430, margin={"t": 100}, legend={"orientation": "h", "y": -0.25, "x": 0.62})


def coordinates(mesh: Mesh, right: float = 0.0) -> dict[str, object]:
    """Of a mesh for plotly, moved to the right. One without faces is a point out of sight: plotly draws no empty one."""
    vertices, faces = mesh
    if not len(faces):
        vertices, faces = torch.full((3, 3), torch.nan), torch.tensor([[0, 1, 2]])
    (x, y, z), (i, j, k) = vertices.cpu().numpy().T, faces.cpu().numpy().astype("uint32").T
    return {"x": x + right, "y": y, "z": z, "i": i, "j": j, "k": k}
