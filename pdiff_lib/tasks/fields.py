"""Neural fields: a small network is an object, the picture or the body that it gives at each point. One network per object."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor, nn

from pdiff_lib.base import own, recipe, training
from pdiff_lib.base.runs import Store
from pdiff_lib.base.score import Score
from pdiff_lib.networks import implicit
from pdiff_lib.tasks import objects, order
from pdiff_lib.tasks.task import BatchOf, Judged, Task, predict

IOU, PSNR = Score("IoU"), Score("PSNR", "dB")
EXACT = 1e-12  # a smaller mean squared error counts as this one: a PSNR of 120 dB


class Fields(Task):
    """Objects, each with a network of its own: network i of a zoo is fitted to object i (`of_members`).

    Fields of bodies and of glyphs give a logit of being inside; of grey pictures the grey value, from 0 to 1. A training item is the
    i-th point of each object; test items are points that are the same for all objects, and in no training.

    The score is a network's fidelity to the nearest of the **test objects**, to which no network is fitted: IoU of what is inside, or
    PSNR. So it says how real an object is, whichever it is: originals, networks that were held out, copies and new objects stand alike
    under it. (PSNR rewards blur: a mean of many pictures is as near to a real one as another real one is. IoU does not.) How well a
    network has learned its own object is another question, see `fidelity`. "Wrong" are the points where a network differs from that
    test object: inside or not; of grey values by more than the originals do in the median.

    Args:
        data: see `objects.of`; `field_kind` decides between the two losses and scores.
        store: keeps what is made of meshes.

    Attributes:
        objects: with their names and classes; in the order of the zoo's networks, those for testing at the end.

    Source: Erkoc et al. 2023 (HyperDiffusion): binary cross-entropy of occupancy. Scores and grey pictures are ours.
    """

    def __init__(self, data: recipe.Data, store: Store | None = None):
        self.kind, self.objects = data.field_kind, objects.of(data, store)
        self.name, self.score, self.relative = self.objects.name, *((PSNR, True) if self.kind == "grey" else (IOU, False))
        self.x_test, self.y_test = self.objects.test_points, self.objects.test_values[self.objects.fitted:].T
        self.members: tuple[int, ...] | None = None
        self._take(slice(None))

    def _take(self, rows: slice | list[int]) -> None:
        self._points, self._values = self.objects.points[rows], self.objects.values[rows]
        self.x_train, self.y_train = self._points.transpose(0, 1), self._values.T

    def of_members(self, members: Sequence[int]) -> Fields:
        """The fitting of these networks, each to its own object.

        Raises:
            ValueError: more networks than objects.
        """
        if len(members) and not 0 <= min(members) <= max(members) < self.objects.fitted:
            raise ValueError(f"network {max(members)} of a zoo of {self.name}, which has {self.objects.fitted} objects for training, one for "
                             f"each network: expected at most {self.objects.fitted} networks, k_checkpoints and those held out together")
        part = copy.copy(self)
        for name in ("training_digest", "digest"):
            part.__dict__.pop(name, None)
        part.members = tuple(members)
        part._take(list(members))
        return part

    @property
    def title(self) -> str:
        return f"{self.kind} fields of {self.name}"

    @property
    def code(self) -> tuple[Any, ...]:
        return self._source, implicit, Task.loss, order, training

    @property
    def judging(self) -> tuple[Any, ...]:
        return self._source, implicit, predict, Task.predictor

    @property
    def example(self) -> Float[Tensor, "1 d"]:
        return torch.zeros(1, self.objects.d)

    def network(self, base: recipe.Base) -> nn.Module:
        """A field by name (`implicit.create`), or `package.module:function`, which is called with in_features and out_features."""
        if base.pretrained or base.weights:
            raise ValueError(f"pretrained = {base.pretrained} and weights = {base.weights!r}: expected False and '' with task 'fields'")
        with training.seeded(base.seed):
            if not own.is_name(base.network):
                return implicit.create(base.network, self.objects.d)
            net = own.build(base.network, in_features=self.objects.d, out_features=1)
        net.input_shape = (self.objects.d,)
        return net

    def batches(self, seeds: Sequence[int], batch: int, base: recipe.Base, device: torch.device, stream: str) -> tuple[BatchOf, int]:
        """As of any task; each network's points are those of its own object."""
        if self.members is None or len(seeds) != len(self.members):
            raise ValueError(f"{len(seeds)} networks of {'no' if self.members is None else len(self.members)} members: expected of_members, "
                             "as each network has an object of its own")
        m, n, d = self._points.shape
        x, y = self._points.reshape(m * n, d).to(device), self._values.reshape(m * n).to(device)
        picks, first = order.Picks(n, batch, seeds, stream, device), n * torch.arange(m, device=device)[:, None]

        def batch_of(step: int, part: slice) -> tuple[Tensor, Tensor]:
            chosen = first[part] + picks(step, part)
            return tuple(t.index_select(0, chosen.flatten()).view(*chosen.shape, *t.shape[1:]) for t in (x, y))

        return batch_of, picks.per_epoch

    def criterion(self, outputs: Float[Tensor, "B 1"], wanted: Shaped[Tensor, "B *O"]) -> Float[Tensor, ""]:
        """Squared error of grey values, or binary cross-entropy; of O objects the least."""
        outputs = outputs.view(-1, *[1] * (wanted.ndim - 1)).expand(wanted.shape)
        loss = F.mse_loss if self.kind == "grey" else F.binary_cross_entropy_with_logits
        return loss(outputs, wanted.to(outputs.dtype), reduction="none").mean(dim=0).amin()

    def fidelity(self, outputs: Float[Tensor, "M N 1"], items: Int64[Tensor, "n"] | None = None) -> Float64[Tensor, "M O"]:
        """How like each object the networks are at test points: IoU of what is inside (1 where neither has any), or PSNR in decibels.

        Args:
            outputs: as `predictor` gives them.
            items: which test points count; None: all.

        Returns:
            To each of all objects, in the order of `objects`. NaN for outputs that are not finite.
        """
        return self._fidelity(outputs, self.objects.test_values.T, items)

    def of_objects(self, rows: Sequence[int]) -> Float64[Tensor, "n"]:
        """The score that networks would have that are these objects exactly."""
        values = self.objects.test_values[list(rows)].double()
        return self._fidelity((values if self.kind == "grey" else 2 * values - 1)[..., None], self.y_test, None).amax(dim=1)

    def _fidelity(self, outputs: Float[Tensor, "M N 1"], wanted: Shaped[Tensor, "N O"], items: Int64[Tensor, "n"] | None) -> Float64[Tensor, "M O"]:
        items = slice(None) if items is None else items
        given, y = outputs[:, items, 0].double(), wanted[items].double()
        if self.kind == "grey":
            squares = torch.addmm(y.square().sum(dim=0).expand(len(given), -1), given, y, alpha=-2) + given.square().sum(dim=1)[:, None]
            value = -10 * (squares / len(y)).clamp(min=EXACT).log10()
        else:
            inside = (given > 0).double()
            both = inside @ y
            either = inside.sum(dim=1)[:, None] + y.sum(dim=0) - both
            value = torch.where(either > 0, both / either, 1.0)
        return value.where(torch.isfinite(given).all(dim=1)[:, None], torch.nan)

    def judged(self, outputs: Float[Tensor, "M N 1"], originals: Float[Tensor, "K N 1"] | None = None,
               items: Int64[Tensor, "n"] | None = None) -> Judged:
        """Fidelity to the nearest test object, and the points that differ from it.

        Args:
            outputs: as `predictor` gives them.
            originals: those of the originals; what grey values that differ are measured by (None: by the networks' own).
            items: which test points count, also in what is nearest; None: all.
        """
        score, nearest = self._fidelity(outputs, self.y_test, items).max(dim=1)
        items = slice(None) if items is None else items
        given, wanted = outputs[:, items, 0], self.y_test[items][:, nearest].T
        if self.kind != "grey":
            return Judged(score, ((given > 0) != wanted) | ~torch.isfinite(given))
        error = (given - wanted).abs()
        if originals is None:
            return Judged(score, ~(error <= error.median()))
        _, near = self._fidelity(originals, self.y_test, None).max(dim=1)
        return Judged(score, ~(error <= (originals[..., 0] - self.y_test[:, near].T).abs().median()))
