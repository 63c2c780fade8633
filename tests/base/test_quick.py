"""nbformat without a grammar that nobody needs."""

import subprocess
import sys

import pytest

CODE = """
import sys
{}
import jsonschema
print("rfc3987_syntax" in sys.modules, "nbformat" in sys.modules)
import nbformat.v4
nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]))
jsonschema.FormatChecker().check("2026-11-28", "date")
import rfc3987_syntax
print(rfc3987_syntax.is_valid_syntax("iri", "http://a.b"), rfc3987_syntax.is_valid_syntax("iri", "a b"))
"""


@pytest.mark.parametrize("first", ["from pdiff_lib.drawing import plots; import plotly.graph_objects as go; go.FigureWidget",
                                   "from pdiff_lib.base import quick; quick.nbformat()"])
def test_the_grammar_is_not_built_before_somebody_wants_it(first):
    done = subprocess.run([sys.executable, "-c", CODE.format(first)], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True", "False"], done.stderr


def test_a_grammar_that_is_there_stays():
    first = "import rfc3987_syntax as r; from pdiff_lib.base import quick; quick.nbformat(); assert sys.modules['rfc3987_syntax'] is r"
    done = subprocess.run([sys.executable, "-c", CODE.format(first)], capture_output=True, text=True)
    assert done.stdout.split()[0] == "True", done.stderr
