"""A slider's step in the explorers, with 1,400 networks and with a body on a grid of 48^3, in a real browser: from the key to the redrawn figures.

    python tests/benchmarks/bench_explore.py

Time in the browser runs from the key press until the last figure that changes has been drawn (plotly says so, then the next
frame): the way to the kernel and back, Python, and drawing. Python alone is timed in this process. Small networks on
few images: neither is computed on a slider's step. Also printed: seconds until the explorers appear, and the size of the
notebook after JupyterLab has saved it.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SETTINGS = {"train_images": 100, "test_images": 200, "network": "test_resnet", "base_epochs": 15, "base_lr": 0.01,
            "k_checkpoints": 300, "zoo_batch": 16, "ae_channels": [2, 2], "latent_dim": 16, "ae_steps": 20,
            "denoiser_channels": [4, 8, 4], "diffusion_steps": 20, "T": 100, "sampling_steps": 50, "samples": 183,
            "vary_values": [50]}
SHAPES = {"train_images": 40, "test_images": 10, "k_checkpoints": 30, "held_out": 8, "methods": ["copy", "flow"], "samples": 6, "cells": 48,
          "generators": {"flow": {"steps": 300, "width": 128, "solver_steps": 40}}, "latent_dim": 8, "diffusion_steps": 20, "sampling_steps": 40}
STEPS = 20

PRESS = """async ([selector, key, figures]) => {
    const plots = [...document.querySelectorAll(selector + ' .js-plotly-plot')].slice(0, figures);
    const drawn = plots.map(p => new Promise(done =>
        ['plotly_update', 'plotly_restyle'].forEach(e => p.once(e, () => requestAnimationFrame(done)))));
    const handle = document.querySelector(selector + ' .noUi-handle');
    const start = performance.now();
    handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
    await Promise.race([Promise.all(drawn), new Promise(r => setTimeout(r, 5000))]);
    return performance.now() - start;
}"""


def python_alone(name: str, slider, values) -> None:
    """Milliseconds from a slider's new value to the figures' new data, in this process."""
    seconds = []
    for i in range(STEPS):
        start = time.perf_counter()
        slider.value = values[i % len(values)]
        seconds.append(time.perf_counter() - start)
    print(f"{name:<12} Python alone {1000 * statistics.median(seconds[1:]):6.1f} ms")


def in_browser(page, name: str, selector: str, keys: tuple[str, str], figures: int) -> None:
    """Milliseconds from a key to the last drawn figure."""
    page.locator(selector).scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    times = []
    for i in range(STEPS):
        times.append(page.evaluate(PRESS, [selector, keys[i % 2], figures]))
        page.wait_for_timeout(300)
    times.sort()
    print(f"{name:<12} in the browser: median {statistics.median(times):6.1f} ms, 9 of 10 within {times[int(0.9 * STEPS)]:.1f} ms")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PDIFF_RUNS"] = folder
        from browser import chromium, lab, run_all
        from pdiff_lib import explore
        from pdiff_lib.arena import Arena
        from pdiff_lib.base.recipe import Recipe
        from pdiff_lib.batches import app, jobs
        from pdiff_lib.experiment import Experiment
        from pdiff_lib.forms import Forms

        path = jobs.find("50_explore")
        parameters = jobs.check(path, SETTINGS)
        experiment = Experiment(Recipe.pick(parameters), progress=False)
        scatter = explore.Scatter(experiment)
        denoising = explore.Denoising(experiment, scatter)
        print(f"{len(scatter.frame):,} networks, {len(denoising.path.t)} moments, D = {experiment.subset.numel}")
        python_alone("noise scale", scatter.noise, scatter.noise.options)
        python_alone("moment", denoising.moment, range(len(denoising.path.t)))

        bodies = jobs.find("63_shapes")
        shapes = jobs.check(bodies, SHAPES)
        fields = explore.Fields(Forms(Arena(Recipe.pick(shapes), shapes["held_out"], settings=shapes["generators"], progress=False),
                                      shapes["cells"], shapes["points"]))
        print(f"a body on a grid of {shapes['cells']}^3, {len(fields.chain.t)} moments, {len(fields.chain.forms[-1][1]):,} triangles at the last")
        python_alone("body", fields.moment, range(len(fields.chain.t)))

        copies = {name: Path(folder) / f"{name}.ipynb" for name in ("networks", "bodies")}
        shutil.copy(app.page(path, parameters), copies["networks"])
        shutil.copy(app.page(bodies, shapes), copies["bodies"])
        with lab(Path(folder)) as address, chromium() as page:
            page.goto(address("networks.ipynb"))
            run_all(page)
            start = time.perf_counter()
            page.locator(".pdiff-denoising .heatmaplayer image").wait_for()
            print(f"explorers appear {time.perf_counter() - start:.1f} s after the last cell")
            in_browser(page, "noise scale", ".pdiff-scatter", ("ArrowRight", "ArrowLeft"), 2)
            in_browser(page, "moment", ".pdiff-denoising", ("ArrowLeft", "ArrowRight"), 1)
            page.keyboard.press("Control+s")
            page.wait_for_timeout(5000)
            print(f"saved notebook: {copies['networks'].stat().st_size / 1e6:.2f} MB")
            page.goto(address("bodies.ipynb"))
            run_all(page)
            page.locator(".pdiff-fields .js-plotly-plot").wait_for()
            in_browser(page, "body", ".pdiff-fields", ("ArrowLeft", "ArrowRight"), 1)


if __name__ == "__main__":
    main()
