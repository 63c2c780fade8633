"""What the explorers share: a displayed figure that becomes another one, and the export of figures."""

from __future__ import annotations

import base64
import copy
import html
import mimetypes
import re
from collections.abc import Callable
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from pdiff_lib.base import runs
from pdiff_lib.drawing import plots

WIDE = {"description_width": "initial"}
WRAP = {"flex_flow": "row wrap", "align_items": "center"}


# Plotly's view of a FigureWidget marks each change with a property that plotly does not know, which makes it compute and draw
# everything anew, and reports all defaults back to Python after each. Hidden from enumeration the mark does no harm; nothing
# here reads the reports. Six times as fast on 1,400 points (tests/benchmarks/bench_explore.py).
FASTER = """
{ const read = MODEL.prototype.get;
  MODEL.prototype.get = function (name) {
    const message = read.call(this, name);
    if (name.startsWith("_py2js_"))
      for (const part of Object.values(message ?? {}))
        if (part && typeof part === "object" && !Array.isArray(part))
          Object.defineProperty(part, "_doNotReportToPy", {value: true, writable: true});
    return message;
  };
  for (const report of ["_sendTraceDeltas", "_sendLayoutDelta", "handle_plotly_restyle", "handle_plotly_relayout",
                        "handle_plotly_update"])
    VIEW.prototype[report] = () => {};
  globalThis.pdiffPlotly = FACTORY;
}
export default {};
"""


def _faster(module: str) -> str:
    """Plotly's JavaScript module with `FASTER` for what it exports."""
    code, _, exports = module.rpartition("export{")
    names, _, licence = exports.partition("}")
    local = {public: name for name, public in (pair.split(" as ") for pair in names.split(","))}
    script = FASTER
    for word, public in {"MODEL": "FigureModel", "VIEW": "FigureView", "FACTORY": "default"}.items():
        script = script.replace(word, local[public])
    return code + script + licence.removeprefix(";")


class Bundle(anywidget.AnyWidget):
    """Plotly's JavaScript, once per kernel. Each FigureWidget brings a copy (5 MB), to be sent to the browser and parsed there:
    six figures take ten seconds to appear."""

    _esm = _faster(str(go.FigureWidget._esm))


class Figure(go.FigureWidget):
    """A FigureWidget without JavaScript of its own, that also shows its present state to a page that connects later (Voila; a
    reloaded JupyterLab), where plotly's shows the state it was made with."""

    _esm = """
const plotly = new Promise(found => {
  const look = () => globalThis.pdiffPlotly ? found(globalThis.pdiffPlotly) : setTimeout(look, 20);
  look();
});
export default async () => (await plotly)();
"""
    _bundle: Bundle | None = None

    def __init__(self, *args, **kwargs):
        Figure._bundle = Figure._bundle or Bundle()
        super().__init__(*args, **kwargs)

    def get_state(self, key=None, drop_defaults=False):
        """What ipywidgets sends to the browser; without a key, everything."""
        if key is None and hasattr(self, "_data"):  # not yet while it is being made
            self._trait_values.update(_widget_data=copy.deepcopy(self._data), _widget_layout=copy.deepcopy(self._layout))
        return super().get_state(key, drop_defaults)


def show(figure: Figure, drawn: go.Figure) -> None:
    """Let a displayed figure become another one: only what differs is set, and sent to the browser."""
    old, layout = len(figure.data), drawn.layout.to_plotly_json()
    layout.pop("template", None)  # one for all figures; plotly is slow to set it
    if len(drawn.data) < old:
        figure.data = figure.data[:len(drawn.data)]
    with figure.batch_update():
        for trace, new in zip(figure.data, drawn.data):
            _emptied(new)
            trace.update(_differing(trace.to_plotly_json(), new.to_plotly_json()))
        for axis in set(figure.layout) - set(layout):
            if axis[1:5] == "axis":
                figure.layout[axis] = None
        figure.layout.update(_differing(figure.layout.to_plotly_json(), layout), overwrite=True)
    if len(drawn.data) > old:
        figure.add_traces([_emptied(new) for new in drawn.data[old:]])


def _emptied(trace: BaseTraceType) -> BaseTraceType:
    """Cells of a heatmap without a number as the browser knows them: NaN is no JSON."""
    if trace.type == "heatmap" and isinstance(trace.z, np.ndarray) and trace.z.dtype.kind == "f" and np.isnan(trace.z).any():
        trace.z = np.where(np.isnan(trace.z), None, trace.z)
    return trace


def _differing(old: dict, new: dict) -> dict:
    return {k: v for k, v in new.items() if k not in old or not _same(old[k], v)}


def _same(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (np.ndarray, list, tuple)) or isinstance(b, (np.ndarray, list, tuple)):
        a, b = np.asarray(a), np.asarray(b)
        return a.shape == b.shape and a.dtype == b.dtype and a.dtype != object and a.tobytes() == b.tobytes()
    return a == b


class Export(widgets.HBox):
    """Write a figure as SVG, PNG or HTML, or its numbers as CSV, and hand the file to the browser.

    Args:
        figures: the figure and its numbers, by the figure's name.
        name: what the files' names begin with.
    """

    def __init__(self, figures: dict[str, tuple[Figure, Callable[[], pd.DataFrame]]], name: str):
        self.figures, self.name = figures, name
        self.which = widgets.Dropdown(options=list(figures), description="figure", layout={"width": "240px"})
        self.kind = widgets.Dropdown(options=["svg", "png", "html", "csv"], description="as", layout={"width": "170px"})
        self.button = widgets.Button(description="Export", tooltip="write the chosen figure to a file")
        self.link = widgets.HTML()
        self.button.on_click(self._clicked)
        super().__init__([self.which, self.kind, self.button, self.link])

    def write(self) -> Path:
        """The chosen figure in the chosen format, under `runs/exports`."""
        figure, numbers = self.figures[self.which.value]
        alone = go.Figure(figure)
        if figure.layout.showlegend is False:  # the explorer's check boxes are its legend: alone it needs one
            alone.update_layout(showlegend=True, width=figure.layout.width + 160)
            alone.update_traces(showlegend=False, selector={"opacity": 0})
        name = re.sub(r"[^\w.,+=-]+", "-", f"{self.name}-{self.which.value}").lstrip(".-")  # a figure's name may hold a path
        path = runs.root() / "exports" / f"{name}.{self.kind.value}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.kind.value == "csv":
            numbers().to_csv(path, index=False, float_format="%.6g")
        elif self.kind.value == "html":
            alone.write_html(path, include_plotlyjs="cdn")  # which needs a network; 4.7 MB more otherwise
        else:
            plots.draw(alone, path)
        return path

    def _clicked(self, _button) -> None:
        self.link.value = "writing ..."
        try:
            path = self.write()
        except Exception as e:  # no browser to draw with, a full disk: to be read where the button is
            self.link.value = f"<b>{html.escape(f'{type(e).__name__}: {e}'[:300])}</b>"
            return
        self.link.value = linked(path)


def linked(path: Path) -> str:
    """HTML that hands a file to the browser. The page may be far from the disk that the file is on, so it carries the file."""
    content = base64.b64encode(path.read_bytes()).decode()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    name = html.escape(path.name)
    return f'<a download="{name}" href="data:{kind};base64,{content}">{name}</a>'
