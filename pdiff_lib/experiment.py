"""One recipe, walked from images to a table: the line that every notebook draws its figures from.

Nothing is computed before it is asked for, and nothing twice: each stage is kept under the digest of what it depends on.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from pdiff_lib import autoencoder, baselines, capture, data, denoiser, diffusion, evaluate, networks, pdiff, population
from pdiff_lib import similarity, subset, symmetry, training, vae, zoo
from pdiff_lib.recipe import Autoencoder, Diffusion, Recipe, Sampling, Vae
from pdiff_lib.runs import Store, tensor_digest

ORIGINAL, AVERAGE, PDIFF = "original", "average", "p-diff"
STEP = (zoo._classification, data.Images.augment, data._random_crop, data.epoch_order, training)  # code of one training step
SAMPLED = (autoencoder, denoiser, diffusion, baselines.gaussian, subset.Standardiser)  # code of sampling


class Experiment:
    """The stages of one recipe, computed when first asked for.

    Construction loads the images, creates the network and selects the subset: whatever is wrong with the recipe is said
    here, before any long work.

    Args:
        recipe: all settings.
        store: where stages are kept; None: `runs/stages`.
        device: for everything; None: CUDA when there is one.
        progress: show progress bars.
        shared: what experiments over the same images or network have in common; hand the same dict to all of them.

    Attributes:
        seconds: of each method, once it has been used: "fit" and "sample", as computed, also when read back.

    Raises:
        ValueError: unknown dataset or network, images that the network does not take, a subset that matches nothing, ...
    """

    def __init__(self, recipe: Recipe, store: Store | None = None, device: str | None = None, progress: bool = True,
                 shared: dict[Any, Any] | None = None):
        self.recipe, self.store, self.progress = recipe, store or Store(), progress
        self._shared = {} if shared is None else shared
        self.device = training.device_of(device)
        d, b = recipe.data, recipe.base
        if d not in self._shared:
            self._shared[d] = data.load(d.dataset, size=d.image_size, channels=d.image_channels or None,
                                        train_images=d.train_images, test_images=d.test_images, seed=d.data_seed)
        self.images = self._shared[d]
        self._initial = networks.create(b.network, self.images.num_classes, self.images.channels, self.images.size,
                                    b.pretrained, b.weights or None, seed=b.seed)
        networks.check(self._initial, (self.images.channels, self.images.size, self.images.size))
        self.subset = subset.select(self._initial, recipe.zoo.subset)
        self._check_population()
        self.methods: dict[str, Any] = self._methods()
        self.seconds: dict[str, dict[str, float]] = {}
        self._fitted: dict[str, Any] = {}
        self._theta: dict[str, Tensor] = {}
        self._predictions: dict[str, Tensor] = {}

    def _check_population(self) -> None:
        p = self.recipe.population
        if self.independent and self.recipe.zoo.subset != "all":
            raise ValueError(f"subset is {self.recipe.zoo.subset!r} with zoo_mode 'independent': expected 'all', as networks "
                             "that are trained independently share no parameters")
        if self.independent:
            population.check(self._initial, self.recipe.base)
        if p.alignment != "none" or p.permutations:
            self._symmetry = symmetry.groups(self._initial, self.subset)

    @property
    def independent(self) -> bool:
        """Whether the originals are trained independently of each other, not one fine-tuning."""
        return self.recipe.population.zoo_mode == "independent"

    @property
    def title(self) -> str:
        """Network, dataset and scale, for titles of figures."""
        r = self.recipe
        return (f"{r.base.network}, {r.data.dataset} at {self.images.size} px, {r.zoo.subset}, "
                f"D = {self.subset.numel:,}, K = {r.zoo.k_checkpoints}{' independent' * self.independent}"
                f"{', aligned' * (r.population.alignment != 'none')}")

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

    def add(self, name: str, method: Any) -> None:
        """Put a method of your own beside the others: anything with `fit(theta)` and `sample(n, generator)`."""
        if name in self.methods or name == ORIGINAL:
            raise ValueError(f"there is a method {name!r} already: expected a new name")
        self.methods[name] = method

    @cached_property
    def net(self) -> nn.Module:
        """The trained network, in eval mode (stage "network", Table 5a).

        With independent originals: the initial one, in which any of them can be evaluated (it has no running statistics)."""
        if self.independent:
            return copy.deepcopy(self._initial).to(self.device).eval()
        base = dataclasses.asdict(self.recipe.base)

        def compute(checkpoint):
            net = copy.deepcopy(self._initial).to(self.device)
            losses = zoo.train(net, self.images, checkpoint=checkpoint, device=self.device, progress=self.progress, **base)
            return {"losses": losses, **net.state_dict(prefix="net.")}

        stage = self.store.stage("network", {**self._start, **base}, compute, code=(zoo.train, *STEP))
        net = copy.deepcopy(self._initial)
        net.load_state_dict({k.removeprefix("net."): v for k, v in stage.items() if k.startswith("net.")})
        self.training_losses = stage["losses"]
        return net.to(self.device).eval()

    @property
    def _start(self) -> dict[str, str]:
        """What training starts from; pretrained weights and the user's own count by content."""
        return {"images": self.images.training_digest, "start": tensor_digest(self._initial.state_dict()), "device": self.device.type}

    def training_path(self, moments: int = 6) -> zoo.TrainingPath:
        """See `zoo.training_path` (stage "training path")."""
        base = dataclasses.asdict(self.recipe.base)

        def compute(checkpoint):
            path = zoo.training_path(copy.deepcopy(self._initial), self.images, self.subset, moments, checkpoint=checkpoint,
                                     device=self.device, progress=self.progress, **base)
            return {**path._asdict(), "epochs": torch.tensor(path.epochs, dtype=torch.float64)}

        key = {**self._start, **base, "moments": moments, "names": self.subset.names, "images": self.images.digest}
        stage = self.store.stage("training path", key, compute, code=(zoo.training_path, zoo.train, capture, evaluate, *STEP))
        return zoo.TrainingPath(stage["epochs"].tolist(), stage["theta"], stage["accuracy"])

    @cached_property
    def net_digest(self) -> str:
        """Content digest of the trained network, running statistics included."""
        return tensor_digest(self.net.state_dict())

    @cached_property
    def zoo(self) -> zoo.Zoo:
        """The originals: one fine-tuning (stage "zoo", Table 5b) or a population (stage "population", Table 7); aligned, if
        that is asked for: of the same functions, with their units in the order of the first one's."""
        z = self._population() if self.independent else self._trajectory()
        if self.recipe.population.alignment == "none":
            return z
        return dataclasses.replace(z, theta=symmetry.align(z.theta, z.theta[0], self._symmetry))

    def _population(self) -> zoo.Zoo:
        return population.collect(self.images, self.recipe.zoo.k_checkpoints, store=self.store, device=self.device,
                                  progress=self.progress, **dataclasses.asdict(self.recipe.base))

    def _trajectory(self) -> zoo.Zoo:
        base, own = self.recipe.base, dataclasses.asdict(self.recipe.zoo)
        augmentation = {"seed": base.seed, "flip": base.flip, "crop_scale": base.crop_scale}

        def compute(checkpoint):
            z = zoo.collect(self.net, self.subset, self.images, checkpoint=checkpoint, device=self.device,
                            progress=self.progress, **own, **augmentation)
            return {"theta": z.theta, "losses": z.losses}

        key = {"images": self.images.training_digest, "net": self.net_digest, "device": self.device.type, **own, **augmentation}
        stage = self.store.stage("zoo", key, compute, code=(zoo.collect, *STEP))
        return zoo.Zoo(stage["theta"], self.subset.names, self.subset.shapes, stage["losses"])

    @cached_property
    def learned_from(self) -> Float[Tensor, "n D"]:
        """What methods are fitted to: the originals, then their randomly permuted copies (`permutations` of each)."""
        copies = self.recipe.population.permutations
        if not copies:
            return self.zoo.theta
        return symmetry.augment(self.zoo.theta, self._symmetry, copies, self.generator("permutations"))

    def fitted(self, name: str) -> Any:
        """A method, fitted to the zoo."""
        if name not in self.methods:
            raise ValueError(f"no method {name!r}: expected one of {', '.join(self.methods)}")
        if name not in self._fitted:
            method = self.methods[name]
            kept = {"store": self.store} if "store" in inspect.signature(method.fit).parameters else {}
            theta = self.learned_from
            fitted, seconds = self.store.spent(lambda: method.fit(theta, **kept) or method)
            self._fitted[name], self.seconds[name] = fitted, {"fit": seconds}
        return self._fitted[name]

    def generator(self, purpose: str) -> torch.Generator:
        """The random numbers for one purpose, always the same for one recipe."""
        return torch.Generator().manual_seed(training.seed_for(self.recipe.autoencoder.pdiff_seed, purpose))

    def theta(self, name: str) -> Float[Tensor, "M D"]:
        """The networks of a method: the originals, or `samples` new ones (one, of a method whose samples are all the same)."""
        if name == ORIGINAL:
            return self.zoo.theta
        if name not in self._theta:
            method = self.fitted(name)
            n = 1 if getattr(method, "single", False) else self.recipe.comparison.samples

            def compute(_checkpoint=None):
                return {"theta": method.sample(n, generator=self.generator(f"sample {name}"))}

            def sample():
                if not hasattr(method, "fingerprint"):
                    return compute()
                key = {"n": n, "name": name, "seed": self.recipe.autoencoder.pdiff_seed, **method.fingerprint}
                return self.store.stage("generated", key, compute, code=(type(method), *SAMPLED))

            stage, self.seconds[name]["sample"] = self.store.spent(sample)
            subset.check(stage["theta"], self.subset.numel)
            self._theta[name] = stage["theta"].cpu()
        return self._theta[name]

    @cached_property
    def evaluator(self) -> evaluate.Evaluator:
        """The trained network over the test images, captured once for all methods."""
        key = self.net_digest, self.subset.names, self.images.digest
        if key not in self._shared:
            self._shared[key] = evaluate.Evaluator(self.net, self.subset, self.images.x_test, prepare=self.images.prepare,
                                                   device=self.device, progress=self.progress)
        return self._shared[key]

    def predictions_of(self, theta: Float[Tensor, "M D"]) -> Integer[Tensor, "M N"]:
        """The class that any parameter vectors give to each test image (stage "predictions")."""
        dtype = torch.uint8 if self.images.num_classes <= 256 else torch.int16

        def compute(_checkpoint):
            return {"predictions": self.evaluator.predict(theta).to(dtype)}

        key = {"net": self.net_digest, "names": self.subset.names, "theta": tensor_digest(theta),
               "images": self.images.digest, "device": self.device.type}
        return self.store.stage("predictions", key, compute, code=(capture, evaluate))["predictions"]

    def predictions(self, name: str) -> Integer[Tensor, "M N"]:
        """The class that the networks of a method give to each test image."""
        if name not in self._predictions:
            self._predictions[name] = self.predictions_of(self.theta(name))
        return self._predictions[name]

    def wrong_of(self, theta: Float[Tensor, "M D"]) -> Bool[Tensor, "M N"]:
        """Which test images any parameter vectors get wrong."""
        return self.predictions_of(theta) != self.images.y_test.cpu()

    def wrong(self, name: str) -> Bool[Tensor, "M N"]:
        """Which test images the networks of a method get wrong."""
        return self.predictions(name) != self.images.y_test.cpu()

    def frame(self, names: list[str] | None = None) -> pd.DataFrame:
        """A row per network: method, index, accuracy, similarity to the originals and which is nearest.

        Columns: `method`, `index`, `accuracy` (fraction), `max_similarity` (Eq. 7), `nearest` (index of that original),
        `distance` (Euclidean, to the nearest original), `outside_span` (see `similarity.outside_span`).
        """
        return pd.concat([self.frame_of(name, self.theta(name)) for name in names or [ORIGINAL, *self.methods]], ignore_index=True)

    def frame_of(self, name: str, theta: Float[Tensor, "M D"]) -> pd.DataFrame:
        """The rows of `frame` for any parameter vectors under a name; `ORIGINAL`: an original is not compared with itself."""
        wrong, own = self.wrong_of(theta), name == ORIGINAL
        value, nearest = similarity.nearest(wrong, self.wrong(ORIGINAL), exclude_self=own)
        return pd.DataFrame({
            "method": name, "index": range(len(wrong)), "accuracy": evaluate.accuracy(wrong).numpy(),
            "max_similarity": value.numpy(), "nearest": nearest.numpy(),
            "distance": similarity.distance(theta, self.zoo.theta, exclude_self=own).numpy(),
            "outside_span": similarity.outside_span(theta, self.zoo.theta).numpy()})

    def summary(self, names: list[str] | None = None) -> pd.DataFrame:
        """A row per method: n, accuracy (mean, std, best; best on one half of the images, reported on the other), and
        the means of the three measures of novelty."""
        frame = self.frame(names)
        novelty = frame.groupby("method", sort=False)[["max_similarity", "distance", "outside_span"]].mean()
        accuracy = {name: evaluate.summary(self.wrong(name)) for name in novelty.index}
        return pd.DataFrame.from_dict(accuracy, orient="index").join(novelty).rename_axis("method")
