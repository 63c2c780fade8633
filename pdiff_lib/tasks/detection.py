"""Object detection: trained by a detector's own losses, judged by AP, the mean average precision of COCO."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from torch import Tensor, nn
from torchvision.ops import box_iou

from pdiff_lib import networks
from pdiff_lib.base import recipe, training
from pdiff_lib.base.score import Score
from pdiff_lib.networks import capture, detectors
from pdiff_lib.networks.modes import evaluating
from pdiff_lib.networks.subset import Subset
from pdiff_lib.tasks import annotations, order, scenes, shared
from pdiff_lib.tasks.scenes import NOTHING
from pdiff_lib.tasks.squares import OnSquares
from pdiff_lib.tasks.task import Judged, Predictor, Task

FOUND = 0.5  # IoU and score from which an object counts as found
AT_ONCE = 64  # images
MOST = 100  # detections of an image, of a detector that does not say
SLICE = 16  # networks whose detections are compared with all objects at once


class Detection(OnSquares):
    """Boxes and classes of the objects in scenes.

    The score is COCO's AP (mean over classes and over ten thresholds of IoU from .5 to .95, at 101 recalls; objects of all sizes; as many
    detections of an image as the detector gives). "Wrong" (Eq. 7) are the objects of the test images that a network does not find: no
    detection of the right class with an IoU of at least .5 and a score of at least .5. Crowds and difficult objects count nowhere.

    Args:
        data: `dataset` as `scenes.load` takes it; `image_size`.

    Attributes:
        scenes: images and objects.

    Raises:
        ValueError: what `scenes.load` refuses.

    Source: Lin et al. 2014 (COCO). The paper's Table 10 reports AP; Eq. 7 of objects is ours.
    """

    score = Score("AP", "%", scale=100.0)

    def __init__(self, data: recipe.Data):
        annotations.coco()  # or it is not there
        self.scenes = scenes.load(data.dataset, data.image_size, data.train_images, data.test_images, data.data_seed)
        self.name, self.shape = recipe.short(data.dataset), (3, self.scenes.size, self.scenes.size)
        self.x_train, self.y_train, self.x_test, self.y_test = (getattr(self.scenes, name) for name in ("x_train", "y_train", "x_test", "y_test"))
        self._counted = (self.y_test[..., 4] != NOTHING) & (self.y_test[..., 5] == 0)
        if not self._counted.any():
            raise ValueError(f"{self.name}: no object in {len(self.y_test)} test images: expected some")

    @property
    def code(self) -> tuple[Any, ...]:
        return self._source, detectors, Task.batches, order, training

    @property
    def judging(self) -> tuple[Any, ...]:
        return Detection._over, Detection._of_classes, detectors, capture, shared

    def network(self, base: recipe.Base) -> nn.Module:
        """See `detectors.create`."""
        self.uncropped(base)
        with training.seeded(base.seed):
            return detectors.create(base.network, self.scenes.classes, self.scenes.size, pretrained=base.pretrained, weights=base.weights)

    def check(self, net: nn.Module) -> None:
        try:
            with torch.no_grad(), evaluating(net):
                (found,) = net(list(self.example.to(next(net.parameters()).device)))
            detectors.table([found], 1)
        except Exception as error:  # whatever a network of a user's own raises
            raise ValueError(f"{type(net).__name__} does not take images of {list(self.example.shape[1:])}, or gives no boxes, scores and labels of "
                             f"them: {type(error).__name__}: {error}") from error

    def criterion(self, outputs: dict[str, Tensor], wanted: Any = None) -> Float[Tensor, ""]:
        """The sum of a detector's losses."""
        return sum(outputs.values())

    def loss(self, net: nn.Module, batch: int, base: recipe.Base, device: torch.device,
             stream: str) -> tuple[Callable[[int], Tensor], int]:
        """As of any task; images are mirrored at random where `base.flip`. What a detector draws at random comes from the step."""
        batch_of, per_epoch = self.batches([base.seed], batch, base, device, stream)
        numbers = torch.tensor(net.numbers, device=device)

        def loss_at(i: int) -> Tensor:
            (x,), (y,) = batch_of(i, slice(0, 1))
            seed = training.seed_for(base.seed, stream, i)
            if base.flip:
                x, y = scenes.mirrored(seed, x, y)
            learned = (y[..., 4] != NOTHING) & (y[..., 5] == 0)
            wanted = [{"boxes": own[which, :4], "labels": numbers[own[which, 4].long()]} for own, which in zip(y, learned)]
            with training.seeded(seed):
                return self.criterion(net(list(x.float() / 255), wanted))

        return loss_at, per_epoch

    def predictor(self, net: nn.Module, sub: Subset, device: torch.device, progress: bool = False) -> Predictor:
        """Detections [M N most 6]: left, top, right, lower edge in pixels, score, class; -1 in rows without one, NaN where a network's numbers
        are not finite."""
        return self._over(self.x_test, net, sub, device, progress)

    def _over(self, x: UInt8[Tensor, "N 3 s s"], net: nn.Module, sub: Subset, device: torch.device, progress: bool = False) -> Predictor:
        net, x = networks.copied(net).to(device).eval().requires_grad_(False), x.to(device)
        batch = shared.batch_of(len(x), AT_ONCE)
        classes = self._of_classes(net)
        try:
            parts = detectors.InParts(net, self.scenes.size)
        except ValueError as error:
            capture.warn_whole(net, error)
            most = getattr(net, "detections_per_img", MOST)

            def whole(params: dict[str, Tensor], images: tuple[Tensor, ...]) -> Tensor:
                return detectors.table(torch.func.functional_call(net, params, (list(images[0]),)), most)

            part = capture.Split(lambda images: (images,), whole, captured=False)
            return shared.Shared(part, sub, lambda items: x[items.to(device)].float() / 255, len(x), batch,
                                 lambda params, found, items: classes(found), device, progress)
        dense = {name for name, _ in parts.dense.named_parameters()}

        def images(items: Int64[Tensor, "B"]) -> Tensor:
            return parts.images(x[items.to(device)])

        part = capture.split_or_whole(parts.dense, tuple(n for n in sub.names if n in dense), images(torch.arange(batch)))

        def rest(params: dict[str, Tensor], boundary: tuple[Tensor, ...]) -> Tensor:
            return part.rest({n: v for n, v in params.items() if n in dense}, boundary)

        return shared.Shared(part._replace(rest=rest), sub, images, len(x), batch,
                             lambda params, flat, items: classes(parts.finish(params, flat)), device, progress)

    def _of_classes(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        """Detections with the task's classes in place of the network's numbers; those of other classes are left out."""
        numbers = torch.tensor(net.numbers, dtype=torch.float32)

        def classes(found: Float[Tensor, "B most 6"]) -> Float[Tensor, "B most 6"]:
            same = found[..., 5, None] == numbers
            label = same.int().argmax(dim=-1).float()
            known = same.any(dim=-1) | found[..., 0].isnan()
            return torch.cat([found[..., :5], torch.where(found[..., 5].isnan(), torch.nan, label)[..., None]], dim=-1).where(known[..., None], -1.0)

        return classes

    def rehearse(self, net: nn.Module, sub: Subset, device: torch.device) -> None:
        self._over(self.x_test[:1], net, sub, device)(sub.flatten(net).expand(2, -1))

    def detections(self, net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: UInt8[Tensor, "n 3 s s"],
                   device: torch.device) -> Float[Tensor, "M n most 6"]:
        """What the networks of some vectors find in any images; as `predictor` gives it."""
        return self._over(x, net, sub, device)(theta)

    def ap(self, outputs: Float[Tensor, "M N most 6"], items: Int64[Tensor, "n"] | None = None) -> Float64[Tensor, "M 2"]:
        """AP and AP50 (at an IoU of .5 alone) of each network, fractions; NaN where its numbers are not finite, or no object is there.

        Args:
            outputs: as `predictor` gives them.
            items: [n] which images count; None: all.
        """
        items = torch.arange(len(self.y_test)) if items is None else items
        truth = _truth(self.y_test[items].cpu(), self.scenes.size, len(self.scenes.classes))
        broken = torch.isnan(outputs[:, items]).flatten(1).any(dim=1)
        return torch.stack([torch.full((2,), torch.nan).double() if bad else _ap(truth, own) for own, bad in zip(outputs[:, items], broken)])

    def judged(self, outputs: Float[Tensor, "M N most 6"], originals: Tensor | None = None,
               items: Int64[Tensor, "n"] | None = None) -> Judged:
        """AP, and which objects are not found."""
        return Judged(self.ap(outputs, items)[:, 0], self.missed(outputs, items))

    def missed(self, outputs: Float[Tensor, "M N most 6"], items: Int64[Tensor, "n"] | None = None) -> Shaped[Tensor, "M objects"]:
        """Which objects of the test images a network does not find, image after image."""
        items = torch.arange(len(self.y_test)) if items is None else items
        y, counted = self.y_test[items].cpu(), self._counted[items]
        rows = []
        for part in outputs[:, items].split(SLICE):
            iou = torch.stack([box_iou(found.flatten(0, 1)[:, :4], own[:, :4]).view(*found.shape[:2], -1)
                               for found, own in zip(part.transpose(0, 1), y)], dim=1)  # [m n most O]
            right = (part[..., 4, None] >= FOUND) & (part[..., 5, None] == y[:, None, :, 4])
            rows.append(~(right & (iou >= FOUND)).any(dim=2)[:, counted])
        return torch.cat(rows)


def _truth(y: Float[Tensor, "n O 6"], size: int, classes: int) -> Any:
    notes = []
    for i, own in enumerate(y.tolist()):
        notes += [{"id": len(notes) + j + 1, "image_id": i, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0], "area": 1,
                   "iscrowd": int(ignored)} for j, (x0, y0, x1, y1, label, ignored) in enumerate(o for o in own if o[4] != NOTHING)]
    with contextlib.redirect_stdout(io.StringIO()):
        return annotations.coco().COCO({"info": {}, "images": [{"id": i, "width": size, "height": size} for i in range(len(y))], "annotations": notes,
                     "categories": [{"id": c, "name": str(c)} for c in range(classes)]})


def _ap(truth: Any, found: Float[Tensor, "n most 6"]) -> Float64[Tensor, "2"]:
    image, row = (found[..., 5] != NOTHING).nonzero(as_tuple=True)
    if not len(image):
        return torch.zeros(2, dtype=torch.float64)
    d = found[image, row].double().numpy()
    with contextlib.redirect_stdout(io.StringIO()):
        results = truth.loadRes(np.column_stack([image.numpy(), d[:, :2], d[:, 2:4] - d[:, :2], d[:, 4:]]))
        judge = annotations.coco().COCOeval_faster(truth, results, "bbox")
        judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [[0, 1e10]], ["all"], [found.shape[1]]
        judge.evaluate()
        judge.accumulate()
    precision = torch.from_numpy(judge.eval["precision"])[..., 0, 0]  # [IoU recall class]; -1: no such object
    return torch.stack([p[p > -1].mean() for p in (precision, precision[0])])
