"""A slider's step in the explorers, with 1,400 networks, in a real browser: from the key to the redrawn figures.

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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PDIFF_RUNS"] = folder
        from browser import chromium, lab, run_all
        from pdiff_lib import explore
        from pdiff_lib.base.recipe import Recipe
        from pdiff_lib.batches import app, jobs
        from pdiff_lib.experiment import Experiment

        path = jobs.find("50_explore")
        parameters = jobs.check(path, SETTINGS)
        experiment = Experiment(Recipe.pick(parameters), progress=False)
        scatter = explore.Scatter(experiment)
        denoising = explore.Denoising(experiment, scatter)
        print(f"{len(scatter.frame):,} networks, {len(denoising.path.t)} moments, D = {experiment.subset.numel}")
        for name, slider, values in (("noise scale", scatter.noise, scatter.noise.options),
                                     ("moment", denoising.moment, range(len(denoising.path.t)))):
            seconds = []
            for i in range(STEPS):
                start = time.perf_counter()
                slider.value = values[i % len(values)]
                seconds.append(time.perf_counter() - start)
            print(f"{name:<12} Python alone {1000 * statistics.median(seconds[1:]):6.1f} ms")

        copy = Path(folder) / "x.ipynb"
        shutil.copy(app.page(path, parameters), copy)
        with lab(Path(folder)) as address, chromium() as page:
            page.goto(address("x.ipynb"))
            run_all(page)
            start = time.perf_counter()
            page.locator(".pdiff-denoising .heatmaplayer image").wait_for()
            print(f"explorers appear {time.perf_counter() - start:.1f} s after the last cell")
            for name, selector, keys, figures in (("noise scale", ".pdiff-scatter", ("ArrowRight", "ArrowLeft"), 2),
                                                  ("moment", ".pdiff-denoising", ("ArrowLeft", "ArrowRight"), 1)):
                page.locator(selector).scroll_into_view_if_needed()
                page.wait_for_timeout(1000)
                times = []
                for i in range(STEPS):
                    times.append(page.evaluate(PRESS, [selector, keys[i % 2], figures]))
                    page.wait_for_timeout(300)
                times.sort()
                print(f"{name:<12} in the browser: median {statistics.median(times):6.1f} ms, 9 of 10 within "
                      f"{times[int(0.9 * STEPS)]:.1f} ms")
            page.keyboard.press("Control+s")
            page.wait_for_timeout(5000)
            print(f"saved notebook: {copy.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
