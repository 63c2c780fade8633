"""What many parameter vectors predict, in one pass over the images.

Only a few parameters differ between the vectors, so most of the network computes the same numbers for each of them.
The network is captured as a graph and cut in two: the frozen part, which depends on no chosen parameter and runs once
per batch of images, and the rest, which runs once per vector. Images are the outer loop and vectors the inner one, so
memory is bounded by the batch and not by the number of vectors or images. Few vectors of a small network run whole: a
capture takes longer than they do (`capture.Count`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib import networks
from pdiff_lib.base import training
from pdiff_lib.base.kept import Kept, drop
from pdiff_lib.base.vectors import vectors as as_vectors
from pdiff_lib.networks.capture import Count, Split, reason, split_or_whole, try_one_image, whole
from pdiff_lib.networks.subset import Subset, tensors_of
from pdiff_lib.tasks import few, task

VMAP_ON_CUDA = 16  # vectors per vmap on a GPU, where one vector's rest is too small to fill it
VMAP_OF_SMALL = 32  # on the CPU, of networks that do not fill a core either
NO_CLASS = -1  # what scores that are not finite say


class Evaluator:
    """Predictions over the same images, for as many parameter vectors and calls as there are: the network is captured once
    that pays, and what is frozen is computed once, as long as it fits into `keep`.

    On the CPU a capture pays when it costs less than what it would have spared all calls so far (`capture.Count`); elsewhere
    from the second vector on. Until then each vector runs the whole network. So does each vector of a network that cannot
    be captured, with a warning that says why. Where a device's memory does not suffice, it
    goes on with fewer vectors at once, then with fewer images. The network works on a copy, in eval mode and with its own
    running statistics; `net` itself is not touched, and later changes to it are not seen.

    Args:
        net: the network; returns class scores [n, classes].
        sub: which of its parameters (and running statistics) the vectors hold.
        x: images, as `prepare` takes them (uint8, say), or as the network does where there is no `prepare`.
        prepare: from a batch of images on the device to what the network takes (resizing, normalising).
        batch_size: images at a time, at most; with `vectors_at_once` and `keep`, what memory depends on.
        vectors_at_once: vectors that share one vmap over the rest; None takes 16 on CUDA, and on the CPU 1 (a loop), or 32 of a
            small network without convolutions.
        device: where to compute; None takes that of the network's parameters.
        progress: show a progress bar over the batches.
        keep: bytes on the device that frozen results may take between calls, 0: none; None: see `kept.Kept`.

    Attributes:
        classes: how many scores the network gives.

    Raises:
        ValueError: the arguments do not fit each other or the network.
    """

    def __init__(self, net: nn.Module, sub: Subset, x: Shaped[Tensor, "N C H W"], *,
                 prepare: Callable[[Tensor], Tensor] | None = None, batch_size: int = 256,
                 vectors_at_once: int | None = None, device: torch.device | str | None = None, progress: bool = False,
                 keep: int | None = None):
        device = torch.device(device) if device is not None else next(net.parameters()).device
        _check(net, sub, x, device, batch_size=batch_size, vectors_at_once=vectors_at_once)
        self.net = networks.copied(net).to(device).eval().requires_grad_(False)
        self.sub, self.x, self.prepare, self.device, self.progress = sub, x, prepare, device, progress
        # Batches of one size, so that one capture serves them all; the last is filled up with images that are not counted.
        self.batch = -(-len(x) // -(-len(x) // batch_size))
        self.vectors_at_once = vectors_at_once or (VMAP_ON_CUDA if device.type == "cuda" else VMAP_OF_SMALL if few.is_small(net) else 1)
        self.part: Split | None = None
        self.kept = Kept(device, keep)
        self.count = Count(self.net, sub.names) if device.type == "cpu" else None
        self.spared = 0 if keep == 0 else -1  # runs of the frozen part that a capture would have spared all calls: but one
        self.layout, self.classes = try_one_image(self.net, x, lambda: self._images(0, 1), self.count)

    def _images(self, start: int, size: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        batch = self.x[start:start + size]
        batch = torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])]).to(self.device)
        batch = self.prepare(batch) if self.prepare else batch
        return batch.contiguous(memory_format=layout) if batch.ndim == 4 else batch

    def _boundary(self, start: int, part: Split) -> tuple[Tensor, ...]:
        """What the frozen part hands over for the batch at `start`."""
        if start in self.kept:
            return self.kept[start]
        boundary = part.frozen(self._images(start, self.batch, self.layout))
        size = sum(t.nbytes for t in boundary) * -(-len(self.x) // self.batch)
        if part.captured and (self.kept or self.kept.room(size)):
            self.kept[start] = boundary
        return boundary

    def predict(self, theta: Float[Tensor, "M D"]) -> Int64[Tensor, "M N"]:
        """The class that each parameter vector gives to each image, on the CPU; the first of equal scores. `NO_CLASS` where the
        scores are not all finite, with a warning that counts them.

        Equal to running the whole network for every vector up to rounding: `split` alone is equal bit for bit where the
        same kernels run (not under vmap, for a matrix product over fewer tokens, or for one in a convolution's place); the channels-last layout used here
        changes scores by about 1e-7 of their size.

        Raises:
            ValueError: vectors of another length, or with NaN or infinity.
        """
        return self._of(as_vectors(theta, self.sub.numel))

    @torch.no_grad()
    def _of(self, theta: Float[Tensor, "M D"]) -> Int64[Tensor, "M N"]:
        theta = theta.to(self.device, next(self.net.parameters()).dtype)
        self.spared += len(theta) - (self.kept.limit == 0)  # and but one in each call where nothing is kept
        with training.precision(self.device):
            while True:
                try:
                    return no_class_warned(self._predict(theta))
                except torch.OutOfMemoryError:
                    if not self._shrink():
                        raise
                except RuntimeError as error:
                    if self.vectors_at_once == 1:
                        raise
                    warnings.warn(f"{type(self.net).__name__} does not take several vectors at once, so they run one after the other "
                                  f"({reason(error)})")
                    self.vectors_at_once = 1

    def _shrink(self) -> bool:
        """Take less memory than before; False: there is nothing left to save."""
        self.kept.limit = 0
        if drop(self.device):
            pass
        elif self.vectors_at_once > 1:
            self.vectors_at_once //= 2
        elif self.batch > 1:
            self.batch, self.part = self.batch // 2, None  # a capture holds for one size
        else:
            return False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _pays(self) -> bool:
        batches = -(-len(self.x) // self.batch)
        return self.spared > 0 and (self.count is None or self.count.pays(self.spared * batches, self.batch))

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the network now, whether that pays or not."""
        self.part = split_or_whole(self.net, self.sub.names, self._images(0, self.batch, self.layout))

    def _predict(self, theta: Float[Tensor, "M D"]) -> Int64[Tensor, "M N"]:
        if self.part is None and self._pays():
            self.capture()
        part = self.part or whole(self.net)
        chunks = theta.split(self.vectors_at_once if part.captured else 1)
        predictions = torch.empty(len(theta), len(self.x), dtype=torch.int64)
        for start in tqdm(range(0, len(self.x), self.batch), desc="evaluating", unit="batch", leave=False, disable=not self.progress):
            boundary, n = self._boundary(start, part), min(self.batch, len(self.x) - start)
            rows = [_classes(_scores(part, self.sub, chunk, boundary)) for chunk in chunks]
            predictions[:, start:start + n] = torch.cat(rows)[:, :n].cpu()
        return predictions


def predict(net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: Shaped[Tensor, "N C H W"],
            **how) -> Int64[Tensor, "M N"]:
    """The class that each parameter vector gives to each image: `Evaluator.predict`, once.

    Hand all vectors over in one call, or keep an `Evaluator`. Memory depends on the batch alone.

    Args:
        net, sub, x: as for `Evaluator`.
        theta: parameter vectors, raw.
        **how: the keywords of `Evaluator`.

    Raises:
        ValueError: the arguments do not fit each other or the network, or hold NaN or infinity.

    Source: how the paper evaluates generated networks (Section 3.1: 200 per experiment); the cut is ours.
    """
    return _ready(net, sub, as_vectors(theta, sub.numel), x, **how)[0]()


def _ready(net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: Tensor, **how) -> tuple[Callable[[], Tensor], int]:
    """What gives the predictions, where there are more than a few (`few.are_few`) not yet at work; and how many classes there are."""
    weight = next(net.parameters())
    if not how.keys() - {"prepare", "progress", "device"} and few.are_few(net, len(theta), len(x)) and (
            {weight.device.type, torch.device(how.get("device") or "cpu").type, x.device.type, theta.device.type} == {"cpu"}):
        _check(net, sub, x, weight.device)
        scores = few.scores(net, sub, theta.to(weight.dtype), x, how.get("prepare"))
        return lambda: no_class_warned(_classes(scores)), scores.shape[-1]
    evaluator = Evaluator(net, sub, x, **{"keep": 0, **how})
    return lambda: evaluator._of(theta), evaluator.classes


def wrong(net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: Shaped[Tensor, "N C H W"],
          y: Integer[Tensor, "N"], **how) -> Bool[Tensor, "M N"]:
    """Which images each parameter vector gets wrong: what accuracy and similarity are computed from.

    Args:
        net, sub, theta, x: as for `predict`.
        y: true class indices.
        **how: the keywords of `predict`.

    Raises:
        ValueError: not one label per image, labels that the network has no score for, or what `predict` refuses.

    Source: the wrong predictions of Eq. 7.
    """
    if y.shape != x.shape[:1] or y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise ValueError(f"y has shape {list(y.shape)} ({y.dtype}): expected [{len(x)}], one class number per image")
    predictions, classes = _ready(net, sub, as_vectors(theta, sub.numel), x, **how)
    if outside := sorted({label for label in y.tolist() if not 0 <= label < classes}):
        shown = ", ".join(map(str, outside[:3])) + ", ..." * (len(outside) > 3)
        raise ValueError(f"y holds {len(outside)} labels that {type(net).__name__} has no score for ({shown}): expected 0 to "
                         f"{classes - 1}")
    return predictions() != y.cpu()


def rehearse(net: nn.Module, sub: Subset, shape: tuple[int, int, int], device: torch.device) -> None:
    """Evaluate two vectors on two images of zeros, whole and captured: what the network does not take is said, or fallen back
    from, before any long work and not after it. Raises what `predict` raises."""
    theta, evaluator = sub.flatten(net).expand(2, -1), Evaluator(net, sub, torch.zeros(2, *shape), device=device, keep=0)
    evaluator.predict(theta[:1])  # one is never worth a capture
    evaluator.capture()
    evaluator.predict(theta)


def accuracy(wrong: Bool[Tensor, "M N"]) -> Float[Tensor, "M"]:
    """Fraction of the images that each model gets right, in float64.

    >>> accuracy(torch.tensor([[True, False, False, False]]))
    tensor([0.7500], dtype=torch.float64)
    """
    return (~wrong).sum(dim=1).double() / wrong.shape[1]


def summary(wrong: Bool[Tensor, "M N"], seed: int = 0) -> dict[str, float | int]:
    """The accuracies of many models in a few numbers, all of them fractions.

    Args:
        wrong: from `wrong`; at least 1 model and 2 images.
        seed: of the random halves (the first has N // 2 images).

    Returns:
        `n_models`, `n_images`, and what `task.summary` gives.

    Raises:
        ValueError: no model, or fewer than 2 images.
    """
    models, images = wrong.shape
    if models < 1 or images < 2:
        raise ValueError(f"wrong has shape [{models}, {images}]: expected at least 1 model and 2 images")
    found = task.summary(lambda items: accuracy(wrong[:, items]), images, seed=seed)
    return {"n_models": models, "n_images": images, **found}


def _scores(part: Split, sub: Subset, theta: Tensor, boundary: tuple[Tensor, ...]) -> Tensor:
    """Scores [m n classes] of m vectors, from what the frozen part handed over."""
    if len(theta) == 1:
        return part.rest(sub.unflatten(theta[0]), boundary)[None]
    return torch.func.vmap(lambda vector: part.rest(sub.unflatten(vector), boundary))(theta)


def no_class_warned(predictions: Integer[Tensor, "M N"]) -> Integer[Tensor, "M N"]:
    """The predictions, with a warning where there are some without a class."""
    if (bad := (predictions == NO_CLASS).sum(dim=1)).any():
        warnings.warn(f"{int((bad > 0).sum())} of {len(bad)} networks give scores that are NaN or infinite, on {int(bad.sum())} of "
                      f"{predictions.numel()} images in all (first: network {int(bad.nonzero()[0])}): counted as wrong")
    return predictions


def _classes(scores: Float[Tensor, "m n classes"]) -> Int64[Tensor, "m n"]:
    return torch.where(torch.isfinite(scores).all(-1), scores.argmax(-1), NO_CLASS)


def _check(net: nn.Module, sub: Subset, x: Tensor, device: torch.device, **at_least_1: int | None) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("cuda requested but torch.cuda.is_available() is False")
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"x has shape {list(x.shape)}: expected [images, channels, height, width], at least 1 image")
    for name, number in at_least_1.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: expected at least 1")
    shapes = {n: tuple(t.shape) for n, t in tensors_of(net).items()}
    for name, shape in zip(sub.names, sub.shapes):
        if shapes.get(name) != shape:
            raise ValueError(f"{name} of the subset has shape {shape}: {type(net).__name__} has {shapes.get(name)}")
