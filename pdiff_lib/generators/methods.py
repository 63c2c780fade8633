"""The border to methods that are not ours: what they get is their own, what they give is checked, what they do to the random
numbers and settings of all is undone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from pdiff_lib.base import training, vectors
from pdiff_lib.base.runs import tensor_digest


class Kept:
    """Tensors that everybody is handed without a copy, as they were when they were kept."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, str]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def keep(self, name: str, tensor: Tensor) -> None:
        """Hand it out from now on."""
        self._kept[name] = tensor, tensor_digest(tensor)

    def get(self, name: str, by: str = "") -> Tensor:
        """The tensor.

        Raises:
            ValueError: somebody has changed it in place (`by`: who was at work last), and all results with it.
        """
        tensor, digest = self._kept[name]
        if tensor_digest(tensor) != digest:
            raise ValueError(f"the vectors of {name!r} were changed in place{by and f' by {by}'}: expected them as they were "
                             "handed out; work on a copy (.clone()), and make this Experiment again")
        return tensor


def check(name: str, method: Any, conditional: bool = False) -> None:
    """Refuse what is no method.

    Raises:
        ValueError: no `fit(theta)` or no `sample(n, generator=...)`; or without a `condition`, of one that is to have one.
    """
    if conditional and not getattr(method, "conditional", True):
        raise ValueError(f"method {name!r} is a {type(method).__name__}, which takes no condition, and is to have one: expected none")
    more = {"condition": None} if conditional else {}
    try:
        inspect.signature(method.fit).bind(None, **more)
        inspect.signature(method.sample).bind(1, generator=None, **more)
    except (AttributeError, TypeError) as error:
        wanted = "fit(theta, condition) and sample(n, generator, condition)" if conditional else "fit(theta) and sample(n, generator)"
        raise ValueError(f"method {name!r} is a {type(method).__name__} ({error}): expected an object with {wanted}") from error


def unconditional(method: Any, condition: Tensor | None) -> None:
    """For a method that takes no condition.

    Raises:
        ValueError: it is given one.
    """
    if condition is not None:
        raise ValueError(f"{type(method).__name__} takes no condition, and was given one of shape {list(condition.shape)}: expected None")


def fit(method: Any, theta: Float32[Tensor, "K D"], seed: int, **kept: Any) -> Any:
    """The method, fitted to a copy; `seed` is of the global random numbers meanwhile. Returns what `fit` returns, where that
    can sample, else the method itself."""
    with _undisturbed(seed):
        fitted = method.fit(theta.clone(), **kept)
    return fitted if hasattr(fitted, "sample") else method


def sample(name: str, method: Any, n: int, numel: int, generator: torch.Generator, seed: int, **kept: Any) -> Float32[Tensor, "n D"]:
    """n vectors of a fitted method on the CPU, which it holds no part of; `seed` as for `fit`, `kept`: further arguments.

    Raises:
        ValueError: what is not n vectors of D finite floats (`vectors.vectors`); the method is named.
    """
    with _undisturbed(seed):
        given = method.sample(n, generator=generator, **kept)
    try:
        theta = vectors.vectors(given, numel)
        if len(theta) != n:
            raise ValueError(f"sample({n}) gave {len(theta)} vectors: expected {n}")
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from error
    return theta.to("cpu", copy=True)


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Global random numbers (also NumPy's and Python's) from a seed, so that who draws from them repeats; afterwards they and
    PyTorch's settings are as they were."""
    dtype, states = torch.get_default_dtype(), (random.getstate(), np.random.get_state())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with training.seeded(seed), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_default_dtype(dtype)
