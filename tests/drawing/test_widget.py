"""widget.py: an exported figure lands in its folder, whatever it is called."""

import pandas as pd
import plotly.graph_objects as go
import pytest

from pdiff_lib.drawing import widget


@pytest.mark.parametrize("which, file", [
    ("../../etc/x", "e-..-..-etc-x.csv"), ("/etc/passwd", "e--etc-passwd.csv"), ("a b", "e-a-b.csv"),
    ("noise 0.15", "e-noise-0.15.csv"), ("ä+b", "e-ä+b.csv"), ("..", "e-...csv"),
    ('"><script>alert(1)</script>', "e--script-alert-1-script-.csv"), ("a\\b\0c", "e-a-b-c.csv")])
def test_names_cannot_lead_out_of_the_folder_or_into_the_page(tmp_path, monkeypatch, which, file):
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    for name in ("e", "../e"):
        export = widget.Export({which: (widget.Figure(go.Figure(layout={"width": 100})), lambda: pd.DataFrame({"a": [1]}))},
                               name)
        export.kind.value = "csv"
        export.button.click()
        (found,) = (p for p in tmp_path.rglob("*") if p.is_file())
        assert found.parent == tmp_path / "runs" / "exports" and export.link.value.count("<") == 2
        assert found.name == file or name == "../e"
        found.unlink()
