"""Explorers: widgets over results, shown as the value of a notebook's cell (JupyterLab, or a page that Voila serves).

Their figures are those of `plots`; a step of a slider changes what differs, in one message per figure.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

from pdiff_lib.drawing import palette, plots
from pdiff_lib.drawing.widget import WIDE, WRAP, Export, Figure, show
from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.tasks import evaluate
from pdiff_lib.tasks.classification import Classification

GENERATED = "generated here"  # the method's name of networks that an explorer draws

NOTHING_SELECTED = ("Orange ring: the network in detail below; black ring: its nearest original. Selected: none (draw a lasso around "
                    "points, in either figure).")


class Scatter(widgets.VBox):
    """Accuracy (or the score of another task) against similarity, and who is behind each point.

    A click on a point (or the two boxes below the figure) shows that network's parameters beside its nearest original, on
    which images the two differ, and where both lie in the plane of the zoo's principal components. A lasso selects.

    Args:
        experiment: whose networks are shown; computed if they are not yet.
        others: the same data and subset with other settings; each setting that differs is a colour to choose.

    Attributes:
        frame: rows of `Experiment.frame`, with `run` (which experiment), `step` (the fine-tuning step of the network or of its
            nearest original), `PC1`, `PC2`, and the settings that differ.
        chosen: row of the network that is shown in detail.
        selected: rows that a lasso holds.

    Raises:
        ValueError: experiments over other data or another subset.
    """

    def __init__(self, experiment: Experiment, *others: Experiment):
        self.experiments, self.score = (experiment, *others), experiment.task.score
        for e in others:
            if (e.task.digest, e.subset) != (experiment.task.digest, experiment.subset):
                raise ValueError(f"{e.title}: expected the data and subset of {experiment.title}")
        flats = [{k: str(v) if isinstance(v, list) else v for k, v in e.recipe.flat().items()} for e in self.experiments]
        self.varied = {k: [f[k] for f in flats] for k in flats[0] if len({f[k] for f in flats}) > 1}
        self._theta, self._predictions = experiment.zoo.theta[:0], experiment.predictions(ORIGINAL)[:0]
        self._pca = PCA(2).fit(experiment.zoo.theta)
        names = dict.fromkeys(name for e in self.experiments for name in (ORIGINAL, *e.methods))
        kinds = pd.CategoricalDtype([*names, GENERATED])
        parts = [self._placed(e.frame(), r, lambda name, e=e: e.theta(name)) for r, e in enumerate(self.experiments)]
        self.frame = pd.concat(parts, ignore_index=True).astype({"method": kinds})
        self.selected = self.frame.index[:0]
        self._build()
        self.choose(int(self.frame.index[self.frame.method != ORIGINAL][0]))

    def _placed(self, frame: pd.DataFrame, run: int, theta: Callable[[str], Tensor]) -> pd.DataFrame:
        """Rows with what a frame of an experiment does not have."""
        plane = np.concatenate([self._pca.transform(theta(name)) for name in frame.method.unique()])
        return frame.assign(run=run, PC1=plane[:, 0], PC2=plane[:, 1],
                            step=frame["index"].where(frame.method == ORIGINAL, frame.nearest),
                            **{name: values[run] for name, values in self.varied.items()})

    def _build(self) -> None:
        title = self.experiments[0].title
        self.points = Figure(self._drawn_points())
        self.map = Figure(self._drawn_map())
        self._hover = [{trace.name: trace.hovertemplate for trace in figure.data} for figure in (self.points, self.map)]
        self.heatmaps, self.confusion = Figure(), Figure()
        for figure in (self.points, self.map):
            for trace in figure.data:
                trace.on_click(self._clicked)
                trace.on_selection(self._lassoed)
                trace.on_deselect(lambda *_: self.select([]))

        scales = sorted({float(m[1]) for name in self._methods if (m := re.fullmatch(r"noise (\S+)", name))})
        self.noise = widgets.SelectionSlider(options=["all", *(f"{s:g}" for s in scales)], description="noise scale (std)",
                                             style=WIDE, layout={"width": "330px"})
        self.boxes = {name: widgets.Checkbox(True, description=f"{palette.mark(i)} {html.escape(name)}", description_allow_html=True,
                                             indent=False, layout={"width": "auto", "margin": "0 14px 0 0"})
                      for i, name in enumerate(self._methods)}
        self.colour = widgets.Dropdown(options=["method", "step", *self.varied, "distance", "outside_span"],
                                       description="colour by", layout={"width": "260px"})
        self.run = widgets.Dropdown(options=[(self._run_name(r), r) for r in range(len(self.experiments))], description="run",
                                    layout={"display": "flex" if self.varied else "none", "width": "260px"})
        self.method = widgets.Dropdown(options=self._methods, description="network", layout={"width": "240px"})
        self.index = widgets.BoundedIntText(description="index", layout={"width": "170px"})
        self.facts, self.selection = widgets.HTML(), widgets.HTML(NOTHING_SELECTED)
        for control in (self.noise, *self.boxes.values()):
            control.observe(self._show_methods, "value")
        self.colour.observe(self._paint, "value")
        for control in (self.run, self.method, self.index):
            control.observe(self._typed, "value")
        self._quiet = False
        self.export = Export({
            "scatter": (self.points, self._rows), "principal components": (self.map, self._rows),
            "parameters": (self.heatmaps, lambda: plots.columns(self._panels)),
            "confusion": (self.confusion, lambda: self._counts)}, "scatter")
        super().__init__([
            widgets.HBox(list(self.boxes.values()), layout=WRAP), widgets.HBox([self.noise, self.colour], layout=WRAP),
            widgets.HBox([self.points, self.map], layout={**WRAP, "align_items": "flex-start"}), self.selection,
            widgets.HBox([widgets.HTML(f"<b>One network</b> of {html.escape(title)}"), self.run, self.method, self.index],
                         layout=WRAP),
            self.facts, widgets.HBox([self.heatmaps, self.confusion], layout=WRAP), self.export])
        self.add_class("pdiff-scatter")

    @property
    def _methods(self) -> list[str]:
        return list(self.frame.method.cat.categories)

    def _run_name(self, run: int) -> str:
        return ", ".join(f"{name} {values[run]}" for name, values in self.varied.items()) or "this one"

    def _drawn_points(self) -> go.Figure:
        fig = plots.scatter(self.score.of_frame(self.frame), f"{self.score.name.capitalize()} against maximum similarity")
        return self._ringed(fig, "max_similarity", self.score.column)

    def _drawn_map(self) -> go.Figure:
        fig = plots.projection(self.score.of_frame(self.frame), self._pca.explained_variance_ratio_.tolist(), "Principal components of the zoo")
        return self._ringed(fig, "PC1", "PC2")

    def _ringed(self, fig: go.Figure, x: str, y: str) -> go.Figure:
        """Rings for the network in question and its nearest original; a colour scale for whoever needs one."""
        title = f"{fig.layout.title.text}<br><sup>{self.experiments[0].title}</sup>"
        for name, colour in (("nearest original", "#000000"), ("chosen", "#D55E00")):
            fig.add_scatter(x=[], y=[], mode="markers", name=name, hoverinfo="skip", meta=[x, y],
                            marker={"size": 17, "symbol": "circle-open", "color": colour, "line": {"width": 3}})
        # The check boxes are the legend: drawing one again doubles the time of a slider's step.
        return fig.update_layout(title={"text": title, "y": 1, "yanchor": "top", "pad": {"t": 12}}, width=560, height=470,
                                 uirevision="zoom", dragmode="lasso", margin={"r": 15, "t": 70}, showlegend=False, coloraxis={
                                     "colorscale": palette.SEQUENTIAL, "showscale": False, "colorbar": {
                                         "thickness": 10, "title": {"side": "right"}}})

    def _clouds(self) -> Iterable[tuple[go.Scatter, go.Scatter, pd.DataFrame]]:
        """Each method's trace in the scatter and in the map, with its rows."""
        maps = {trace.name: trace for trace in self.map.data}
        for trace in self.points.data:
            if trace.name in self.boxes:
                yield trace, maps[trace.name], self.frame[self.frame.method == trace.name]

    def _shown(self, method: str) -> bool:
        scale = re.fullmatch(r"noise (\S+)", method)
        return self.boxes[method].value and (scale is None or self.noise.value in ("all", f"{float(scale[1]):g}"))

    def _show_methods(self, _change=None) -> None:
        with self.points.batch_update(), self.map.batch_update():
            for point, place, _ in self._clouds():
                # Without opacity and hover a trace is gone, for a third of the time that `visible` takes to draw.
                shown = self._shown(point.name)
                for trace, template in zip((point, place), self._hover):
                    trace.opacity, trace.hoverinfo = float(shown), "all" if shown else "skip"
                    trace.hovertemplate = template[point.name] if shown else ""  # which would count more than `hoverinfo`

    def _paint(self, _change=None) -> None:
        column = self.colour.value
        with self.points.batch_update(), self.map.batch_update():
            for point, place, rows in self._clouds():
                colour = palette.COLOURS[self._methods.index(point.name) % len(palette.COLOURS)]
                for trace in (point, place):
                    trace.marker.coloraxis = None if column == "method" else "coloraxis"
                    trace.marker.color = colour if column == "method" else self._number(rows[column])
            for figure in (self.points, self.map):
                figure.layout.coloraxis.showscale = column != "method"
                figure.layout.coloraxis.colorbar.title.text = palette.LABELS.get(column, column)

    def _number(self, values: pd.Series) -> np.ndarray:
        """Numbers as they are, words by their order among the runs' values."""
        if pd.api.types.is_numeric_dtype(values):
            return values.to_numpy(float)
        return values.map(list(dict.fromkeys(map(str, self.varied[values.name]))).index).to_numpy(float)

    def _clicked(self, trace, points, _state) -> None:
        if points.point_inds and trace.name in self.boxes:
            self.choose(int(self.frame.index[self.frame.method == trace.name][points.point_inds[0]]))

    def _typed(self, _change) -> None:
        if not self._quiet:
            rows = self._rows_of(self.run.value, self.method.value)
            if len(rows):
                self.choose(int(rows[min(self.index.value, len(rows) - 1)]))

    def _rows_of(self, run: int, method: str) -> pd.Index:
        return self.frame.index[(self.frame.method == method) & (self.frame.run == run)]

    def _behind(self, row: pd.Series) -> tuple[Tensor, Tensor]:
        """Parameters and predictions of a row's network."""
        if row.method == GENERATED:
            return self._theta[row["index"]], self._predictions[row["index"]]
        e = self.experiments[row.run]
        return e.theta(row.method)[row["index"]], e.predictions(row.method)[row["index"]]

    def choose(self, row: int) -> None:
        """Show the network of this row of the frame in detail."""
        self.chosen, network = row, self.frame.loc[row]
        e = self.experiments[network.run]
        original = self.frame.loc[self._rows_of(int(network.run), ORIGINAL)[network.nearest]]
        name, other = f"{network.method} {network['index']}", f"original {network.nearest}"
        (theta, predicted), (nearest, expected) = self._behind(network), self._behind(original)
        self._panels = {name: theta, f"nearest {other}": nearest, "difference": theta - nearest}
        show(self.heatmaps, plots.heatmaps(e.subset, self._panels, f"Parameters<br><sup>{e.title}</sup>", ["difference"])
             .update_layout(width=690, height=430, margin={"r": 160, "l": 40, "t": 95}))
        drawn, self._counts = compared(e, predicted, expected, name, other)
        show(self.confusion, drawn.update_layout(width=430, height=430, margin={"t": 95}, title_y=0.96))
        for figure in (self.points, self.map):
            with figure.batch_update():
                for ring, at in zip(figure.data[-2:], (original, network)):
                    x, y = ring.meta
                    ring.x, ring.y = [at[x]], [at[y] * (self.score.scale if y == self.score.column else 1)]
        own, others = (self.score.shown(row[self.score.column]) for row in (network, original))
        self.facts.value = (f"<b>{html.escape(name)}</b>: {self.score.name} {own}, maximum similarity "
                            f"{network.max_similarity:.3f} (to {other}, which has {others}), distance to "
                            f"the nearest {network.distance:.3g}, outside the span {network.outside_span:.2f}")
        self._quiet = True
        self.run.value, self.method.value = int(network.run), network.method
        rows = self._rows_of(int(network.run), network.method)
        self.index.max, self.index.value = len(rows) - 1, rows.get_loc(row)
        self._quiet = False

    def _lassoed(self, trace, points, _selector) -> None:
        source = trace.parent
        if trace is source.data[0]:
            self._lasso = []
        if trace.name in self.boxes and self._shown(trace.name):
            self._lasso += self.frame.index[self.frame.method == trace.name][points.point_inds].tolist()
        if trace is source.data[-1]:
            self.select(self._lasso)

    def select(self, rows: Iterable[int]) -> None:
        """Mark these rows of the frame in both figures; none: mark nothing."""
        self.selected = pd.Index(list(rows), dtype=int)
        with self.points.batch_update(), self.map.batch_update():
            for point, place, part in self._clouds():
                inside = np.flatnonzero(part.index.isin(self.selected)).tolist()
                point.selectedpoints = place.selectedpoints = inside if len(self.selected) else None
        table = self.frame.loc[self.selected].groupby("method", observed=True)
        table = table.agg(networks=("index", "size"), score=(self.score.column, "mean"), max_similarity=("max_similarity", "mean"))
        table = table.assign(score=(self.score.scale * table.score).round(2)).rename(columns={"score": f"mean {self.score.label}"})
        self.selection.value = (f"Selected: {len(self.selected)} networks" + table.round(3).reset_index().to_html(
            index=False, border=0, col_space=120, justify="left")) if len(table) else (
            NOTHING_SELECTED)

    def _rows(self) -> pd.DataFrame:
        """What the CSV holds: the selected networks, without a selection those that are shown."""
        return self.frame.loc[self.selected] if len(self.selected) else self.frame[self.frame.method.map(self._shown).astype(bool)]

    def measure(self, theta: Float[Tensor, "M D"]) -> tuple[pd.DataFrame, Tensor]:
        """Rows of the first experiment's frame for new networks, and their predictions."""
        e = self.experiments[0]
        frame = e.frame_of(GENERATED, theta)
        frame["index"] += len(self._theta)
        return self._placed(frame, 0, lambda _: theta), e.predictions_of(theta)

    def add(self, theta: Float[Tensor, "M D"], measured: tuple[pd.DataFrame, Tensor] | None = None) -> None:
        """Put new networks of the first experiment into the figures.

        Args:
            theta: raw parameter vectors.
            measured: what `measure` gave for them.
        """
        frame, predictions = measured or self.measure(theta)
        self._theta, self._predictions = torch.cat([self._theta, theta]), torch.cat([self._predictions, predictions])
        self.frame = pd.concat([self.frame, frame.astype({"method": self.frame.method.dtype})], ignore_index=True)
        show(self.points, self._drawn_points())
        show(self.map, self._drawn_map())
        self._paint()
        self._show_methods()
        self.select(self.selected)
        self.choose(self.chosen)


def compared(e: Experiment, predicted: Tensor, expected: Tensor, name: str, other: str) -> tuple[go.Figure, pd.DataFrame]:
    """What two networks of an experiment give for the test items, [N ...], as a figure and its numbers: classes, or outputs."""
    if not isinstance(e.task, Classification):
        x, y = (t.flatten(1)[:, 0] if t.ndim > 1 else t for t in (expected, predicted))
        fig = plots.pairs(x, y, f"Outputs, first number per item<br><sup>{e.title}</sup>", x_title=other, y_title=name)
        return fig, pd.DataFrame({other: x.numpy(), name: y.numpy()})
    classes = e.task.images.num_classes
    known = (expected != evaluate.NO_CLASS) & (predicted != evaluate.NO_CLASS)
    pairs = expected[known].long() * classes + predicted[known].long()
    counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    differ, without = int((expected != predicted).sum()), int((~known).sum())
    fig = plots.confusion(counts, f"Predicted classes: {differ} of {len(predicted):,} images differ"
                          f"{f', {without} have no class (scores that are not finite)' if without else ''}<br><sup>{e.title}</sup>",
                          x_title=name, y_title=other)
    return fig, pd.DataFrame(counts.numpy())
