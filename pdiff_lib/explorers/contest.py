"""The explorer of the arena: a zoo, a generator, its strength; and who is behind each point."""

from __future__ import annotations

import html
from collections.abc import Mapping

import ipywidgets as widgets
import plotly.graph_objects as go

from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.drawing import plots
from pdiff_lib.drawing.standings import kind
from pdiff_lib.drawing.widget import WIDE, WRAP, Export, Figure, show
from pdiff_lib.explorers.scatter import compared
from pdiff_lib.measures import novelty


class Contest(widgets.VBox):
    """Score against relative distance of all networks on a zoo, those of one generator in colour; a click on a point (or the box
    "index") shows that network's parameters beside its nearest original, after the best matching of hidden units, and on what the
    two differ.

    Args:
        arenas: by the name of the zoo.
        seed: whose networks are shown.

    Attributes:
        frame: rows of `Arena.frame` of the zoo and the order that are shown.
        chosen: row of the network that is shown in detail.

    Raises:
        ValueError: no arena.
    """

    def __init__(self, arenas: Mapping[str, Arena], seed: int = 0):
        if not arenas:
            raise ValueError("no arenas: expected at least one, by the name of its zoo")
        self.arenas, self.seed, self._quiet = dict(arenas), seed, False
        self.zoo = widgets.Dropdown(options=list(self.arenas), description="zoo", layout={"width": "300px"})
        self.order = widgets.Dropdown(options=list(self.arena.orders), description="order", layout={"width": "200px"})
        self.generator = widgets.Dropdown(description="generator", layout={"width": "300px"})
        self.strength = widgets.SelectionSlider(options=["as it is"], description="strength", style=WIDE, layout={"width": "300px"})
        self.index = widgets.BoundedIntText(description="index", layout={"width": "170px"})
        self.points, self.heatmaps, self.confusion, self.facts = Figure(), Figure(), Figure(), widgets.HTML()
        self.zoo.observe(self._enter, "value")
        self.order.observe(self._fill, "value")
        self.generator.observe(self._strengths, "value")
        self.strength.observe(self._draw, "value")
        self.index.observe(self._typed, "value")
        super().__init__([
            widgets.HBox([self.zoo, self.order, self.generator, self.strength], layout=WRAP), self.points,
            widgets.HBox([widgets.HTML("<b>One network</b>"), self.index], layout=WRAP), self.facts,
            widgets.HBox([self.heatmaps, self.confusion], layout=WRAP),
            Export({"field": (self.points, lambda: self.frame), "parameters": (self.heatmaps, lambda: plots.columns(self._panels)),
                    "confusion": (self.confusion, lambda: self._counts)}, "arena")])
        self.add_class("pdiff-contest")
        self._fill()

    @property
    def arena(self) -> Arena:
        """Of the zoo that is shown."""
        return self.arenas[self.zoo.value]

    @property
    def method(self) -> str:
        """The method in colour."""
        family = self.generator.value
        return family if self.strength.value == "as it is" else f"{family} {self.strength.value}"

    def _enter(self, _change=None) -> None:
        order, self._quiet = self.order.value, True
        self.order.options = list(self.arena.orders)
        self.order.value = order if order in self.order.options else self.order.options[0]
        self._quiet = False
        self._fill()

    def _fill(self, _change=None) -> None:
        """Another zoo or order: its networks, and the generators there are."""
        if self._quiet:
            return
        self.frame = self.arena.frame(orders=[self.order.value], seeds=(self.seed,))
        self._strong = {name: kind(name) for name in self.frame.method.unique() if name != HELD_OUT}
        names, chosen = list(dict.fromkeys(self._strong.values())), self.generator.value
        self._quiet = True
        self.generator.options = [*names, HELD_OUT]
        self.generator.value = chosen if chosen in self.generator.options else "flow" if "flow" in names else names[0]
        self._quiet = False
        self._strengths()

    def _strengths(self, _change=None) -> None:
        if self._quiet:
            return
        self._quiet = True
        family = self.generator.value
        found = [name.removeprefix(family).strip() or "as it is" for name, of in self._strong.items() if of == family]
        self.strength.options = found or ["as it is"]
        self.strength.value = self.strength.options[0]
        self._quiet = False
        self._draw()

    def _draw(self, _change=None) -> None:
        if self._quiet:
            return
        fig = plots.field(self.frame, self.method, f"{html.escape(self.method)}<br><sup>{self.arena.title}, {self.order.value} order</sup>")
        fig.add_scatter(x=[], y=[], mode="markers", name="chosen", hoverinfo="skip", showlegend=False,
                        marker={"size": 17, "symbol": "circle-open", "color": "#D55E00", "line": {"width": 3}})
        # What was zoomed into is kept, unless it would mean another part of the axis.
        show(self.points, fig.update_layout(width=980, height=470, uirevision=f"{self.zoo.value} {fig.layout.xaxis.type}"))
        for trace in self.points.data:
            trace.on_click(self._clicked)
        self.choose(self.frame.index[self.frame.method == self.method][0])

    def _typed(self, _change) -> None:
        if not self._quiet:
            self.choose(self.frame.index[self.frame.method == self.frame.method[self.chosen]][self.index.value])

    def _clicked(self, trace: go.Scatter, points, _state) -> None:
        if points.point_inds and trace.name != "chosen":
            self.choose(self.frame.index[self.frame.method == trace.name][points.point_inds[0]])

    def choose(self, row: int) -> None:
        """Show the network of this row of the frame in detail."""
        self.chosen, network, arena = row, self.frame.loc[row], self.arena
        e = arena.entrants(self.order.value, self.seed)
        theta = arena.held if network.method == HELD_OUT else e.theta(network.method)
        theta, original = theta[[network["index"]]], arena.reference.originals[[network.nearest]]
        predicted, expected = (arena.experiment.predictions_of(t)[0] for t in (theta, original))
        home = arena.canonical(theta)
        home = home if arena.units is None else novelty.matched(home, original, arena.units)
        name, other = f"{network.method} {network['index']}", f"original {network.nearest}"
        self._panels = {name: home[0], f"nearest {other}": original[0], "difference": home[0] - original[0]}
        show(self.heatmaps, plots.heatmaps(e.subset, self._panels, f"Parameters, units matched<br><sup>{arena.title}</sup>", ["difference"])
             .update_layout(width=690, height=430, margin={"r": 160, "l": 40, "t": 95}))
        drawn, self._counts = compared(e, predicted, expected, name, other)
        show(self.confusion, drawn.update_layout(width=430, height=430, margin={"t": 95}, title_y=0.96))
        rows, score = self.frame.index[self.frame.method == network.method], arena.experiment.task.score
        point, ring = next(t for t in self.points.data if t.name == network.method), self.points.data[-1]
        with self.points.batch_update():
            ring.x, ring.y = ([values[rows.get_loc(row)]] for values in (point.x, point.y))
        self.facts.value = (f"<b>{html.escape(name)}</b>: {score.name} {score.shown(network[score.column])}; nearest: {other}, which has "
                            f"{score.shown(network.nearest_score)}, at {network.distance:.2f} of the originals' own distance; maximum "
                            f"similarity {network.max_similarity:.3f}")
        self._quiet = True
        self.index.max, self.index.value = len(rows) - 1, rows.get_loc(row)
        self._quiet = False
