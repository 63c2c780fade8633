"""Networks to take away: complete state dicts of generated networks, the best of many, with what is known of each.

The best are picked on one half of the test images (`evaluate.halves`); everything that is said of them is measured on the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from pdiff_lib import evaluate, inputs, networks, parameters, records, runs, similarity
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.recipe import Recipe, names, short

REPORT = "networks.json"  # what is known of each file, and what the folder was made of


class Picked(NamedTuple):
    """The best of many generated networks.

    Attributes:
        table: a row per network, best first: `file`, `candidate` (its index among all), `accuracy_to_pick` (on the half that it was
            picked on), and on the other half `accuracy`, `max_similarity` (Eq. 7) and `nearest` (index of that original);
            `nearest_file`, where the originals are files.
        others: numbers to compare with, on the other half: of all candidates and of the originals.
    """

    table: pd.DataFrame
    others: dict[str, float | int]


def recipe_of(source: Path | Recipe) -> Recipe:
    """The recipe in a YAML file, or that of a run's folder; a recipe is itself.

    Raises:
        ValueError: neither; a name that is no setting (in a YAML file); inputs that are not what the run was made of.
    """
    if isinstance(source, Recipe):
        return source
    if not source.is_dir():
        return Recipe.of(**parameters.load(source))
    if not (source / "record.json").is_file():
        raise ValueError(f"{source} holds no record.json: expected a recipe (YAML), or the folder of a complete run")
    record = records.loads((source / "record.json").read_text())
    recipe = Recipe.of(**{n: v for n, v in record["settings"].items() if n in names()})
    now, then = inputs.digests(inputs.of(recipe.flat(), Path.cwd())), record.get("inputs") or {}
    if odd := [n for n in names() if now.get(n) != then.get(n)]:
        raise ValueError(f"{', '.join(odd)}: not there, or not as run {source.name} found it: expected the files that it was made "
                         "of, by the same relative paths")
    return recipe


def pick(e: Experiment, n: int) -> Picked:
    """The n networks of p-diff that are best on the first half of the test images.

    Raises:
        ValueError: more networks than there are candidates.
    """
    wrong, original = e.wrong(PDIFF), e.wrong(ORIGINAL)
    if not 1 <= n <= len(wrong):
        raise ValueError(f"n is {n}: expected 1 to {len(wrong)}, the number of candidates")
    here, there = evaluate.halves(wrong.shape[1])
    to_pick, accuracy = evaluate.accuracy(wrong[:, here]), evaluate.accuracy(wrong[:, there])
    value, nearest = similarity.nearest(wrong[:, there], original[:, there])
    best = to_pick.argsort(descending=True, stable=True)[:n]
    table = pd.DataFrame({"file": [f"generated-{i:03d}.safetensors" for i in range(n)], "candidate": best.numpy(),
                          "accuracy_to_pick": to_pick[best].numpy(), "accuracy": accuracy[best].numpy(),
                          "max_similarity": value[best].numpy(), "nearest": nearest[best].numpy()})
    if e.files:
        table["nearest_file"] = [str(e.files[i]) for i in table.nearest]
    originals = evaluate.accuracy(original[:, there])
    return Picked(table, {"images_to_pick": len(here), "images": len(there), "candidates": len(wrong), "originals": len(original),
                          "candidates_mean": float(accuracy.mean()), "originals_mean": float(originals.mean()),
                          "originals_best": float(originals.max())})


def generate(source: Path | Recipe, n: int, out: Path, candidates: int = 0, *, store: runs.Store | None = None, device: str | None = None,
             progress: bool = True) -> Path:
    """Write n generated networks, `networks.json` and a model card; what a killed call left is gone on from.

    Args:
        source: a recipe (also as YAML) or a run's folder.
        n: how many files.
        out: a folder that is empty, not there, or was made of the same.
        candidates: how many to generate and pick from; 0: the recipe's `samples`, or n where that is more.
        store, device, progress: as for `Experiment`.

    Returns:
        The path of `networks.json`.

    Raises:
        ValueError: `out` holds something else; fewer candidates than files; candidates that are no networks; or what `recipe_of`
            and `Experiment` refuse.
    """
    recipe = recipe_of(source)
    if n < 1 or (candidates and candidates < n):
        raise ValueError(f"n is {n} of {candidates or recipe.comparison.samples} candidates: expected at least 1, and no more "
                         "than there are candidates")
    recipe = Recipe.of(**{**recipe.flat(), "samples": candidates or max(n, recipe.comparison.samples)})
    made_of = {"n": n, "recipe": recipe.flat(), "inputs": inputs.digests(inputs.of(recipe.flat(), Path.cwd()))}
    _check(out, made_of)
    e = Experiment(recipe, store, device, progress)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / REPORT).is_file():
        runs.write_text(out / REPORT, records.dumps({"complete": False, "made_of": made_of}))
    found = pick(e, n)
    theta = e.complete(e.theta(PDIFF)[found.table.candidate.tolist()])
    if not torch.isfinite(theta).all():
        raise ValueError(f"{int((~torch.isfinite(theta).all(dim=1)).sum())} of the best {n} networks overflow on training images: "
                         "expected fewer files, or more candidates")
    net = networks.copied(e.net).cpu()
    for file, vector in zip(found.table.file, theta):
        _write(out / file, e.evaluated.load(net, vector).state_dict())
    runs.write_text(out / "README.md", card(e, found))
    rows = {row.pop("file"): row for row in found.table.to_dict("records")}
    return runs.write_text(out / REPORT, records.dumps({"complete": True, "made_of": made_of, "title": e.title, **found.others,
                                                        "files": rows, **records.environment(e.device)}))


def _check(out: Path, made_of: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, before any work."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    report = out / REPORT
    if not report.is_file():
        raise ValueError(f"{out} holds something else (no {REPORT}): expected an empty or a new folder")
    try:
        there = records.loads(report.read_text()).get("made_of") or {}
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{report} is not what this command writes ({error}): expected an empty or a new folder") from error
    now = json.loads(records.dumps(made_of))
    if there != now:
        old, new = ({**m, **m.get("recipe", {})} for m in (there, now))
        odd = [k for k in {**old, **new} if k != "recipe" and old.get(k) != new.get(k)]
        raise ValueError(f"{out} holds networks of something else ({', '.join(odd[:3])} differ): expected an empty or a new folder")


def _write(path: Path, state: dict[str, torch.Tensor]) -> None:
    try:
        if runs.tensor_digest(runs.read(path)[0]) == runs.tensor_digest(state):
            return
    except (OSError, runs.DamagedFile):  # not there, or not whole
        pass
    runs.write(path, state)


def card(e: Experiment, found: Picked) -> str:
    """A model card in the format of the Hugging Face Hub: metadata as YAML, then text."""
    base, images, t, o = e.recipe.base, e.images, found.table, found.others
    timm = hasattr(e.net, "pretrained_cfg")
    name = f"{base.network} generated by p-diff"
    dataset = short(e.recipe.data.dataset)
    result = {"task": {"type": "image-classification"}, "dataset": {"name": dataset, "type": dataset, "split": "test, second half"},
              "metrics": [{"type": "accuracy", "value": round(float(t.accuracy.mean()), 4), "name": f"mean of {len(t)}"}]}
    about = {"library_name": "timm" if timm else "pytorch", "pipeline_tag": "image-classification",
             "tags": ["image-classification", "p-diff", "weight-generation", *["timm"] * timm], "metrics": ["accuracy"],
             "model-index": [{"name": name, "results": [result]}]}
    mean, std = images.input_scale
    originals = (f"{e.k} checkpoints of the user's own, the last {e.files[-1].name}" if e.files else
                 f"{e.k} checkpoints, collected by this project's recipe")
    lines = "\n".join(f"| {r.file} | {r.accuracy_to_pick:.4f} | {r.accuracy:.4f} | {r.max_similarity:.3f} | {r.nearest} |"
                      for r in t.itertuples())
    running = e.statistics or "of the trained network, where it has any"
    return f"""---
{parameters.dump(about)}---

# {name}

{len(t)} sets of weights that were generated by a diffusion model over parameters (Neural Network Diffusion,
[arXiv 2402.13144](https://arxiv.org/abs/2402.13144)), not trained. Each file is a complete state dict.

## Model details

- Network: `{base.network}`, {images.num_classes} classes, {images.channels} input channels
- Generated: `{e.recipe.zoo.subset}`, {e.subset.numel:,} of the network's numbers; the rest is the trained network's
- Learned from: {originals}
- Running statistics of batch norms: {running}

## How to use

```python
{_usage(e, t.file[0], timm)}
```

Inputs: {images.channels} x {images.size} x {images.size}; pixels from 0 to 1, less mean {_numbers(mean)}, divided by std {_numbers(std)}.

## Evaluation

Data set: {dataset}. The {len(t)} best of {o["candidates"]} generated networks, picked by their accuracy on {o["images_to_pick"]} test images; all other numbers
are measured on the other {o["images"]} test images, which picked nothing.

| | accuracy (fraction) |
|---|---|
| these {len(t)}, mean | {t.accuracy.mean():.4f} |
| all {o["candidates"]} generated, mean | {o["candidates_mean"]:.4f} |
| the {o["originals"]} originals, mean | {o["originals_mean"]:.4f} |
| the best original | {o["originals_best"]:.4f} |

Similarity: intersection over union of wrong predictions with the most similar original (Eq. 7); 1 makes the same mistakes.

| file | accuracy, to pick | accuracy | similarity | nearest original |
|---|---|---|---|---|
{lines}

## Limitations

Networks of this kind are often no better, and no more novel, than averages or noisy copies of their originals
([arXiv 2506.07998](https://arxiv.org/abs/2506.07998)): compare with the originals above, and with the baselines in the project's notebooks.
"""


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


def _usage(e: Experiment, file: str, timm: bool) -> str:
    base, c, k, size = e.recipe.base, e.images.channels, e.images.num_classes, e.images.size
    if timm:
        sized = f", img_size={size}" if e.net.pretrained_cfg.get("fixed_input_size") else ""
        made = f"import timm\n\nnet = timm.create_model({base.network!r}, num_classes={k}, in_chans={c}{sized})"
    else:
        made = ("from pdiff_lib import networks\n\n"
                f"net = networks.create({base.network!r}, num_classes={k}, in_chans={c}, image_size={size})")
    return f"from safetensors.torch import load_file\n{made}\nnet.load_state_dict(load_file({file!r}))\nnet.eval()"
