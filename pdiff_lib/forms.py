"""Fields as forms: the pictures and bodies that networks of `tasks.fields` are, against real objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pdiff_lib.arena import HELD_OUT, Arena
from pdiff_lib.base import training, vectors
from pdiff_lib.base.runs import tensor_digest
from pdiff_lib.measures import novelty, shapes
from pdiff_lib.networks import implicit, surfaces
from pdiff_lib.networks.modes import evaluating
from pdiff_lib.tasks.fields import Fields
from pdiff_lib.tasks.objects import THRESHOLD

CELLS = {2: 28, 3: 32}  # along an axis
POINTS = 1024  # on a surface
TRAINING = "training object"
AT_ONCE, NETWORKS = 2**14, 8  # points that so many networks are asked for together: bounds memory


class Forms:
    """What the networks of an arena look like, and how they stand to real objects.

    The **distance** of two forms: of glyphs 1 - IoU at the task's test points; of grey pictures the root of their mean squared
    difference there; of bodies the Chamfer distance of points on their surfaces, by marching cubes on a grid, of real ones likewise.

    Args:
        arena: its task is `fields.Fields`.
        cells: of the grid and of pictures, along an axis; 0: `CELLS`.
        points: on each surface (HyperDiffusion: 2,048).
        up: the axis of bodies that points up in pictures, 1 (y) or 2 (z).
        references: the first so many test objects are what generated forms are compared with; 0: as many as a method has samples.

    Raises:
        ValueError: an arena of another task, another axis, or more references than test objects.
    """

    def __init__(self, arena: Arena, cells: int = 0, points: int = POINTS, up: int = 1, references: int = 0):
        self.task: Fields = arena.experiment.task
        if not isinstance(self.task, Fields):
            raise ValueError(f"an arena with task {arena.recipe.data.task!r}: expected 'fields'")
        self.arena, self.objects, self.d = arena, self.task.objects, self.task.objects.d
        if up not in (1, 2):
            raise ValueError(f"up is {up}: expected 1 (y) or 2 (z)")
        self.cells, self.points, self.up = cells or CELLS[self.d], points, up
        there = len(self.objects) - self.objects.fitted
        if references > there:
            raise ValueError(f"references = {references}: expected at most the {there} test objects of {self.objects.name}")
        count = references or min(arena.recipe.comparison.samples, there)
        self.references = torch.arange(self.objects.fitted, self.objects.fitted + count)
        self._known: dict[tuple[str, str, int], tuple[Tensor, shapes.Outcomes]] = {}

    # ---------------------------------------------------------------- to look at

    @torch.no_grad()
    def at(self, theta: Float[Tensor, "M D"], points: Float[Tensor, "p d"]) -> Float[Tensor, "M p"]:
        """What networks give at any points: grey values, or probabilities of being inside."""
        e = self.arena.experiment
        theta, net = vectors.vectors(theta, e.subset.numel, device=e.device), e._initial
        state = {name: t.detach().to(e.device) for name, t in (*net.named_parameters(), *net.named_buffers())}

        def one(vector: Tensor, part: Tensor) -> Tensor:
            return torch.func.functional_call(net, {**state, **e.subset.unflatten(vector)}, (part,))[..., 0]

        found = torch.empty(len(theta), len(points))
        with evaluating(net), training.precision(torch.device(e.device)):
            for i, few in enumerate(theta.split(NETWORKS)):
                # Filled up, so that equal vectors give equal numbers; `predict` fills up to 64, for nothing where a few are drawn.
                filled = torch.cat([few, few[-1:].expand(NETWORKS - len(few), -1)])
                for j, part in enumerate(points.to(e.device).split(AT_ONCE)):
                    given = torch.func.vmap(one, in_dims=(0, None))(filled, part)[:len(few)]
                    found[i * NETWORKS:i * NETWORKS + len(few), j * AT_ONCE:j * AT_ONCE + len(part)] = given
        return found if self.task.kind == "grey" else found.sigmoid()

    def values(self, theta: Float[Tensor, "M D"], cells: int = 0) -> Float[Tensor, "M ..."]:
        """`at` on the grid: [M cells cells] of pictures, rows from the top; [M cells cells cells] of bodies, (x, y, z)."""
        cells = cells or self.cells
        return self.at(theta, implicit.raster(cells, self.d)).unflatten(1, [cells] * self.d)

    def real(self, rows: Sequence[int] | Tensor, cells: int = 0) -> Float[Tensor, "n ..."]:
        """As `values`, of real objects themselves."""
        cells = cells or self.cells
        return self.objects.look([int(i) for i in rows], implicit.raster(cells, self.d)).unflatten(1, [cells] * self.d)

    def pictures(self, values: Float[Tensor, "M ..."]) -> Float[Tensor, "M h w"]:
        """Brightness from 0 to 1 of what `values` or `real` gave: as they are, or bodies lit (`surfaces.seen`; NaN beside them)."""
        return values.clamp(0, 1) if self.d == 2 else surfaces.seen(values, THRESHOLD, self.up)

    # ---------------------------------------------------------------- to measure

    def distance(self, a: Tensor, b: Tensor) -> Float[Tensor, "M N"]:
        """Of all pairs of forms as `form_of` and `real_forms` give them."""
        if self.d == 3:
            return shapes.chamfer(a, b)
        if self.task.kind == "grey":
            return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[1] ** 0.5
        return 1 - shapes.iou(a, b)

    def _kept(self, a: Tensor, b: Tensor) -> Float[Tensor, "M N"]:
        """`distance`; that of bodies, whose trees take longer than all else here, once (stage "forms")."""
        if self.d == 2:
            return self.distance(a, b)
        return self.arena.experiment.store.stage("forms", {"a": tensor_digest(a), "b": tensor_digest(b)}, lambda _: {
            "distance": self.distance(a, b)}, code=(shapes,))["distance"]

    def form_of(self, theta: Float[Tensor, "M D"]) -> tuple[Tensor, shapes.Outcomes]:
        """Forms of networks, and what became of each; of those that are none the rows mean nothing."""
        if self.d == 3:
            return self._surfaces(self.values(theta))
        given = self.arena.experiment.predictions_of(theta)[..., 0]
        if self.task.kind == "grey":  # a picture may be all of one grey
            none = torch.zeros(len(given), dtype=torch.bool)
            return given, shapes.Outcomes(none, none, ~torch.isfinite(given).all(dim=1))
        return given > 0, shapes.outcomes(given, level=0.0)

    def real_forms(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Forms of real objects."""
        return self._surfaces(self.real(rows))[0] if self.d == 3 else self.objects.test_values[torch.as_tensor(rows)]

    def _surfaces(self, values: Float[Tensor, "M s s s"]) -> tuple[Float[Tensor, "M P 3"], shapes.Outcomes]:
        became = shapes.outcomes(values.flatten(1), level=THRESHOLD)
        found = torch.full((len(values), self.points, 3), torch.nan)
        generator = torch.Generator().manual_seed(training.seed_for(self.arena.recipe.data.data_seed, "surface"))
        for i in became.whole.nonzero()[:, 0].tolist():
            found[i] = surfaces.points_on(*surfaces.marching_cubes(values[i], THRESHOLD), self.points, generator)
        return found, became

    def forms(self, method: str, order: str, seed: int) -> tuple[Tensor, shapes.Outcomes]:
        """`form_of` a method's networks, once."""
        if (key := (method, order, seed)) not in self._known:
            a = self.arena
            self._known[key] = self.form_of(a.held if method == HELD_OUT else a.entrants(order, seed).theta(method))
        return self._known[key]

    @cached_property
    def training(self) -> Tensor:
        """Forms of the objects of the originals that generators learn from."""
        return self.real_forms(range(self.arena.recipe.zoo.k_checkpoints))

    @cached_property
    def _others(self) -> tuple[Tensor, Tensor]:
        forms = self.real_forms(self.references)
        return forms, self._kept(forms, forms)

    @cached_property
    def _usual(self) -> Float[Tensor, "H"]:
        """Distances of held-out networks' forms to the nearest training object."""
        forms, became = self.forms(HELD_OUT, self.arena.orders[0], -1)
        return shapes.nearest(self._kept(forms[became.whole], self.training))[0]

    @property
    def usual(self) -> float:
        """Median distance of held-out networks' forms to the nearest training object: the unit of `to_training`."""
        return float(self._usual.median())

    @property
    def measure(self) -> str:
        """What a distance is, for axes."""
        return "Chamfer distance" if self.d == 3 else "root mean squared difference" if self.task.kind == "grey" else "1 - IoU"

    def nearest(self, forms: Tensor) -> tuple[Float[Tensor, "M"], Int64[Tensor, "M"]]:
        """Distance to the nearest training object, and which."""
        return shapes.nearest(self.distance(forms, self.training))

    def beside(self, theta: Float[Tensor, "M D"], cells: int = 0) -> Float[Tensor, "M h w"]:
        """Pictures of the training object that each network is nearest to; NaN beside a network that has no form."""
        forms, became = self.form_of(theta)
        shown = self.pictures(self.real(self.nearest(forms)[1].clamp(max=len(self.training) - 1), cells))
        return shown.where(became.whole[:, None, None], torch.nan)

    def table(self, names: Sequence[str], orders: Sequence[str] | None = None, seeds: Sequence[int] = (0,)) -> pd.DataFrame:
        """A row per method, order and seed; above them `TRAINING`, real objects that were learned from, and the held-out networks.

        Columns: `n` networks; `score`: mean fidelity to the nearest test object of those that have one; shares that are `empty`, `full`
        and `broken`, and then, of those that are none of these: `mmd`, `cov` and `one_nna` against the references (1-NNA of as many
        references; see `shapes`), `to_training`: median distance to the nearest training object, 1 = that of held-out networks, and
        `z_u`: the same distances against theirs (`novelty.data_copying`). NaN where fewer than two are left.
        """
        known = self.training[:len(self.references)]
        alone = shapes.nearest(self._kept(known, self.training).fill_diagonal_(torch.inf))[0]
        real = float(self.task.of_objects(range(len(known))).mean())
        rows = [{"method": TRAINING, "order": "", "seed": -1, "n": len(known), "score": real, "empty": 0.0, "full": 0.0, "broken": 0.0,
                 **self._against(known, alone)}]
        wanted = [(HELD_OUT, "", -1), *((m, order, seed) for order in orders or self.arena.orders[:1] for m in names for seed in seeds)]
        for method, order, seed in wanted:
            forms, became = self.forms(method, order or self.arena.orders[0], seed)
            e = self.arena.experiment
            score = e.judged_of(self.arena.held if method == HELD_OUT else self.arena.entrants(order, seed).theta(method)).score
            rows.append({"method": method, "order": order, "seed": seed, "n": len(forms), "score": float(score[torch.isfinite(score)].mean()),
                         **{name: float(which.double().mean()) for name, which in became._asdict().items()},
                         **self._against(forms[became.whole])})
        return pd.DataFrame(rows)

    def _against(self, forms: Tensor, nearest: Float[Tensor, "M"] | None = None) -> dict[str, float]:
        if len(forms) < 2:
            return dict.fromkeys(("mmd", "cov", "one_nna", "to_training", "z_u"), float("nan"))
        references, between = self._others
        distance, n = self._kept(forms, references), min(len(forms), len(references))
        nearest = shapes.nearest(self._kept(forms, self.training))[0] if nearest is None else nearest
        return {"mmd": shapes.minimum_matching_distance(distance), "cov": shapes.coverage(distance),
                "one_nna": shapes.one_nearest_neighbour(self._kept(forms[:n], forms[:n]), distance[:n, :n], between[:n, :n]),
                "to_training": float(nearest.median()) / self.usual, "z_u": novelty.data_copying(nearest, self._usual)}
