"""Networks to take away: complete state dicts of generated networks, the best of many, with what is known of each.

The best are picked on one half of the test items (`task.halves`); everything that is said of them is measured on the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from pdiff_lib import networks
from pdiff_lib.base import inputs, parameters, provenance, records, runs
from pdiff_lib.base.recipe import Recipe, names, short
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.measures import similarity
from pdiff_lib.tasks.task import halves

REPORT = "networks.json"  # what is known of each file, and what the folder was made of


class Picked(NamedTuple):
    """The best of many generated networks.

    Attributes:
        table: a row per network, best first: `file`, `candidate` (its index among all), its score on the half that it was picked on
            (of classifiers `accuracy_to_pick`), and on the other half its score (`accuracy`), `max_similarity` (Eq. 7, or the task's
            `alike`) and `nearest` (index of that original); `nearest_file`, where the originals are files.
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
    """The n networks of p-diff that are best on the first half of the test items.

    Raises:
        ValueError: more networks than there are candidates.
    """
    outputs, originals, score = e.predictions(PDIFF), e.predictions(ORIGINAL), e.task.score
    if not 1 <= n <= len(outputs):
        raise ValueError(f"n is {n}: expected 1 to {len(outputs)}, the number of candidates")
    here, there = halves(outputs.shape[1])
    to_pick = e.task.judged(outputs, originals, here).score
    found, own = (e.task.judged(o, originals, there) for o in (outputs, originals))
    sign = 1 if score.better == "higher" else -1
    best = (sign * to_pick).nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:n]
    table = pd.DataFrame({"file": [f"generated-{i:03d}.safetensors" for i in range(n)], "candidate": best.numpy(),
                          f"{score.column}_to_pick": to_pick[best].numpy(), score.column: found.score[best].numpy()})
    pairs = e.task.alike(outputs[:, there], originals[:, there]) if found.wrong is None else similarity.iou(found.wrong, own.wrong)
    if pairs is not None:
        value, nearest = similarity.highest(pairs)
        table = table.assign(max_similarity=value[best].numpy(), nearest=nearest[best].numpy())
        if e.files:
            table["nearest_file"] = [str(e.files[i]) for i in table.nearest]
    return Picked(table, {"items_to_pick": len(here), "items": len(there), "candidates": len(outputs), "originals": len(originals),
                          "candidates_mean": float(found.score.mean()), "originals_mean": float(own.score.mean()),
                          "originals_best": float(sign * (sign * own.score).max())})


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
                                                        "files": rows, **provenance.environment(e.device)}))


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
    network, score, t, o = e.recipe.base.network, e.task.score, found.table, found.others
    timm, images = hasattr(e.net, "pretrained_cfg"), getattr(e.task, "images", None)
    name, dataset, kind = f"{network} generated by p-diff", short(e.recipe.data.dataset), "image-classification" if images else "other"
    result = {"task": {"type": kind}, "dataset": {"name": dataset, "type": dataset, "split": "test, second half"},
              "metrics": [{"type": score.name, "value": round(float(t[score.column].mean()), 4), "name": f"mean of {len(t)}"}]}
    about = {"library_name": "timm" if timm else "pytorch", **({"pipeline_tag": kind} if images else {}),
             "tags": ["p-diff", "weight-generation", *["timm"] * timm], "metrics": [score.name],
             "model-index": [{"name": name, "results": [result]}]}
    originals = f"{e.k} checkpoints of the user's own, the last {e.files[-1].name}" if e.files else f"{e.k} checkpoints of this recipe"
    alike = "intersection over union of wrong predictions (Eq. 7); 1 makes the same mistakes" if score.similarity == "IoU" else score.similarity
    rows = [f"| these {len(t)}, mean | {t[score.column].mean():.4f} |", f"| all {o['candidates']} generated, mean | {o['candidates_mean']:.4f} |",
            f"| the {o['originals']} originals, mean | {o['originals_mean']:.4f} |", f"| the best original | {o['originals_best']:.4f} |"]
    shown = t.drop(columns="nearest_file", errors="ignore").round(4)
    each = [f"| {' | '.join(map(str, row))} |" for row in (shown.columns, ["---"] * shown.shape[1], *shown.itertuples(index=False))]
    return "\n".join([
        "---", parameters.dump(about) + "---", "", f"# {name}", "",
        f"{len(t)} sets of weights that were generated by a diffusion model over parameters (Neural Network Diffusion,",
        "[arXiv 2402.13144](https://arxiv.org/abs/2402.13144)), not trained. Each file is a complete state dict.", "",
        "## Model details", "", f"- Network: `{network}`; {e.task.title}",
        f"- Generated: `{e.recipe.zoo.subset}`, {e.subset.numel:,} of the network's numbers; the rest is the trained network's",
        f"- Learned from: {originals}",
        f"- Running statistics of batch norms: {e.statistics or 'of the trained network, where it has any'}", "",
        "## How to use", "", *_usage(e, t.file[0], timm), "",
        "## Evaluation", "",
        f"The best {len(t)} of {o['candidates']} generated networks, picked by their {score.name} on {o['items_to_pick']} test items of {dataset}; all "
        f"other numbers are measured on the other {o['items']} test items, which picked nothing.", "",
        f"| | {score.name}{', lower is better' * (score.better == 'lower')} |", "|---|---|", *rows, "",
        *([f"`max_similarity`, to the most similar original: {alike}.", ""] if "max_similarity" in t else []), *each, "",
        "## Limitations", "",
        "Networks of this kind are often no better, and no more novel, than averages or noisy copies of their originals",
        "([arXiv 2506.07998](https://arxiv.org/abs/2506.07998)): compare with the originals above, and with the baselines of the project.", ""])


def _usage(e: Experiment, file: str, timm: bool) -> list[str]:
    network, images = e.recipe.base.network, getattr(e.task, "images", None)
    if images is None:
        return [f"Load `{file}` into the network that the recipe names (`load_state_dict`)."]
    shape = f"num_classes={images.num_classes}, in_chans={images.channels}"
    if timm:
        sized = f", img_size={images.size}" if e.net.pretrained_cfg.get("fixed_input_size") else ""
        made = ["import timm", "", f"net = timm.create_model({network!r}, {shape}{sized})"]
    else:
        made = ["from pdiff_lib import networks", "", f"net = networks.create({network!r}, {shape}, image_size={images.size})"]
    mean, std = ("(" + ", ".join(f"{v:.6g}" for v in values) + ")" for values in images.input_scale)
    return ["```python", "from safetensors.torch import load_file", *made, f"net.load_state_dict(load_file({file!r}))", "net.eval()", "```",
            "", f"Inputs: {images.channels} x {images.size} x {images.size}; pixels from 0 to 1, less mean {mean}, divided by std {std}."]
