"""Who enters the arena: every generator by name, at the sizes of a CPU, and the baselines whose frontier it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pdiff_lib.base import recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.generators import baselines, coded, equivariant, flow, gpt, hyperdiffusion, rpg, sane
from pdiff_lib.networks import symmetry
from pdiff_lib.zoos.paths import Paths
from pdiff_lib.zoos.zoo import Zoo

Settings = Mapping[str, Mapping[str, Any]]
COOLER = (0.7, 0.4)  # temperatures at which flows are sampled as well
# Settings of each kind of generator that are named; where none are, its own defaults.
FAMILIES = {"p-diff": None, "flow": flow.Flow, "unit flow": equivariant.UnitFlow, "SANE": sane.SANE, "hyper-rep": sane.HyperRep,
            "RPG": rpg.RPG, "HyperDiffusion": hyperdiffusion.HyperDiffusion, "G.pt": gpt.GPT}


def frontier(sizes: Sequence[int], k: int) -> dict[str, Any]:
    """The baselines, each at several strengths: what a generator has to lie above at equal distance.

    Args:
        sizes: lengths of the tensors in a vector.
        k: how many originals there are; soups are of no more, and principal components fewer.
    """
    return {**{f"interpolation {at:g}": baselines.Interpolation(at) for at in (0.1, 0.2, 0.3, 0.4, 0.5)},
            **{f"soup of {size}": baselines.SubsetAverage(size) for size in (4, 16) if size <= k},
            **{f"gaussian {scale:g}": baselines.Gaussian(scale) for scale in (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)},
            **{f"noise {scale:g}": baselines.Noise(scale, sizes) for scale in (0.1, 0.3, 0.5, 1.0, 2.0)},
            **{f"SWAG {scale:g}": baselines.SWAG(scale=scale) for scale in (0.5, 1.0)},
            "PCA-Gaussian": coded.Coded(baselines.Gaussian(), coded.PCA(min(32, k - 1)))}


class Entrants(Experiment):
    """An `Experiment` on originals that are given, with the methods of the arena.

    Args:
        recipe: its `k_checkpoints` and `pdiff_seed` are those of the originals that are given, and of the generators.
        given: gives [K D], the originals, when they are needed.
        settings: of each family of `FAMILIES`, by name; "p-diff": those of a recipe.
        more: methods beside them, by name, each made by a function of the seed.
        judge: [m D] -> [m], how good networks are on validation items; what SANE and hyper-representations choose by.
        others: as for `Experiment`.

    Raises:
        ValueError: an unknown family or setting, or what `Experiment` and the generators refuse.
    """

    def __init__(self, recipe: recipe.Recipe, given: Callable[[], Float[Tensor, "K D"]], settings: Settings,
                 more: Mapping[str, Callable[[int], Any]], judge: Callable[[Tensor], Tensor], **others: Any):
        self._theta, self._settings, self._more, self._judge = given, check(settings), more, judge
        super().__init__(recipe, **others)

    @cached_property
    def zoo(self) -> Zoo:
        """The originals."""
        z = Zoo(self._theta(), self.subset.names, self.subset.shapes, torch.empty(0))
        self._kept.keep(ORIGINAL, z.theta)
        return z

    @property
    def units(self) -> symmetry.Groups | None:
        """`symmetry.groups` of the network; None where its units have no order of their own that is understood."""
        return units_of(self)

    def _methods(self) -> dict[str, Any]:
        given, seed, groups = self._settings, self.recipe.autoencoder.pdiff_seed, self.units
        own = {"device": self.device, "progress": self.progress}
        # Units of one training, or from a common start, are the same ones in all networks.
        usual = {} if self.independent and self.recipe.population.zoo_start == "independent" else {"unit flow": {"places": "learned"}}

        def made(family: str, *arguments: Any, **other: Any) -> Any:
            return FAMILIES[family](*arguments, **own, **{"generator_seed": seed, **usual.get(family, {}), **given.get(family, {}), **other})

        sizes, shapes = self.subset.sizes, self.subset.shapes
        hyper = [(f"{family} {sampling}{', one seed' * (dimensions == 'fixed')}", family, {"sampling": sampling, "dimensions": dimensions})
                 for family, sampling, dimensions in (
                     ("hyper-rep", "KDE30", "fixed"), ("hyper-rep", "KDE30", "independent"), ("SANE", "KDE30", "fixed"),
                     ("SANE", "KDE30", "independent"), ("SANE", "SUB", "independent"), ("SANE", "BOOT", "independent"))]
        return {"copy": baselines.Copy(), "average": baselines.WeightAverage(), **frontier(sizes, self.k),
                PDIFF: self.pdiff(**given.get(PDIFF, {})),
                "flow": made("flow", sizes), **{f"flow {t:g}": made("flow", sizes, temperature=t) for t in COOLER},
                **({"unit flow": made("unit flow", sizes, groups),
                    **{f"unit flow {t:g}": made("unit flow", sizes, groups, temperature=t) for t in COOLER}} if groups else {}),
                **{name: made(family, shapes, groups, self._judge, **how) for name, family, how in hyper},
                "RPG": made("RPG", sizes), "RPG, prototype alone": made("RPG", sizes, prototype_only=True),
                "HyperDiffusion": made("HyperDiffusion", sizes),
                **{name: make(seed) for name, make in self._more.items()}}


class Prompted:
    """G.pt as a generator like the others: learns from training paths, not from the originals themselves, and gives one step from
    networks that it has not seen, asked for the lowest loss in its data.

    Args:
        generator: not fitted.
        paths: gives what it learns from.
        starts: n -> as many networks to start from [n D], and their losses [n].
    """

    def __init__(self, generator: gpt.GPT, paths: Callable[[], Paths], starts: Callable[[int], tuple[Tensor, Tensor]]):
        self.generator, self._paths, self._starts = generator, paths, starts

    def fit(self, theta: Float[Tensor, "K D"], store: Store | None = None) -> Prompted:
        """Fit it to the paths."""
        paths = self._paths()
        self.asked = float(paths.loss.min())
        self.generator.fit_paths(paths.theta, paths.loss, store)
        return self

    @property
    def code(self) -> tuple[Any, ...]:
        """As of the generator."""
        return self.generator.code

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the generator, and what it is asked for."""
        return {**self.generator.fingerprint, "asked": self.asked}

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n D"]:
        """One step from n networks."""
        return self.generator.step(*self._starts(n), self.asked, generator)


def units_of(experiment: Experiment) -> symmetry.Groups | None:
    """As `Entrants.units`, of any experiment."""
    try:
        return symmetry.groups(experiment._initial, experiment.subset)
    except ValueError:
        return None


def check(settings: Settings) -> Settings:
    """Refuse settings of a family that does not exist; those of the generators are checked where they are made.

    Raises:
        ValueError: names it and the nearest one that does.
    """
    for family in settings:
        if family not in FAMILIES:
            raise ValueError(recipe.unknown("family of generators", family, FAMILIES))
    return settings


def prompted(e: Experiment, seed: int, settings: Settings, paths: Callable[[], Paths], starts: Callable[[int], tuple[Tensor, Tensor]]) -> Prompted:
    """G.pt for the networks of an experiment: without its augmentation by permutations, which takes far longer to train than a CPU
    allows for."""
    made = gpt.GPT(e.subset.sizes, e.device, e.progress, **{"generator_seed": seed, **settings.get("G.pt", {})})
    return Prompted(made, paths, starts)
