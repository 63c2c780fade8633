"""The first half of a recipe: its task, the network trained for it, and the originals.

Nothing is computed before it is asked for, and nothing twice: each stage is kept under the digest of what it depends on.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pdiff_lib import zoos
from pdiff_lib.base import training
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store, tensor_digest
from pdiff_lib.generators import methods
from pdiff_lib.networks import subset, symmetry
from pdiff_lib.tasks import task
from pdiff_lib.zoos import population

ORIGINAL = "original"


class Originals:
    """Task, network and originals of a recipe, computed when first asked for.

    Construction loads the data, creates the network and selects the subset: whatever is wrong with the recipe is said
    here, before any long work. Arguments and errors as for `experiment.Experiment`.
    """

    def __init__(self, recipe: Recipe, store: Store | None = None, device: str | None = None, progress: bool = True,
                 shared: dict[Any, Any] | None = None):
        self.recipe, self.progress, self.device = recipe, progress, training.device_of(device)
        self.store = store or Store()
        self.store.device = self.store.device or self.device  # what its records name, beyond "cuda"
        self._shared = {} if shared is None else shared
        if recipe.data not in self._shared:
            self._shared[recipe.data] = task.of(recipe.data)
        self.task: task.Task = self._shared[recipe.data]
        self._initial = self.task.network(recipe.base)
        self.task.check(self._initial)
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
        return (f"{r.base.network}, {self.task.title}, {r.zoo.subset}, "
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
                losses = zoos.train(net, self.task, checkpoint=checkpoint, device=self.device, progress=self.progress, **base)
                return {"losses": losses, **net.state_dict(prefix="net.")}

            stage = self.store.stage("network", {**self._start, **base}, compute, code=(zoos.train, *self.task.code))
            net.load_state_dict({k.removeprefix("net."): v for k, v in stage.items() if k.startswith("net.")})
            self.training_losses = stage["losses"]
        return net.to(self.device).eval(), tensor_digest(net.state_dict())

    def _net_as_it_was(self) -> nn.Module:
        if tensor_digest(self.net.state_dict()) != self.net_digest:
            raise ValueError("the trained network was changed in place: expected it as it was handed out; work on a copy "
                             "(copy.deepcopy), and make this Experiment again")
        return self.net

    def _judge_start(self) -> None:
        """Say how good the weights are that were given, once for all experiments that share."""
        base = self.recipe.base
        if not base.weights and (not base.pretrained or base.base_epochs):
            return  # random, or about to get a head
        key = {**self._start, "images": self.task.digest}
        if ("start", *key.values()) not in self._shared:
            stage = self.store.stage("start", key, lambda _: self.task.start(self._initial, self.subset, self.device),
                                     code=self.task.judging)
            self._shared["start", *key.values()] = stage
            self.task.say_start(stage, f"weights {base.weights!r}" if base.weights else f"published weights of {base.network}")

    @property
    def _start(self) -> dict[str, str]:
        """What training starts from; pretrained weights and the user's own count by content."""
        return {"images": self.task.training_digest, "start": tensor_digest(self._initial.state_dict()),
                "device": self.device.type}

    def training_path(self, moments: int = 6) -> zoos.TrainingPath:
        """See `zoos.training_path` (stage "training path")."""
        self._judge_start()
        base = dataclasses.asdict(self.recipe.base)

        def compute(checkpoint):
            path = zoos.training_path(copy.deepcopy(self._initial), self.task, self.subset, moments, checkpoint=checkpoint,
                                     device=self.device, progress=self.progress, **base)
            return {**path._asdict(), "epochs": torch.tensor(path.epochs, dtype=torch.float64)}

        key = {**self._start, **base, "moments": moments, "names": self.subset.names, "images": self.task.digest}
        stage = self.store.stage("training path", key, compute, code=(zoos.training_path, zoos.train, *self.task.judging, *self.task.code))
        return zoos.TrainingPath(stage["epochs"].tolist(), stage["theta"], stage["accuracy"])

    @cached_property
    def zoo(self) -> zoos.Zoo:
        """The originals: one fine-tuning (stage "zoo", Table 5b) or a population (stage "population", Table 7); aligned, if
        that is asked for: of the same functions, with their units in the order of the first one's."""
        z = self._population() if self.independent else self._trajectory()
        if self.recipe.population.alignment != "none":
            z = dataclasses.replace(z, theta=symmetry.align(z.theta, z.theta[0], self._symmetry))
        self._kept.keep(ORIGINAL, z.theta)  # from here on it is everybody's
        return z

    def _rehearse(self) -> None:
        self.task.rehearse(self._initial, self.subset, self.device)

    def _population(self) -> zoos.Zoo:
        self._rehearse()
        return population.collect(self.task, self.recipe.zoo.k_checkpoints, store=self.store, device=self.device,
                                  progress=self.progress, **dataclasses.asdict(self.recipe.base))

    def _trajectory(self) -> zoos.Zoo:
        base, own = self.recipe.base, dataclasses.asdict(self.recipe.zoo)
        augmentation = {"seed": base.seed, "flip": base.flip, "crop_scale": base.crop_scale}

        def compute(checkpoint):
            z = zoos.collect(self._net_as_it_was(), self.subset, self.task, checkpoint=checkpoint, device=self.device,
                            progress=self.progress, **own, **augmentation)
            return {"theta": z.theta, "losses": z.losses}

        key = {"images": self.task.training_digest, "net": self.net_digest, "device": self.device.type, **own,
               **augmentation}
        stage = self.store.stage("zoo", key, compute, code=(zoos.collect, *self.task.code))
        return zoos.Zoo(stage["theta"], self.subset.names, self.subset.shapes, stage["losses"])
