"""One recipe, walked from its data to a table: the line that every notebook draws its figures from.

Nothing is computed before it is asked for, and nothing twice: each stage is kept under the digest of what it depends on.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from pdiff_lib.base import training, vectors
from pdiff_lib.base.recipe import Autoencoder, Diffusion, Recipe, Sampling, Vae
from pdiff_lib.base.runs import Store, tensor_digest
from pdiff_lib.base.vectors import Array
from pdiff_lib.generators import autoencoder, baselines, denoiser, diffusion, methods, pdiff, vae
from pdiff_lib.measures import similarity
from pdiff_lib.networks import symmetry, weights
from pdiff_lib.originals import ORIGINAL, Originals
from pdiff_lib.tasks.task import Judged, Predictor

AVERAGE, PDIFF = "average", "p-diff"
LEARNED = "what methods learn from"
SAMPLED = (autoencoder, denoiser, diffusion, baselines.gaussian, vectors.Standardiser)  # code of sampling


class Experiment(Originals):
    """The stages of one recipe, computed when first asked for.

    Construction loads the data, creates the network and selects the subset: whatever is wrong with the recipe is said
    here, before any long work.

    Args:
        recipe: all settings.
        store: where stages are kept; None: `runs/stages`.
        device: for everything; None: CUDA when there is one.
        progress: show progress bars.
        shared: what experiments over the same data or network have in common; hand the same dict to all of them.

    Attributes:
        seconds: of each method, once it has been used: "fit" and "sample", as computed, also when read back.

    Raises:
        ValueError: unknown task, dataset or network, data that the network does not take, a subset that matches nothing, ...
    """

    def __init__(self, recipe: Recipe, store: Store | None = None, device: str | None = None, progress: bool = True,
                 shared: dict[Any, Any] | None = None):
        super().__init__(recipe, store, device, progress, shared)
        self.methods: dict[str, Any] = self._methods()
        self.seconds: dict[str, dict[str, float]] = {}
        self._fitted: dict[str, Any] = {}
        self._conditions: dict[str, tuple[Tensor, Tensor]] = {}
        self._predictions: dict[str, Tensor] = {}
        self._frames: dict[str, pd.DataFrame] = {}

    def _methods(self) -> dict[str, Any]:
        return {PDIFF: self.pdiff(),
                **{f"noise {s:g}": baselines.Noise(s, self.subset.sizes) for s in self.recipe.comparison.noise_scales},
                AVERAGE: baselines.WeightAverage(), "interpolation": baselines.Interpolation(),
                "gaussian": baselines.Gaussian()}

    def pdiff(self, **other: Any) -> pdiff.PDiff:
        """P-diff with the recipe's settings, some of them others: `add("p-diff, PCA", e.pdiff(ae_kind="pca"))`."""
        return self._made(pdiff.PDiff, (Autoencoder, Diffusion, Sampling), other)

    def vae(self, **other: Any) -> vae.VAE:
        """The VAE of Table 8 with the recipe's settings, some of them others."""
        return self._made(vae.VAE, (Autoencoder, Vae), other)

    def _made(self, kind: type, sections: tuple[type, ...], other: dict[str, Any]) -> Any:
        own = {k: v for c in sections for k, v in dataclasses.asdict(getattr(self.recipe, c.__name__.lower())).items()}
        return kind(self.subset.sizes, self.device, self.progress, **own | other)

    def add(self, name: str, method: Any, condition: Float[Array, "K C"] | None = None,
            wanted: Float[Array, "C"] | None = None) -> None:
        """Put a method of your own beside the others: anything with `fit(theta)` and `sample(n, generator)`.

        `fit` gets a copy of the originals; `sample` gives n vectors, finite floats of any size, also as a NumPy array.

        Args:
            name: not taken yet.
            method: what has these two; to be conditioned, with a parameter `condition` in both.
            condition: a row of numbers per original (its loss, a class), for `fit`.
            wanted: the row that `sample` is asked for.

        Raises:
            ValueError: a name that is taken, an object without these two, a condition for a method that takes none, of another
                number of rows than there are originals, or without the row that is wanted.
        """
        if name in self.methods or name == ORIGINAL:
            raise ValueError(f"there is a method {name!r} already: expected a new name")
        methods.check(name, method, conditional=condition is not None)
        if (condition is None) != (wanted is None):
            raise ValueError(f"method {name!r}: expected condition and wanted together, or neither")
        if condition is not None:
            rows = vectors.vectors(condition)
            if len(rows) != self.k:
                raise ValueError(f"the condition of method {name!r} has {len(rows)} rows: expected one per original, {self.k}")
            self._conditions[name] = rows.clone(), vectors.vector(wanted, rows.shape[1]).clone()
        self.methods[name] = method

    @property
    def learned_from(self) -> Float[Tensor, "n D"]:
        """What methods are fitted to: the originals, then their randomly permuted copies (`permutations` of each).

        Raises:
            ValueError: all originals are the same vector; somebody has changed them in place.
        """
        originals, copies = self.theta(ORIGINAL), self.recipe.population.permutations
        if LEARNED not in self._kept:
            vectors.distinct(originals)
            if still := self.subset.still(originals):
                warnings.warn(f"{len(still)} of {len(self.subset.names)} tensors are the same in all {len(originals)} "
                              f"originals ({weights.some(still)}): methods learn nothing of them but their value")
            more = symmetry.augment(originals, self._symmetry, copies, self.generator("permutations")) if copies else originals
            self._kept.keep(LEARNED, more)
        return self._kept.get(LEARNED)

    def fitted(self, name: str) -> Any:
        """A method, fitted to the zoo."""
        if name not in self.methods:
            raise ValueError(f"no method {name!r}: expected one of {', '.join(self.methods)}")
        if name not in self._fitted:
            method, theta = self.methods[name], self.learned_from
            kept = {"store": self.store} if "store" in inspect.signature(method.fit).parameters else {}
            if name in self._conditions:  # of permuted copies, which come copy after copy, that of their original
                rows = self._conditions[name][0]
                kept["condition"] = rows.repeat(len(theta) // len(rows), 1)
            fitted, seconds = self.store.spent(lambda: methods.fit(method, theta, self._seed(f"fit {name}"), **kept))
            self._kept.get(ORIGINAL, by=f"the fit of method {name!r}")
            self._fitted[name], self.seconds[name] = fitted, {"fit": seconds}
        return self._fitted[name]

    def _seed(self, purpose: str) -> int:
        return training.seed_for(self.recipe.autoencoder.pdiff_seed, purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """The random numbers for one purpose, always the same for one recipe."""
        return torch.Generator().manual_seed(self._seed(purpose))

    def theta(self, name: str) -> Float[Tensor, "M D"]:
        """The networks of a method: the originals, or `samples` new ones (one, of a method whose samples are all the same).

        Raises:
            ValueError: the method gives what is no vector of this subset, or somebody has changed the networks in place.
        """
        if name == ORIGINAL:
            self.zoo
        elif name not in self._kept:
            method = self.fitted(name)
            n = 1 if getattr(method, "single", False) else self.recipe.comparison.samples

            def compute(_checkpoint=None):
                return {"theta": methods.sample(name, method, n, self.subset.numel, self.generator(f"sample {name}"),
                                                self._seed(f"sample {name}, global"), **self._wanted(name, n))}

            def sample():
                if not hasattr(method, "fingerprint"):
                    return compute()
                key = {"n": n, "name": name, "seed": self.recipe.autoencoder.pdiff_seed, **method.fingerprint,
                       **{verb: tensor_digest(row) for verb, row in self._wanted(name, 1).items()}}
                return self.store.stage("generated", key, compute, code=(*getattr(method, "code", (type(method),)), *SAMPLED))

            stage, self.seconds[name]["sample"] = self.store.spent(sample)
            self._kept.get(ORIGINAL, by=f"the sampling of method {name!r}")
            self._kept.keep(name, stage["theta"])
        return self._kept.get(name)

    def _wanted(self, name: str, n: int) -> dict[str, Tensor]:
        return {"condition": self._conditions[name][1].expand(n, -1).clone()} if name in self._conditions else {}

    @cached_property
    def predictor(self) -> Predictor:
        """The trained network over the test items, made ready once for all methods."""
        key = self.net_digest, self.evaluated.names, self.task.digest
        if key not in self._shared:
            self._shared[key] = self.task.predictor(self._net_as_it_was(), self.evaluated, self.device, self.progress)
        return self._shared[key]

    def predictions_of(self, theta: Float[Array, "M D"]) -> Shaped[Tensor, "M N ..."]:
        """What any parameter vectors give for each test item (stage "predictions"): of a classifier the class, -1 where its
        scores are not finite."""
        theta = self.complete(theta)
        key = {"net": self.net_digest, "names": self.evaluated.names, "theta": tensor_digest(theta),
               "images": self.task.digest, "device": self.device.type}

        def compute(_checkpoint):
            sound = torch.isfinite(theta).all(dim=1)  # running statistics that are computed anew may not be
            found = self.predictor(theta.where(sound[:, None], 0.0))
            found[~sound.cpu()] = torch.nan if found.is_floating_point() else -1
            return {"predictions": found}

        stage = self.store.stage("predictions", key, compute, code=self.task.judging)
        return self.task.warned(stage["predictions"])

    def predictions(self, name: str) -> Shaped[Tensor, "M N ..."]:
        """What the networks of a method give for each test item."""
        if name not in self._predictions:
            self._predictions[name] = self.predictions_of(self.theta(name))
        return self._predictions[name].clone()  # theirs who ask for it

    def _originals(self) -> Tensor | None:
        return self.predictions(ORIGINAL) if self.task.relative else None

    def judged_of(self, theta: Float[Array, "M D"]) -> Judged:
        """The score of any parameter vectors, and which test items they get wrong."""
        return self.task.judged(self.predictions_of(theta), self._originals())

    def judged(self, name: str) -> Judged:
        """The score of the networks of a method, and which test items they get wrong."""
        return self.task.judged(self.predictions(name), self._originals())

    def wrong_of(self, theta: Float[Array, "M D"]) -> Bool[Tensor, "M N"]:
        """Which test items any parameter vectors get wrong.

        Raises:
            ValueError: "wrong" has no meaning for this task.
        """
        return self._meant(self.judged_of(theta).wrong)

    def wrong(self, name: str) -> Bool[Tensor, "M N"]:
        """Which test items the networks of a method get wrong; raises as `wrong_of`."""
        return self._meant(self.judged(name).wrong)

    def _meant(self, wrong: Tensor | None) -> Tensor:
        if wrong is None:
            raise ValueError(f"task {self.recipe.data.task!r} has no items that a network gets wrong: expected a task with some")
        return wrong

    def frame(self, names: list[str] | None = None) -> pd.DataFrame:
        """A row per network: method, index, score, similarity to the originals and which is nearest.

        Columns: `method`, `index`, `score` (of classifiers `accuracy`, a fraction; `Score.column` of the task), `max_similarity`
        (Eq. 7; without "wrong" by the task's `alike`, else NaN), `nearest` (index of that original; -1 likewise), `distance` (Euclidean, to the
        nearest original), `outside_span` (see `similarity.outside_span`).
        """
        names = names or [ORIGINAL, *self.methods]
        for name in names:
            theta = self.theta(name)  # refused, where somebody has changed it
            if name not in self._frames:
                self._frames[name] = self.frame_of(name, theta)
        return self.task.score.of_frame(pd.concat([self._frames[name] for name in names], ignore_index=True))

    def frame_of(self, name: str, theta: Float[Array, "M D"]) -> pd.DataFrame:
        """The rows of `frame` for any parameter vectors under a name; `ORIGINAL`: an original is not compared with itself."""
        found, own, originals = self.predictions_of(theta), name == ORIGINAL, self.theta(ORIGINAL)
        judged = self.task.judged(found, self._originals())
        value, nearest = torch.full((len(theta),), torch.nan), torch.full((len(theta),), -1)
        if judged.wrong is not None:
            value, nearest = similarity.nearest(judged.wrong, self.wrong(ORIGINAL), exclude_self=own)
        elif (pairs := self.task.alike(found, self.predictions(ORIGINAL))) is not None:
            value, nearest = similarity.highest(pairs, exclude_self=own)
        return self.task.score.of_frame(pd.DataFrame({
            "method": name, "index": range(len(theta)), self.task.score.column: judged.score.numpy(),
            "max_similarity": value.numpy(), "nearest": nearest.numpy(),
            "distance": similarity.distance(theta, originals, exclude_self=own).numpy(),
            "outside_span": similarity.outside_span(theta, originals).numpy()}))

    def summary(self, names: list[str] | None = None) -> pd.DataFrame:
        """A row per method: n, score (mean, std, best; best on one half of the test items, reported on the other), and
        the means of the three measures of novelty. The columns' name says with which running statistics they were evaluated,
        unless it is as in the paper."""
        frame = self.frame(names)
        novelty = frame.groupby("method", sort=False)[["max_similarity", "distance", "outside_span"]].mean()
        scores = {name: self.task.summary(self.predictions(name), self._originals()) for name in novelty.index}
        table = pd.DataFrame.from_dict(scores, orient="index").join(novelty).rename_axis("method")
        return table.rename_axis(columns=f"running statistics {self.statistics}" if self.statistics else None)
