"""The first half of a recipe: its task, the network trained for it, and the originals.

Nothing is computed before it is asked for, and nothing twice: each stage is kept under the digest of what it depends on.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdiff_lib import networks, zoos
from pdiff_lib.base import inputs, own, training, vectors
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store, tensor_digest
from pdiff_lib.generators import methods
from pdiff_lib.networks import recalibrate, subset, symmetry, weights
from pdiff_lib.tasks import task
from pdiff_lib.zoos import checkpoints, population

ORIGINAL = "original"


class Originals:
    """Task, network and originals of a recipe, computed when first asked for.

    Construction loads the data, creates the network and selects the subset: whatever is wrong with the recipe is said
    here, before any long work. Arguments and errors as for `experiment.Experiment`.

    Attributes:
        files: the user's own checkpoints, in order; none: the originals are trained here.
        subset: what the vectors hold.
        evaluated: that, with the running statistics, where these are computed anew for each network (`complete`).
    """

    def __init__(self, recipe: Recipe, store: Store | None = None, device: str | None = None, progress: bool = True,
                 shared: dict[Any, Any] | None = None):
        self.recipe, self.progress, self.device = recipe, progress, training.device_of(device)
        self.store = store or Store()
        self.store.device = self.store.device or self.device  # what its records name, beyond "cuda"
        self._shared = {} if shared is None else shared
        if recipe.data not in self._shared:
            self._shared[recipe.data] = task.of(recipe.data, self.store)
        self.files = own.find(recipe.own.checkpoints) if recipe.own.checkpoints else []
        self.task: task.Task = self._shared[recipe.data]
        base = dataclasses.replace(recipe.base, pretrained=recipe.base.pretrained and not self.files)
        self._initial = self.task.network(base)
        self.task = self._scaled()
        self.task.check(self._initial)
        self.subset = self.evaluated = subset.select(self._initial, recipe.zoo.subset)
        if recipe.own.buffers != "network":
            self.evaluated = subset.with_statistics(self._initial, self.subset)
            self.subset = self.evaluated if recipe.own.buffers == "checkpoint" else self.subset
        self._check_population()
        self._kept = methods.Kept()

    def _scaled(self) -> task.Task:
        """The task at the network's input scale."""
        r, scale = self.recipe, (self.recipe.own.input_mean, self.recipe.own.input_std)
        if scale == ((), ()) and r.base.pretrained and hasattr(self._initial, "pretrained_cfg"):
            scale = tuple(tuple(self._initial.pretrained_cfg[name]) for name in ("mean", "std"))
        if scale != ((), ()) and (r.data, scale) not in self._shared:
            self._shared[r.data, scale] = self.task.scaled(*scale)
        return self._shared.get((r.data, scale), self.task)

    def _check_population(self) -> None:
        p = self.recipe.population
        if self.independent and self.files:
            raise ValueError(f"zoo_mode is 'independent' with checkpoints {self.recipe.own.checkpoints!r}: expected 'trajectory', "
                             "as nothing is trained here (alignment can be asked for all the same)")
        if self.independent and self.recipe.zoo.subset != "all":
            raise ValueError(f"subset is {self.recipe.zoo.subset!r} with zoo_mode 'independent': expected 'all', as networks "
                             "that are trained independently share no parameters")
        if not self.independent and p.zoo_start != "independent":
            raise ValueError(f"zoo_start is {p.zoo_start!r} with zoo_mode 'trajectory': expected 'independent', as one network is trained")
        if not self.independent and self.task.of_members([0]) is not self.task:
            raise ValueError(f"zoo_mode is 'trajectory' with task {self.recipe.data.task!r}: expected 'independent', and no checkpoints, as "
                             "each network has an object of its own")
        if self.independent:
            population.check(self._initial, self.recipe.base)
            self.task.of_members([self.k - 1])  # or there are not so many
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
        start = r.population.zoo_start
        kind = "" if not self.independent else " independent" if start == "independent" else f" {population.KINDS[start]}"
        return (f"{r.base.network}, {self.task.title}, {r.zoo.subset}, "
                f"D = {self.subset.numel:,}, K = {self.k}{kind}{' own checkpoints' * bool(self.files)}"
                f"{', aligned' * (r.population.alignment != 'none')}{self.statistics and f', running statistics {self.statistics}'}")

    @property
    def k(self) -> int:
        """K, how many originals there are."""
        return len(self.files) or self.recipe.zoo.k_checkpoints

    @property
    def statistics(self) -> str:
        """With which running statistics networks are evaluated, in words; "" where it is as in the paper, or there are none."""
        if self.recipe.own.buffers == "recalibrate":
            return f"recalibrated on {len(self._recalibration)} training items"
        if self.recipe.own.buffers == "checkpoint":
            return "in the vectors"
        return "of the trained network" if self.files and subset.statistics(self._initial).names else ""

    @cached_property
    def _recalibration(self) -> Tensor:
        """Which training items running statistics are computed from."""
        generator = torch.Generator().manual_seed(self.recipe.data.data_seed)
        return torch.randperm(len(self.task.x_train), generator=generator)[:self.recipe.own.recalibrate_images]

    def complete(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M E"]:
        """Vectors of `evaluated`: themselves, or with their running statistics computed anew (stage "recalibrated")."""
        theta = vectors.vectors(theta, self.subset.numel)
        if self.evaluated == self.subset:
            return theta
        key = {"net": self.net_digest, "names": self.subset.names, "theta": tensor_digest(theta), "device": self.device.type,
               "images": self.task.training_digest, "which": tensor_digest(self._recalibration)}

        def compute(_checkpoint):
            x = self.task.x_train[self._recalibration]
            return {"theta": recalibrate.recalibrated(self._net_as_it_was(), self.subset, theta, x, prepare=self.task.prepared,
                                                      device=self.device, progress=self.progress)}

        return self.store.stage("recalibrated", key, compute, code=(recalibrate,))["theta"]

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
        if self.files:
            checkpoints.surround(net, self.subset, self._checkpoints)
        elif not self.independent:
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
        return net.to(self.device).eval(), self._digest(net)

    def _digest(self, net: nn.Module) -> str:
        """By content: its numbers, and its code where that is the user's own."""
        return "-".join([tensor_digest(net.state_dict()), *networks.code_key(self.recipe.base.network).values()])

    @cached_property
    def _checkpoints(self) -> checkpoints.Checkpoints:
        """What the user's files hold (stage "checkpoints")."""
        part = bool(self.recipe.base.weights)
        free = subset.statistics(self._initial).names if part or self.recipe.own.buffers == "recalibrate" else ()

        def compute(_checkpoint):
            self._rehearse()
            found = checkpoints.read(self.files, self._initial, self.subset, whole=not part, free=free,
                                     progress=self.progress)
            return {"theta": found.theta, **{f"around.{k}": v for k, v in found.around.items()}}

        key = {"files": [inputs.digest(p.resolve()) for p in self.files], "names": self.subset.names, "free": free, "whole": not part,
               "network": {k: list(v.shape) for k, v in self._initial.state_dict().items()}}
        stage = self.store.stage("checkpoints", key, compute, code=(checkpoints, weights))
        return checkpoints.Checkpoints(stage.pop("theta"), {k.removeprefix("around."): v for k, v in stage.items()})

    def _net_as_it_was(self) -> nn.Module:
        if self._digest(self.net) != self.net_digest:
            raise ValueError("the trained network was changed in place: expected it as it was handed out; work on a copy "
                             "(copy.deepcopy), and make this Experiment again")
        return self.net

    def _judge_start(self) -> None:
        """Say how good the weights are that were given."""
        base = self.recipe.base
        if getattr(self._initial, "new_head", False):
            return  # nothing to say before it is trained
        if base.weights or (base.pretrained and not base.base_epochs):  # else random, or about to get a head
            self._judge(self._start, self._initial, f"weights {base.weights!r}" if base.weights else f"published weights of {base.network}")

    def _judge(self, key: dict[str, str], net: nn.Module, source: str) -> None:
        """Say how good a network is that was given, once for all experiments that share."""
        key = {**key, "images": self.task.digest}
        if ("start", *key.values()) not in self._shared:
            stage = self.store.stage("start", key, lambda _: self.task.start(net, self.subset, self.device), code=self.task.judging)
            self._shared["start", *key.values()] = stage
            self.task.say_start(stage, source)

    @property
    def _start(self) -> dict[str, str]:
        """What training starts from; pretrained weights and the user's own count by content."""
        return {"images": self.task.training_digest, "start": self._digest(self._initial),
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
        """The originals: one fine-tuning (stage "zoo", Table 5b), a population (stage "population", Table 7) or the user's own
        checkpoints; aligned, if that is asked for: of the same functions, with their units in the order of the first one's."""
        z = self._given() if self.files else self._population() if self.independent else self._trajectory()
        if self.recipe.population.alignment != "none":
            z = dataclasses.replace(z, theta=symmetry.align(z.theta, z.theta[0], self._symmetry))
        self._kept.keep(ORIGINAL, z.theta)  # from here on it is everybody's
        return z

    def _rehearse(self) -> None:
        self.task.rehearse(self._initial, self.evaluated, self.device)
        if self.evaluated != self.subset:
            try:
                recalibrate.recalibrated(self._initial, self.subset, self.subset.flatten(self._initial)[None], self.task.x_train[:2],
                                         prepare=self.task.prepared, device=self.device)
            except Exception as error:
                raise ValueError(f"buffers is 'recalibrate', which calls the network in training mode with inputs alone: {self.recipe.base.network} "
                                 f"of task {self.recipe.data.task!r} says {str(error)[:200]!r}; expected 'network' or 'checkpoint'") from error

    def _given(self) -> zoos.Zoo:
        theta = self._checkpoints.theta
        last = self.complete(theta[-1:])[0]
        self._judge({"net": self.net_digest, "theta": tensor_digest(last)}, self.evaluated.load(networks.copied(self.net), last),
                    f"checkpoint {self.files[-1].name!r}, the last of {self.k}")
        return zoos.Zoo(theta, self.subset.names, self.subset.shapes, torch.empty(0))

    def _population(self) -> zoos.Zoo:
        self._rehearse()
        return population.collect(self.task, self.recipe.zoo.k_checkpoints, start=self.recipe.population.zoo_start, store=self.store,
                                  device=self.device, progress=self.progress, **dataclasses.asdict(self.recipe.base))

    def _trajectory(self) -> zoos.Zoo:
        base, settings = self.recipe.base, dataclasses.asdict(self.recipe.zoo)
        augmentation = {"seed": base.seed, "flip": base.flip, "crop_scale": base.crop_scale}

        def compute(checkpoint):
            z = zoos.collect(self._net_as_it_was(), self.subset, self.task, checkpoint=checkpoint, device=self.device,
                            progress=self.progress, **settings, **augmentation)
            return {"theta": z.theta, "losses": z.losses}

        key = {"images": self.task.training_digest, "net": self.net_digest, "device": self.device.type, **settings,
               **augmentation, **({"names": self.subset.names} if self.recipe.own.buffers == "checkpoint" else {})}
        stage = self.store.stage("zoo", key, compute, code=(zoos.collect, *self.task.code))
        return zoos.Zoo(stage["theta"], self.subset.names, self.subset.shapes, stage["losses"])
