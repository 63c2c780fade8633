"""The explorer of a table of many runs: any setting against any measure."""

from __future__ import annotations

import html

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pdiff_lib.base.score import ACCURACY
from pdiff_lib.drawing import palette, plots
from pdiff_lib.drawing.widget import WRAP, Export, Figure, show

METRICS = ["accuracy", "score", "max_similarity", "distance", "outside_span", "seconds"]
NETWORK = ["method", "index", "nearest", "run", "step", "PC1", "PC2", *METRICS]  # columns that are no settings


def settings(frame: pd.DataFrame) -> list[str]:
    """The columns of a table of results that are settings; those with more than one value come first."""
    found = [c for c in frame if c not in NETWORK]
    return sorted(found, key=lambda c: frame[c].map(str).nunique() == 1)


class Sweep(widgets.VBox):
    """A measure against any setting, a curve per method, a panel per value of another setting.

    Args:
        frame: a row per network: `method`, `index`, the measures of `Experiment.frame`, and a column per setting.
        title: what was run, on what, at which scale; without one, that of `pdiff results`.

    Attributes:
        table: what is drawn: mean, spread and number of networks by method, x and facet.

    Raises:
        ValueError: no rows, or columns that are missing.
    """

    def __init__(self, frame: pd.DataFrame, title: str = ""):
        fields, measures = settings(frame), [c for c in METRICS if c in frame]
        if frame.empty or not fields or not measures or "method" not in frame:
            raise ValueError(f"{len(frame)} rows of {', '.join(frame)}: expected a row per network with its method, at least one "
                             f"of {', '.join(METRICS)}, and at least one setting")
        # A setting that is a list (widths of layers, say) is a category.
        self.frame = frame.assign(method=frame.method.astype(str), **{c: frame[c].map(lambda v: str(list(v)) if isinstance(v, (list, tuple, np.ndarray)) else v)
                                     for c in fields})
        self.title = title or frame.attrs.get("title", "")
        self.varied = [c for c in fields if self.frame[c].nunique(dropna=False) > 1]
        self.x = widgets.Dropdown(options=fields, description="x", layout={"width": "260px"})
        self.y = widgets.Dropdown(options=measures, description="y", layout={"width": "260px"})
        self.facet = widgets.Dropdown(options=["(none)", *fields], description="panels by", layout={"width": "260px"})
        self.log_x = widgets.Checkbox(False, description="logarithmic x", indent=False, layout={"width": "auto"})
        self.boxes = {m: widgets.Checkbox(True, description=m, indent=False, layout={"width": "auto", "margin": "0 14px 0 0"})
                      for m in self.frame.method.unique()}
        self.note = widgets.HTML()
        self.figure = Figure(self._drawn())
        for control in (self.x, self.y, self.facet, self.log_x):
            control.observe(lambda _: show(self.figure, self._drawn()), "value")
        for box in self.boxes.values():
            box.observe(self._show_methods, "value")
        super().__init__([
            widgets.HBox([self.x, self.y, self.facet, self.log_x], layout=WRAP),
            widgets.HBox(list(self.boxes.values()), layout=WRAP), self.figure, self.note,
            Export({"sweep": (self.figure, lambda: self.table)}, "sweep")])
        self.add_class("pdiff-sweep")

    def _drawn(self) -> go.Figure:
        x, y, facet = self.x.value, self.y.value, self.facet.value if self.facet.value not in ("(none)", self.x.value) else None
        by = ["method", x, *([facet] if facet else [])]
        scale = ACCURACY.scale if y == ACCURACY.column else 1
        values = (scale * self.frame[y]).groupby([self.frame[c] for c in by], sort=False, dropna=False)
        table = values.agg(["mean", "size"]).assign(spread=values.std(ddof=0)).reset_index().sort_values(x, kind="stable")
        # The same order, and so the same colours, whatever is on x.
        table = table.sort_values("method", key=lambda m: m.map(list(self.boxes).index), kind="stable")
        self.table = table.rename(columns={"mean": y, "size": "n"})
        pooled = [f"{c} ({self.frame[c].nunique(dropna=False)} values)" for c in self.varied if c not in by]
        self.note.value = ("Points: mean over networks; bars: their standard deviation."
                           + (f" Pooled: {html.escape(', '.join(pooled))}." if pooled else ""))
        numeric = pd.api.types.is_numeric_dtype(table[x]) and not pd.api.types.is_bool_dtype(table[x])
        fig = plots.facets(self.table, x, y, facet, f"{palette.LABELS[y]} against {x}<br><sup>{self.title}</sup>",
                           x_title=palette.LABELS.get(x, x), y_title=palette.LABELS[y],
                           log_x=self.log_x.value and numeric and bool((table[x] > 0).all()))
        for trace in fig.data:
            trace.visible = self.boxes[trace.name].value
        return fig.update_layout(uirevision=f"{x} {y} {facet} {self.log_x.value}")

    def _show_methods(self, _change) -> None:
        with self.figure.batch_update():
            for trace in self.figure.data:
                trace.visible = self.boxes[trace.name].value
