"""The notebooks as they would run on a GPU, on a pretended one: their code cells in this process, at tiny sizes.

    python tests/gpu/notebooks.py [name ...]

Named by the beginnings of their names, or all. Says how each ends, with the lines of the first error, and what it would have
made a GPU do. Files go to a folder that is deleted.
"""

import io
import os
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from gpu.pretend import EVENTS, Pretend  # noqa: E402
from pdiff_lib.batches import jobs  # noqa: E402

TINY = {"train_images": 60, "test_images": 60, "base_epochs": 2, "k_checkpoints": 8, "ae_channels": [2, 2], "latent_dim": 4,
        "latent_dims": [2, 4], "ae_steps": 3, "denoiser_channels": [2, 2, 2], "diffusion_steps": 3, "sampling_steps": 5,
        "samples": 4, "vae_steps": 3, "chains": 200, "T_values": [10, 100], "subset_sizes": [3], "paths": 2,
        "moments": 4, "show": "all"}


def smaller(values: dict) -> dict:
    """Parameters with tiny values in place of a notebook's own, also in its rows of settings."""
    out = {k: smaller(v) if isinstance(v, dict) else TINY.get(k, v) for k, v in values.items()}
    return {**out, "network": "test_resnet"} if out.get("network") == "resnet18" else out


def run(path: Path) -> tuple[str, Pretend]:
    """How a notebook ends ("" where all is well), and what happened."""
    cells = [c.source for c in nbformat.read(path, 4).cells
             if c.cell_type == "code" and "nbval-skip" not in c.metadata.get("tags", ())]
    variables = {"display": lambda *_: None}
    gpu, ending = Pretend(), ""
    try:
        with gpu, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for i, source in enumerate(cells):
                exec(compile(source, f"{path.stem} code cell {i}", "exec"), variables)
                if i == 0:  # the parameters
                    variables |= smaller(jobs.defaults(path))
    except Exception as error:
        lines = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
                 if "pdiff_lib" in f.filename or path.stem in f.filename]
        ending = f"{type(error).__name__} in {' > '.join(lines[-3:])}: {error}"
    return ending, gpu


def main() -> None:
    os.chdir(ROOT / "notebooks")
    paths = [p for p in sorted(Path().glob("*.ipynb")) if p.stem.startswith(tuple(sys.argv[1:]) or "")]
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PDIFF_RUNS"] = folder
            start = time.monotonic()
            ending, gpu = run(path)
        counts = ", ".join(f"{gpu.count(kind):,} {kind}" for kind in EVENTS)
        print(f"{path.stem}: {ending or 'runs'} ({time.monotonic() - start:.0f} s; {counts})", flush=True)


if __name__ == "__main__":
    main()
