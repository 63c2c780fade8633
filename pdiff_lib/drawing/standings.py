"""The arena's figure: how good, and how far from every original."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pdiff_lib.base import score as scores
from pdiff_lib.drawing.palette import look

DISTANCE = "distance to the nearest original (1 = the originals' own median)"
WIDE, LEFT = 3.0, 0.05  # median distance from which on the axis is logarithmic; where that begins
GREYS = ["#555555", "#888888", "#aaaaaa", "#777777", "#999999"]


def standings(frame: pd.DataFrame, baselines: Sequence[str], bar: float, title: str) -> go.Figure:
    """Score against relative distance, a point per method (the mean over its networks, whiskers of those that are no baselines from the 10th
    to the 90th percentile), a panel per order of the hidden units. Where distances go over orders of magnitude their axis is
    logarithmic, with what is at 0 at its left end; else what lies far beyond all others is named below the panel, not drawn.

    Args:
        frame: rows of `Arena.frame`; rows with order "" are drawn in every panel.
        baselines: methods that make the frontier: grey, strengths of one kind joined by a line.
        bar: score from which on a network counts as performant; dashed.
        title: what, on what, at which scale.
    """
    score = scores.of(frame)
    orders, everywhere = [o for o in frame.order.unique() if o], frame[frame.order == ""]
    names = [m for m in frame.method.unique() if m not in baselines]
    kinds = list(dict.fromkeys(kind(m) for m in baselines))
    fig = make_subplots(rows=1, cols=len(orders), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[f"{o} order" for o in orders])
    means = frame.groupby(["order", "method"], sort=False).distance.mean()
    wide, right = _reach(means)
    for col, order in enumerate(orders, 1):
        part = pd.concat([frame[frame.order == order], everywhere])
        for i, group in enumerate(kinds):
            rows = [part[part.method == m] for m in baselines if kind(m) == group and (part.method == m).any()]
            if rows:
                _points(fig, col, rows, score, group, {"color": GREYS[i % len(GREYS)], "symbol": look(i)["symbol"]}, "lines+markers")
        for i, name in enumerate(names):
            if (part.method == name).any():
                _points(fig, col, [part[part.method == name]], score, name, look(i), "markers")
        beyond = [f"{m} ({d:.3g})" for m, d in means[order].items() if d > right and not wide]
        if beyond:
            fig.add_annotation(text=f"farther: {', '.join(beyond)}", x=1, y=0, xref="x domain", yref="y domain", xanchor="right", yanchor="bottom",
                               showarrow=False, font={"size": 10, "color": "#555"}, row=1, col=col)
        fig.add_hline(score.scale * bar, line={"dash": "dash", "width": 1, "color": "#555"}, row=1, col=col)
    fig.update_layout(title=title, width=460 * len(orders) + 330, height=max(560, 130 + 20 * (len(kinds) + len(names))), hovermode="closest",
                      legend={"itemsizing": "constant", "font": {"size": 11}, "tracegroupgap": 0})
    if wide:
        fig.for_each_trace(lambda t: t.update(x=[max(d, LEFT) for d in t.x]))
    fig.update_xaxes(title=DISTANCE, **({"type": "log"} if wide else {"range": [-0.08, min(right, 1.08 * means.max())]}))
    return fig.update_yaxes(title=score.label, col=1)


def field(frame: pd.DataFrame, chosen: str, title: str) -> go.Figure:
    """Score against relative distance, a point per network: those of one method in colour, all others grey. Where distances go over orders
    of magnitude, or the method in colour does, their axis is logarithmic, with what is nearer than `LEFT` at its left end; else it ends
    before what lies far beyond all others. How many networks either moves or leaves out is written above the axes.

    Args:
        frame: rows of `Arena.frame`.
        chosen: the method in colour.
        title: what, on what, at which scale.
    """
    score, (wide, right) = scores.of(frame), _reach(frame.groupby(["order", "method"]).distance.mean())
    wide = bool(wide or frame.distance[frame.method == chosen].max() > right)
    fig = go.Figure()
    for i, (method, part) in sorted(enumerate(frame.groupby("method", sort=False)), key=lambda m: m[1][0] == chosen):
        marker = {"size": 8, "opacity": 0.8, **look(1)} if method == chosen else {"size": 4, "opacity": 0.35, "color": GREYS[i % len(GREYS)]}
        fig.add_scatter(x=part.distance.clip(lower=LEFT) if wide else part.distance, y=score.scale * part[score.column], mode="markers",
                        name=method, marker=marker, showlegend=False, customdata=part[["index", "distance"]],
                        hovertemplate=f"{method} %{{customdata[0]}}<br>{score.name} %{{y:.1f}} {score.unit}<br>"
                        "distance %{customdata[1]:.2f}<extra></extra>")
    off = frame[frame.distance < LEFT] if wide else frame[frame.distance > right]
    note = (f"drawn at {LEFT:g}, nearer than that" if wide else f"not drawn, farther than {right:.2g}") + f": {_counted(off)}"
    fig.add_annotation(text=note, visible=len(off) > 0, x=1, y=1, xref="paper", yref="paper", xanchor="right", yanchor="bottom",
                       showarrow=False, font={"size": 10, "color": "#555"})
    fig.update_xaxes(title=DISTANCE, **({"type": "log", "dtick": "D2"} if wide else {"range": [-0.03 * right, min(right, 1.08 * frame.distance.max())]}))
    return fig.update_layout(title=title, hovermode="closest", yaxis_title=score.label)


def _reach(means: pd.Series) -> tuple[bool, float]:
    """Of mean distances of methods: whether they go over orders of magnitude, and where an axis that does not ends."""
    return bool(means.median() > WIDE), float(2.7 * max(1.0, means.median()))


def _counted(networks: pd.DataFrame, names: int = 3) -> str:
    """How many of each method, the most frequent ones by name."""
    counts = networks.method.value_counts()
    others = [f"{counts[names:].sum()} of {len(counts) - names} others"] if len(counts) > names else []
    return ", ".join([f"{method} ({n})" for method, n in counts[:names].items()] + others)


def kind(method: str) -> str:
    """Of a method at a strength: its name without the number at its end, if there is one.

    >>> kind("interpolation 0.1"), kind("soup of 16"), kind("SANE KDE30")
    ('interpolation', 'soup of', 'SANE KDE30')
    """
    return re.sub(r" [\d.]+$", "", method)


def _points(fig: go.Figure, col: int, parts: Sequence[pd.DataFrame], score: scores.Score, name: str, marker: dict, mode: str) -> None:
    values = [(score.scale * p[score.column], p.distance, str(p.method.iloc[0])) for p in parts]
    y, x = [v.mean() for v, _, _ in values], [d.mean() for _, d, _ in values]
    low, high = ([v.quantile(q) for v, _, _ in values] for q in (0.1, 0.9))
    whiskers = {"type": "data", "array": [h - v for h, v in zip(high, y)], "arrayminus": [v - w for v, w in zip(y, low)],
                "thickness": 0.8, "width": 2, "color": marker["color"]}
    fig.add_scatter(
        x=x, y=y, mode=mode, name=name, legendgroup=name, showlegend=col == 1, row=1, col=col, line={"width": 1, "color": marker["color"]},
        marker={**marker, "size": 7 if mode == "lines+markers" else 11}, text=[m for _, _, m in values],
        customdata=x, error_y=whiskers if mode == "markers" else None,
        hovertemplate=f"%{{text}}<br>{score.name} %{{y:.1f}} {score.unit}<br>distance %{{customdata:.2f}}<extra></extra>")
