"""The tables of figures/README.md and of the root README, made from what is committed in this folder.

    python figures/gallery.py    # `make gallery`

Each file says where a table goes by `<!-- table: NAME -->` ... `<!-- end -->`; what stands between is replaced. A test asserts
that the committed files are what this makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from pdiff_lib import audit, networks, study
from pdiff_lib.arena import HELD_OUT
from pdiff_lib.batches import results
from pdiff_lib.experiment import AVERAGE, ORIGINAL, PDIFF
from pdiff_lib.measures import paper
from pdiff_lib.networks import subset

HERE = Path(__file__).resolve().parent
FILES = (HERE / "README.md", HERE.parent / "README.md")
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(\n<!-- end -->)", re.S)
CELLS = ("digits-resnet18", "cifar10-resnet18", "mnist-hyperrep-cnn", "cifar10-convnet-mini")  # the quickstart's runs
PRETRAINED = "cifar10-efficientnet"
MINIS = ("mlp", "convnet", "resnet", "convnext", "vit")
GAUSSIAN, CENTRED = "gaussian", "p-diff, centred"
NAMES = {"gaussian": "Gaussian", "p-diff, PCA": "p-diff, PCA in the place of the autoencoder",
         "p-diff, Gaussian latents": "p-diff, Gaussian in the place of the diffusion",
         "p-diff, MLP": "p-diff, MLP in the place of the 1-D CNN", "trained network": "network before fine-tuning",
         "tensor means": "each tensor filled with its mean"}


@cache
def records() -> dict[str, dict[str, Any]]:
    """The committed records of runs, by the names they were published under."""
    found = {Path(r["where"]): r for r in results.records()}
    return {path.name.removesuffix("-record.json"): r for path, r in sorted(found.items()) if path.parent == HERE}


def rows(header: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (header, *body))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def number(value: float, digits: int, sign: bool = False) -> str:
    """A number as a table shows it; nothing where there is none, and no minus before a zero."""
    return "" if pd.isna(value) else f"{round(value, digits) + 0.0:{'+' * sign}.{digits}f}"


def spread(mean: float, std: float, digits: int = 2, sign: bool = False) -> str:
    """Mean and standard deviation; the mean alone where there is no deviation."""
    return number(mean, digits, sign) + ("" if pd.isna(std) else f" +- {std:.{digits}f}")


def percent(method: dict[str, float], digits: int = 2) -> str:
    """Mean accuracy and its deviation over the networks of a method, in percent."""
    return spread(100 * method["mean"], 100 * method["std"] if method["n_models"] > 1 else float("nan"), digits)


def cell(name: str) -> str:
    """A run of the quickstart: what it took, and a row per method."""
    r = records()[name]
    numbers, seconds = r["numbers"], ", ".join(f"{stage} {s:.0f}" for stage, s in r["seconds_per_stage"].items())
    body = [[m, v["n_models"], percent(v), *(number(100 * v[c], 2) for c in ("best", "best_other_half")),
             number(v["max_similarity"], 3), number(v["distance"], 2), number(v["outside_span"], 2)]
            for m, v in numbers["methods"].items()]
    header = ["method", "n", "mean +- std", "best", "other half", "max similarity", "distance", "outside"]
    return f"Trained network: {100 * numbers['trained']:.1f} %. Seconds per stage: {seconds}.\n\n{rows(header, body)}"


def checkpoints() -> str:
    """Figure 5c and Table 3e: similarity and gain against K, over seeds."""
    table = pd.read_parquet(HERE / "cifar10-k-results.parquet")
    over = study.over_seeds(table.assign(row=table.k_checkpoints))
    theirs = paper.tables().query("table == '3e' and metric == @paper.MEAN").set_index("setting").value
    body = []
    for k in sorted(set(table.k_checkpoints)):
        similar = [spread(*over.loc[(k, m), "max_similarity"], 3) for m in (PDIFF, AVERAGE, GAUSSIAN, ORIGINAL)]
        gain = [spread(*(100 * over.loc[(k, m), "gain"]), sign=True) for m in (PDIFF, AVERAGE)]
        body.append([k, *similar, *gain, theirs[next(s for s in theirs.index if s.split()[0] == f"K={k}")]])
    return rows(["K", "p-diff: max similarity", "average", "Gaussian", "originals",
                 "p-diff: points of accuracy beyond the originals", "average", "paper: p-diff, mean accuracy"], body)


def audited(name: str) -> str:
    """Every method of an audit against the frontier of the simple ones."""
    n = records()[name]["numbers"]
    several = any(s["gain"] > 0 for s in n["spread"].values())  # one seed has no deviation
    body = []
    for m, v in sorted(n["methods"].items(), key=lambda kv: (kv[0] != ORIGINAL, not kv[0].startswith(PDIFF), kv[0] != "VAE")):
        seconds = [number(v[f"{verb}_seconds"], 1) for verb in ("fit", "sample")]
        gain = spread(100 * v["gain"], 100 * n["spread"][m]["gain"] if several else float("nan"), sign=True)
        above = number(n["above"].get(m, float("nan")), 2, sign=True)  # in percent already
        body.append([NAMES.get(m, m), gain, number(v["max_similarity"], 3), above, *seconds])
    return rows(["method", "accuracy beyond the originals", "max similarity", "above", "fit", "sample"], body)


def minis() -> str:
    """Table 2: whole networks, as the authors standardise and centred."""
    body = []
    for mini in MINIS:
        r = records()[f"cifar10-32b-{mini}-mini"]
        methods, health = r["numbers"]["methods"], r["numbers"]["health"]
        original, *pdiffs = (f"{percent(methods[m], 1)}, {100 * methods[m]['best']:.1f}" for m in (ORIGINAL, PDIFF, CENTRED))
        simple = [m for m in methods if not m.startswith(PDIFF) and m != ORIGINAL]
        above = audit.place(pd.DataFrame.from_dict(methods, orient="index"), simple).above[CENTRED]
        errors = [f"{health[m]['reconstruction_mse']:.{digits}f}" for m, digits in ((PDIFF, 1), (CENTRED, 2))]
        name = paper.NETWORKS[f"{mini}-mini"][0]
        theirs = paper.tables().query("table == '2' and setting == @name + ' / CIFAR-10'").set_index("method").value
        body.append([f"{name.removesuffix('-mini')} ({generated(r)})", original, percent(methods[AVERAGE], 1),
                     percent(methods[GAUSSIAN], 1), *pdiffs, number(100 * above, 2, sign=True), " / ".join(errors),
                     ", ".join(f"{theirs[m]:.1f}" for m in (ORIGINAL, "ensemble", PDIFF))])
    return rows(["network (D)", "originals: mean, best", "average", "Gaussian", "p-diff: mean, best", "centred: mean, best",
                 "centred, above", "error / variance, p-diff / centred", "paper's best: original, ensemble, p-diff"], body)


def generated(record: dict[str, Any]) -> str:
    """How many numbers of a record's network are generated, counted on that network (all have ten classes)."""
    s = record["settings"]
    channels = s["image_channels"] or (3 if s["dataset"] == "cifar10" else 1)
    net = networks.create(s["network"], num_classes=10, in_chans=channels, image_size=s["image_size"])
    return f"{subset.select(net, s['subset']).numel:,}"


def memorisation(name: str) -> str:
    """A record of 40_memorization, Figures 3, 4 and 5a: the gain over the originals, and the maximum similarity."""
    body = []
    for figure in ("3", "4", "5a"):
        over = study.over_seeds(pd.read_csv(HERE / f"{name}-figure-{figure}.csv"))
        for row in dict.fromkeys(over.index.get_level_values("row")):
            lines = over.loc[row]
            body.append([f"{figure}: {row}", f"{100 * lines.loc[ORIGINAL, ('mean', 'mean')]:.1f}",
                         *(f"{spread(*(100 * lines.loc[m, 'gain']), sign=True)}, "
                           f"{lines.loc[m, ('max_similarity', 'mean')]:.3f}" for m in (PDIFF, AVERAGE, GAUSSIAN))])
    return rows(["figure", "originals", "p-diff", "average", "Gaussian"], body)


def gains(name: str) -> dict[str, tuple[float, float, float]]:
    """A record of an ablation: by row, what generated networks gain over the originals in mean accuracy, its deviation over seeds, and what the
    average gains; NaN where the record has none."""
    nan, n = float("nan"), records()[name]["numbers"]
    if "table" in n:  # of 33_ablations
        return {row: tuple(nan if v is None else v for v in (of[PDIFF]["gain"], of[PDIFF]["gain_std"], of[AVERAGE]["gain"]))
                for row, of in n["rows"].items()}
    if "control" in n:  # of B3_diffusion_steps
        return {row: (of["mean"] - n["originals"], nan, nan) for row, of in n["rows"].items()}
    return {"VAE in p-diff's place": (n["methods"]["VAE"]["mean"] - n["methods"][ORIGINAL]["mean"], nan, nan)}  # of B2_vae


def ablations() -> str:
    """Tables 3, 4, 8 and 9 in points beyond the originals: the paper, and ours on two networks."""
    known = paper.tables().query("metric == @paper.MEAN")
    start = known.query("table == '8' and method == 'original'").value.item()
    theirs = known.query("method == @PDIFF").set_index(["table", "setting"]).value - start
    theirs["8", "VAE in p-diff's place"] = known.query("table == '8' and method == 'vae'").value.item() - start
    body = []
    for table, name in {"3a": "3a", "3b": "3b", "3c": "3c", "3e": "3e", "4": "4", "8": "b2", "9": "b3"}.items():
        small, large = (gains(f"{network}-{name}") if f"{network}-{name}" in records() else {} for network in ("cifar10", PRETRAINED))
        for row, (gain, _, average) in large.items():
            first, std, others = (100 * v for v in small.get(row, [float("nan")] * 3))
            body.append([f"{table}: {row}", number(theirs.get((table, row), float("nan")), 1, sign=True), spread(first, std, sign=True),
                         number(others, 2, sign=True), number(100 * gain, 2, sign=True), number(100 * average, 2, sign=True)])
    return rows(["row", "paper: p-diff", "ResNet-18: p-diff", "its average", "EfficientNet-Lite0: p-diff", "its average"], body)


def zoos() -> str:
    """Table 7: mean accuracy on three kinds of zoos, over seeds."""
    frame = pd.read_csv(HERE / "mnist-b1-accuracy.csv")
    over, kinds = study.over_seeds(frame), list(dict.fromkeys(frame.row))
    theirs = paper.tables().query("table == '7' and setting == 'MNIST'").set_index("method").value
    body = [[NAMES.get(m, m), *(spread(*(100 * over.loc[(k, m), "mean"]), 1) for k in kinds), theirs.get(m, "")]
            for m in dict.fromkeys(frame.method)]
    return rows(["method", *kinds, "paper"], body)


def both_zoos(name: str) -> str:
    """A record of B1_hyper_representations: each method on each zoo, and the distance to what its own autoencoder rebuilds."""
    found = records()[name]["numbers"]["zoos"]
    first = found[next(iter(found))]
    shown = [HELD_OUT, "copy", "average", "interpolation 0.5", "gaussian 1", *(m for m, of in first.items() if pd.notna(of["to rebuilt"]))]
    body = []
    for method in shown:
        cells = [of[method] for of in found.values()]
        body.append([NAMES.get(method, method), *(f"{number(m['score'], 1)} at {number(m['distance'], 2)}" for m in cells),
                     number(cells[0]["to rebuilt"], 2), number(cells[0]["z_u"], 1)])
    return rows(["method", *found, *(f"{what}: {next(iter(found))}" for what in ("to rebuilt", "Z_U"))], body)


def beside() -> str:
    """The quickstart's cells beside the paper's: its tables, and in brackets its authors' logs."""
    def theirs(table: str, setting: str) -> list[str]:
        key = ["method", "metric"]
        known = paper.tables().query("setting == @setting").drop_duplicates(key).set_index(key).value
        wanted = ((ORIGINAL, paper.BEST), ("ensemble", paper.BEST), (PDIFF, paper.BEST), (PDIFF, paper.MEAN))
        found = [(number(known.get(w, float("nan")), 1), number(paper.logged(table, setting, *w), 2)) for w in wanted]
        return [" ".join(filter(None, (printed, f"({log})" * bool(log)))) for printed, log in found]

    def ours(name: str) -> list[str]:
        m = records()[name]["numbers"]["methods"]
        return [number(100 * v, 2) for v in (m[ORIGINAL]["best"], m[AVERAGE]["best"], m[PDIFF]["best"], m[PDIFF]["mean"])]

    _, cifar, mnist, mini = CELLS
    seven = paper.tables().query("table == '7' and setting == 'MNIST'").set_index("method").value
    mean = records()[mnist]["numbers"]["methods"][ORIGINAL]["mean"]
    return rows(["", "original: best", 'average ("ensemble")', "p-diff: best", "p-diff: mean"], [
        ["ResNet-18: paper, CIFAR-100 at 224 px (log)", *theirs("1", "ResNet-18 / CIFAR-100")],
        ["ResNet-18: here, CIFAR-10 at 32 px", *ours(cifar)],
        ["ConvNet-mini: paper, CIFAR-10, Table 2 (log)", *theirs("2", "ConvNet-mini / CIFAR-10")],
        ["ConvNet-mini: here, CIFAR-10 (JPEG)", *ours(mini)],
        ["three-layer CNN: paper, MNIST, Table 7", f"{seven[ORIGINAL]} (mean)", "", "", seven[PDIFF]],
        [f"three-layer CNN: here, MNIST (originals' mean {100 * mean:.2f})", *ours(mnist)]])


def how_many() -> str:
    """The records of 71_how_many: each method's accuracy, and at which distance, against K."""
    found = {name: records()[name]["numbers"] for name in ("digits-71-canonical", "digits-71-8192", "digits-71-ablations", "digits-71", "digits-71-seeds")}
    numbers = {**found["digits-71-canonical"], "canonical unit flow, 10,000 steps": found["digits-71-8192"]["canonical unit flow"],
               "canonical unit flow, units with places": found["digits-71-ablations"]["canonical unit flow"],
               "canonical flow, 10,000 steps": found["digits-71-ablations"]["canonical flow"],
               **{name: of for name, of in found["digits-71"].items() if name.startswith("raw ")}}
    ks = sorted({int(k) for of in numbers.values() for k in of})
    body = []
    for name, of in numbers.items():
        cells = [of.get(str(k)) for k in ks]
        last, three = cells[-1], found["digits-71-seeds"].get(name, {}).get(str(ks[-1]))
        body.append([name, *("" if c is None else f"{number(100 * c['score'], 1)} at {number(c['distance'], 2)}" for c in (*cells, three)),
                     *(["", "", ""] if last is None else [number(100 * last["np_0.75"], 0), number(last["z_u"], 1), number(last["spread"], 2)])])
    return rows(["order, method", *(f"K = {k:,}" for k in ks), f"K = {ks[-1]:,}, three seeds", *(f"{what} at {ks[-1]:,}" for what in ("N&P", "Z_U", "spread"))], body)


def one_k(name: str) -> str:
    """A record of 71_how_many at one K."""
    body = []
    for method, of in records()[name]["numbers"].items():
        ((k, m),) = of.items()
        body.append([method, number(100 * m["score"], 1), number(m["distance"], 2), number(100 * m["np_0.75"], 0),
                     number(m["z_u"], 1), number(m["spread"], 2)])
    return rows([f"order, method at K = {int(k):,}", "accuracy (%)", "relative distance", "N&P (%)", "Z_U", "spread"], body)


def asked(name: str) -> str:
    """A record of 72_checkpoints_to_checkpoints: how well losses are met that were asked for, and what the networks are."""
    n = records()[name]["numbers"]
    body = [[NAMES.get(m, m), number(100 * of["score"], 1), number(of["distance"], 2), number(100 * of["np_0.75"], 0), number(of["z_u"], 1)]
            for m, of in n["methods"].items()]
    return "\n\n".join([rows(["answers to a loss that is asked for", "R²"], [[m, number(r2, 2)] for m, r2 in n["R2"].items()]),
                        rows(["networks (G.pt's of unseen starts, asked for the best loss)", "accuracy (%)", "relative distance", "N&P (%)", "Z_U"], body)])


def fields(name: str) -> str:
    """A record of 60_neural_fields or 63_shapes: what each method's fields are, against real objects."""
    numbers = records()[name]["numbers"]
    body = []
    for method, form in numbers["forms"].items():
        of = numbers["methods"].get(method, {})
        shown = [(of.get("score"), 1, 3), (of.get("distance"), 1, 2), (form["empty"], 100, 1), (form["mmd"], 1, 4), (form["cov"], 100, 0),
                 (form["one_nna"], 1, 2), (form["to_training"], 1, 2), (form["z_u"], 1, 1)]
        body.append([method, *("" if value is None else number(scale * value, digits) for value, scale, digits in shown)])
    return rows(["method", "score", "distance of parameters", "empty (%)", "MMD", "COV (%)", "1-NNA", "to the nearest training object", "Z_U"], body)


def seen() -> str:
    """The records of B4a_detection and B4b_segmentation: networks that find objects, of each method."""
    numbers = {name: records()[f"scenes-{name}"]["numbers"] for name in ("b4a", "b4b")}
    each = {**{f"{row}: AP": of for row, of in numbers["b4a"].items() if row not in ("ap50", "scorecard")}, "FCN: mIoU": numbers["b4b"]["methods"]}
    body = [[what, NAMES.get(method, method), *(number(100 * m[key], 2) for key in ("mean", "best")), number(100 * m["gain"], 2, sign=True),
             number(m["max_similarity"], 3)] for what, methods in each.items() for method, m in methods.items()]
    return rows(["network: score (%)", "method", "mean", "best", "mean beyond the originals'", "max similarity"], body)


def made() -> str:
    """The record of B4c_image_generation: images that networks of each method make of the same noises."""
    numbers = records()["mnist-b4c"]["numbers"]
    body = [[NAMES.get(method, method), *(number(m[key], 2) for key in ("mean", "best")), number(m["gain"], 2, sign=True), number(numbers["KID"][method], 3),
             number(m["max_similarity"], 4)] for method, m in numbers["methods"].items()]
    real = numbers["real"]
    body.append(["real training images", number(real["distance"], 2), "", "", number(real["KID"], 3), ""])
    return rows(["images of", "Frechet distance, mean", "best", "mean beyond the originals'", "KID", "max similarity"], body)


def front() -> str:
    """The root README's table: mean accuracies of the main runs."""
    def line(name: str, what: str, seeds: int, methods: dict[str, dict[str, float]]) -> list[Any]:
        shown = [number(100 * methods[m]["mean"], 1) if m in methods else ""
                 for m in (ORIGINAL, AVERAGE, GAUSSIAN, PDIFF, CENTRED)]
        return [what, generated(records()[name]), seeds, *shown,
                " / ".join(number(methods[m]["max_similarity"], 2) for m in (PDIFF, AVERAGE))]

    names = ("ResNet-18, digits", "ResNet-18, CIFAR-10", "three-layer CNN, MNIST", "ConvNet-mini, CIFAR-10, 40 epochs")
    one = dict(zip(CELLS, names)) | {PRETRAINED: "EfficientNet-Lite0 (ImageNet's weights), CIFAR-10"} | {f"cifar10-32b-{m}-mini": f"{paper.NETWORKS[f'{m}-mini'][0]}, CIFAR-10" for m in MINIS}
    body = [line(name, what, 1, records()[name]["numbers"]["methods"]) for name, what in one.items()]
    body.insert(2, line("cifar10-41", "the same, shorter training", 3, records()["cifar10-41"]["numbers"]["methods"]))
    trajectory = records()["mnist-b1"]["numbers"]["zoos"]["trajectory"]
    body.insert(4, line("mnist-b1", "the same, shorter training", 3, trajectory))
    return rows(["network, images", "D", "seeds", "originals", "average", "Gaussian", "p-diff", "p-diff, centred",
                 "similarity: p-diff / average"], body)


def index() -> str:
    """Every recorded run, with when and from what it was made, and all of its figures."""
    of: dict[str, dict[str, list[str]]] = {name: {} for name in records()}
    for file in (f for kind in ("svg", "html", "csv", "webp") for f in sorted(HERE.glob(f"*.{kind}"))):
        owner = max((n for n in of if file.stem.startswith(f"{n}-")), key=len, default="")
        if not owner:
            raise ValueError(f"{file.name} is of no recorded run: expected one of {list(of)} at its beginning")
        of[owner].setdefault(file.stem.removeprefix(f"{owner}-"), []).append(f"[{file.suffix[1:]}]({file.name})")
    body = []
    for name, figures in of.items():
        r = records()[name]
        links = "; ".join(f"{figure} ({', '.join(kinds)})" for figure, kinds in sorted(figures.items()))
        body.append([f"[{name}]({name}-record.json)", f"[{r['notebook']}](../notebooks/{r['notebook']}.ipynb)", r["scale"],
                     r["created"][:10], r["commit"], r["device"], links])
    return rows(["run", "notebook", "what", "date", "commit", "device", "figures"], body)


TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(cell, name) for name in (*CELLS, PRETRAINED)}, "checkpoints": checkpoints, "audit": partial(audited, "cifar10-41"),
    "audit-mini": partial(audited, "cifar10-41-mini"), "minis": minis, "memorisation": partial(memorisation, "cifar10-40"),
    "memorisation-pretrained": partial(memorisation, f"{PRETRAINED}-40"), "ablations": ablations, "zoos": zoos, "both-zoos": partial(both_zoos, "mnist-b1-2464"),
    "beside": beside, "how-many": how_many, "how-many-mnist": partial(one_k, "mnist-71"),
    "how-many-fashion": partial(one_k, "fashion-71"), "asked": partial(asked, "digits-72"),
    **{name: partial(fields, name) for name in ("mnist-60", "fashion-60", "bodies-63", "chairs-63")},
    "seen": seen, "made": made, "scorecard": lambda: paper.markdown(paper.scorecard(list(records().values()))),
    "front": front, "index": index}


def filled(text: str) -> str:
    """A file's text with the tables that it names.

    Raises:
        ValueError: a table that there is not, or a marker without its end.
    """
    named = re.findall(r"<!-- table: (.*?) -->", text)
    if unknown := sorted(set(named) - set(TABLES)):
        raise ValueError(f"table {unknown[0]!r}: expected one of {sorted(TABLES)}")
    new, found = PLACE.subn(lambda place: place[1] + TABLES[place[2]]() + place[3], text)
    if found != len(named) or found != text.count("<!-- end -->"):
        raise ValueError(f"{len(named)} tables begin, {text.count('<!-- end -->')} end, {found} do both: expected each to end")
    return new


if __name__ == "__main__":
    for file in FILES:
        file.write_text(filled(file.read_text()))
