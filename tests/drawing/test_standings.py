"""standings.py: where each method stands."""

import numpy as np
import pandas as pd

from pdiff_lib.drawing import plots, standings

BASELINES = ["noise 0.1", "noise 1", "soup of 4"]


def frame(scale=1.0):
    rng, rows = np.random.default_rng(0), []
    for method, order, at in [("held-out original", "", 1.0), *((m, o, d) for o in ("canonical", "raw") for m, d in
                                                                (("noise 0.1", 0.2), ("noise 1", 1.4), ("soup of 4", 0.7), ("flow", 0.8), ("lost", 9.0)))]:
        rows += [{"method": method, "order": order, "seed": 0, "index": i, "accuracy": rng.random(), "distance": scale * at * (0.9 + 0.1 * i)} for i in range(3)]
    return pd.DataFrame(rows)


def test_a_point_per_method_at_its_means_and_a_line_per_kind_of_baseline():
    table = frame()
    fig = plots.standings(table, BASELINES, 0.5, "a title")
    assert fig.layout.title.text == "a title" and [a.text for a in fig.layout.annotations[:2]] == ["canonical order", "raw order"]
    left = {t.name: t for t in fig.data if t.xaxis == "x"}
    assert left.keys() == {"noise", "soup of", "held-out original", "flow", "lost"}
    own = table[(table.order == "canonical") & (table.method == "flow")]
    np.testing.assert_allclose((left["flow"].x[0], left["flow"].y[0]), (own.distance.mean(), 100 * own.accuracy.mean()))
    np.testing.assert_allclose(left["flow"].y[0] + left["flow"].error_y.array[0], 100 * own.accuracy.quantile(0.9))
    assert left["noise"].mode == "lines+markers" and list(left["noise"].text) == ["noise 0.1", "noise 1"] and left["noise"].error_y.array is None
    assert [t.name for t in fig.data if t.xaxis == "x2"].count("held-out original") == 1
    assert {s.y0 for s in fig.layout.shapes} == {50.0}


def test_what_is_far_beyond_is_named_and_orders_of_magnitude_are_logarithmic():
    near, wide = (plots.standings(frame(scale), BASELINES, 0.5, "") for scale in (1.0, 100.0))
    assert near.layout.xaxis.type is None and near.layout.xaxis.range[1] < 9 and "lost (9" in " ".join(a.text for a in near.layout.annotations)
    assert wide.layout.xaxis.type == "log" and "farther" not in " ".join(a.text for a in wide.layout.annotations)
    copies = frame(100.0).assign(distance=lambda t: t.distance.where(t.method != "flow", 0.0))
    drawn = next(t for t in plots.standings(copies, BASELINES, 0.5, "").data if t.name == "flow")
    assert drawn.x[0] == standings.LEFT and drawn.customdata[0] == 0


def test_the_field_has_all_networks_and_one_method_in_colour():
    table = frame()
    fig = plots.field(table[table.order != "raw"], "flow", "here")
    assert sum(len(t.x) for t in fig.data) == 18 and fig.data[-1].name == "flow" and fig.data[-1].marker.size > fig.data[0].marker.size
