"""The first half of a recipe: its images, the network trained on them, and the originals.

Nothing is computed before it is asked for, and nothing twice: each stage is kept under the digest of what it depends on.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pdiff_lib import capture, data, evaluate, methods, networks, population, subset, symmetry, training, weights, zoo
from pdiff_lib.recipe import Recipe, short
from pdiff_lib.runs import Store, tensor_digest

ORIGINAL = "original"
# The code of one training step.
STEP = (zoo.Feed, zoo._classification, data.Images.augment, data.Images.augment_many, data._random_crop, data.epoch_order, training)


class Originals:
    """Images, network and originals of a recipe, computed when first asked for.

    Construction loads the images, creates the network and selects the subset: whatever is wrong with the recipe is said
    here, before any long work. Arguments and errors as for `experiment.Experiment`.
    """

    def __init__(self, recipe: Recipe, store: Store | None = None, device: str | None = None, progress: bool = True,
                 shared: dict[Any, Any] | None = None):
        self.recipe, self.progress, self.device = recipe, progress, training.device_of(device)
        self.store = store or Store()
        self.store.device = self.store.device or self.device  # what its records name, beyond "cuda"
        self._shared = {} if shared is None else shared
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
        self._kept = methods.Kept()

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
        return (f"{r.base.network}, {short(r.data.dataset)} at {self.images.size} px, {r.zoo.subset}, "
                f"D = {self.subset.numel:,}, K = {r.zoo.k_checkpoints}{' independent' * self.independent}"
                f"{', aligned' * (r.population.alignment != 'none')}")

    @property
    def net(self) -> nn.Module:
        """The trained network, in eval mode (stage "network", Table 5a).

        With independent originals: the initial one, in which any of them can be evaluated (it has no running statistics)."""
        return self._net[0]

    @property
    def net_digest(self) -> str:
        """Content digest of the trained network, running statistics included, as it was before anybody had it."""
        return self._net[1]

    @cached_property
    def _net(self) -> tuple[nn.Module, str]:
        net = copy.deepcopy(self._initial)
        if not self.independent:
            self._judge_start()
            base = dataclasses.asdict(self.recipe.base)

            def compute(checkpoint):
                self._rehearse()
                net = copy.deepcopy(self._initial).to(self.device)
                losses = zoo.train(net, self.images, checkpoint=checkpoint, device=self.device, progress=self.progress, **base)
                return {"losses": losses, **net.state_dict(prefix="net.")}

            stage = self.store.stage("network", {**self._start, **base}, compute, code=(zoo.train, *STEP))
            net.load_state_dict({k.removeprefix("net."): v for k, v in stage.items() if k.startswith("net.")})
            self.training_losses = stage["losses"]
        return net.to(self.device).eval(), tensor_digest(net.state_dict())

    def _net_as_it_was(self) -> nn.Module:
        if tensor_digest(self.net.state_dict()) != self.net_digest:
            raise ValueError("the trained network was changed in place: expected it as it was handed out; work on a copy "
                             "(copy.deepcopy), and make this Experiment again")
        return self.net

    def _judge_start(self) -> None:
        """Say how good the weights are that were given: on at most 1000 test images, once for all experiments that share."""
        base, y = self.recipe.base, self.images.y_test
        if not base.weights and (not base.pretrained or base.base_epochs):
            return  # random, or about to get a head
        key = {**self._start, "images": self.images.digest}

        def compute(_checkpoint=None):
            pick = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:1000]  # stored by class, often
            theta, x = self.subset.flatten(self._initial)[None], self.images.x_test[pick]
            wrong = evaluate.wrong(self._initial, self.subset, theta, x, y[pick], prepare=self.images.prepare,
                                   device=self.device)
            return {"right": (~wrong).sum(), "images": torch.tensor(len(pick))}

        if ("start", *key.values()) not in self._shared:
            stage = self.store.stage("start", key, compute, code=(capture, evaluate))
            self._shared["start", *key.values()] = stage
            weights.judge(int(stage["right"]), int(stage["images"]), float(y.bincount().max() / len(y)),
                          f"weights {base.weights!r}" if base.weights else f"published weights of {base.network}")

    @property
    def _start(self) -> dict[str, str]:
        """What training starts from; pretrained weights and the user's own count by content."""
        return {"images": self.images.training_digest, "start": tensor_digest(self._initial.state_dict()),
                "device": self.device.type}

    def training_path(self, moments: int = 6) -> zoo.TrainingPath:
        """See `zoo.training_path` (stage "training path")."""
        self._judge_start()
        base = dataclasses.asdict(self.recipe.base)

        def compute(checkpoint):
            path = zoo.training_path(copy.deepcopy(self._initial), self.images, self.subset, moments, checkpoint=checkpoint,
                                     device=self.device, progress=self.progress, **base)
            return {**path._asdict(), "epochs": torch.tensor(path.epochs, dtype=torch.float64)}

        key = {**self._start, **base, "moments": moments, "names": self.subset.names, "images": self.images.digest}
        stage = self.store.stage("training path", key, compute, code=(zoo.training_path, zoo.train, capture, evaluate, *STEP))
        return zoo.TrainingPath(stage["epochs"].tolist(), stage["theta"], stage["accuracy"])

    @cached_property
    def zoo(self) -> zoo.Zoo:
        """The originals: one fine-tuning (stage "zoo", Table 5b) or a population (stage "population", Table 7); aligned, if
        that is asked for: of the same functions, with their units in the order of the first one's."""
        z = self._population() if self.independent else self._trajectory()
        if self.recipe.population.alignment != "none":
            z = dataclasses.replace(z, theta=symmetry.align(z.theta, z.theta[0], self._symmetry))
        self._kept.keep(ORIGINAL, z.theta)  # from here on it is everybody's
        return z

    def _rehearse(self) -> None:
        evaluate.rehearse(self._initial, self.subset, (self.images.channels, self.images.size, self.images.size), self.device)

    def _population(self) -> zoo.Zoo:
        self._rehearse()
        return population.collect(self.images, self.recipe.zoo.k_checkpoints, store=self.store, device=self.device,
                                  progress=self.progress, **dataclasses.asdict(self.recipe.base))

    def _trajectory(self) -> zoo.Zoo:
        base, own = self.recipe.base, dataclasses.asdict(self.recipe.zoo)
        augmentation = {"seed": base.seed, "flip": base.flip, "crop_scale": base.crop_scale}

        def compute(checkpoint):
            z = zoo.collect(self._net_as_it_was(), self.subset, self.images, checkpoint=checkpoint, device=self.device,
                            progress=self.progress, **own, **augmentation)
            return {"theta": z.theta, "losses": z.losses}

        key = {"images": self.images.training_digest, "net": self.net_digest, "device": self.device.type, **own,
               **augmentation}
        stage = self.store.stage("zoo", key, compute, code=(zoo.collect, *STEP))
        return zoo.Zoo(stage["theta"], self.subset.names, self.subset.shapes, stage["losses"])
