"""What all figures look like: colours, symbols, words on axes.

Colours are Okabe and Ito's, safe for the colour-blind, and symbols differ with them.
"""

import plotly.graph_objects as go
import plotly.io as pio

from pdiff_lib.base import quick

quick.nbformat()  # before plotly imports it, to show figures

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00", "#882255", "#999933"]
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "triangle-down", "star", "cross", "x", "pentagon"]
SIGNS = "●◆■▲▼★✚✖⬟"  # the symbols, as text
DIVERGING, SEQUENTIAL = "RdBu_r", "Viridis"
# What a column of `Experiment.frame` means, with its unit, for axes; accuracies are drawn in percent.
LABELS = {"accuracy": "accuracy (%)", "score": "score", "max_similarity": "maximum similarity to the originals (IoU)",
          "distance": "distance to the nearest original (raw parameter units)",
          "outside_span": "share of the deviation outside the originals' span",
          "seconds": "seconds per run", "step": "fine-tuning step (of the nearest original)", "k_checkpoints": "K (checkpoints in the zoo)",
          "sigma_v": "sigma_v (std of the noise on a standardised vector)", "sigma_z": "sigma_z (std of the noise on a latent)",
          "latent_dim": "L (numbers in a latent)", "pdiff_seed": "seed of autoencoder, diffusion and samples",
          "seed": "seed of network and zoo", "T": "T (diffusion steps)", "sampling_steps": "sampling steps"}

# Merged here, once: of a default "plotly+pdiff" plotly would do it for every figure.
pio.templates["pdiff"] = pio.templates.merge_templates("plotly", go.layout.Template(layout={
    "colorway": COLOURS, "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 12}, "paper_bgcolor": "white",
    "plot_bgcolor": "white", "title": {"x": 0.02, "font": {"size": 14}}, "margin": {"t": 70, "b": 55, "l": 65, "r": 25},
    "xaxis": {"gridcolor": "#e5e5e5", "linecolor": "#555", "zeroline": False, "ticks": "outside"},
    "yaxis": {"gridcolor": "#e5e5e5", "linecolor": "#555", "zeroline": False, "ticks": "outside"}}))
pio.templates.default = "pdiff"


def look(i: int) -> dict[str, str]:
    """Colour and symbol of the i-th of several; the symbols shift at each turn of the colours, so that no two of 81 are alike."""
    return {"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[_sign(i)]}


def mark(i: int) -> str:
    """Symbol and colour of the i-th method as HTML, for legends outside of figures."""
    return f'<span style="color: {COLOURS[i % len(COLOURS)]}">{SIGNS[_sign(i)]}</span>'


def _sign(i: int) -> int:
    return (i + i // len(COLOURS)) % len(SYMBOLS)
