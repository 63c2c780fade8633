"""Steps before a generator, which any of them can be wrapped in: `Coded(generator, PCA(99))`.

A step has `fit(theta)`, `encode(theta [M D]) -> [M L]` and `decode(code [M L]) -> [M D]`. These two are here; the order of hidden
units is `symmetry.Canonical`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pdiff_lib.base import runs, vectors
from pdiff_lib.generators import autoencoder
from pdiff_lib.generators.methods import unconditional


@runtime_checkable
class Step(Protocol):
    """What comes before a generator, and is undone after it as far as it can be."""

    def fit(self, theta: Float[vectors.Array, "K D"]) -> Any: ...

    def encode(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M L"]: ...

    def decode(self, code: Float[vectors.Array, "M L"]) -> Float[Tensor, "M D"]: ...


class Standardise:
    """Each tensor by its mean and standard deviation: see `vectors.Standardiser`.

    Args:
        sizes: lengths of the tensors; None: the vector as one tensor.
        centre: "tensor" or "vector".
    """

    def __init__(self, sizes: Sequence[int] | None = None, centre: str = "tensor"):
        self.sizes, self.centre = sizes, centre

    def fit(self, theta: Float[vectors.Array, "K D"]) -> Standardise:
        """Learn the statistics."""
        self._standardiser = vectors.Standardiser(theta, self.sizes, self.centre)
        return self

    def encode(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M D"]:
        """Raw to standardised."""
        return self._standardiser(vectors.vectors(theta))

    def decode(self, code: Float[vectors.Array, "M D"]) -> Float[Tensor, "M D"]:
        """Standardised to raw."""
        return self._standardiser.inverse(vectors.vectors(code))


class PCA:
    """Coordinates along the principal components of what it is fitted to.

    Args:
        components: how many; of K vectors at most K-1, and then nothing of them is lost.

    Raises:
        ValueError: fewer than one.
    """

    def __init__(self, components: int):
        if components < 1:
            raise ValueError(f"components is {components}: expected at least 1")
        self.components = components

    def fit(self, theta: Float[vectors.Array, "K D"]) -> PCA:
        """Find the components."""
        self._pca = autoencoder.PCA.of(vectors.vectors(theta, at_least=2), self.components)
        return self

    def encode(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M L"]:
        """Vectors to coordinates."""
        return self._pca.encode(vectors.vectors(theta, self._pca.mean.numel(), device=self._pca.mean.device))

    def decode(self, code: Float[vectors.Array, "M L"]) -> Float[Tensor, "M D"]:
        """Coordinates to vectors."""
        return self._pca.decode(vectors.vectors(code, len(self._pca.basis), device=self._pca.mean.device))


class Coded:
    """A generator that learns from, and gives, codes of vectors; to the outside a generator like any other.

    Args:
        generator: anything with `fit` and `sample`; it sees codes, so that its `sizes` are those of a code (None: one tensor).
        steps: in the order in which they are applied; undone in the opposite order.

    Attributes:
        single, conditional: as of the generator.

    Raises:
        ValueError: no step, or one without `fit`, `encode` and `decode`.
    """

    def __init__(self, generator: Any, *steps: Step):
        for step in steps or (None,):
            if not isinstance(step, Step):
                raise ValueError(f"{step!r} is no step: expected at least one object with fit, encode and decode")
        self.generator, self.steps, self.single = generator, steps, getattr(generator, "single", False)
        self.conditional = getattr(generator, "conditional", "condition" in inspect.signature(generator.fit).parameters)

    def fit(self, theta: Float[vectors.Array, "K D"], store: runs.Store | None = None, condition: Tensor | None = None) -> Coded:
        """Fit each step to what those before it gave, then the generator.

        Args:
            theta: raw parameter vectors, at least two.
            store: for a generator that keeps stages.
            condition: [K C], for a generator that takes one.

        Raises:
            ValueError: what `vectors`, a step or the generator refuses.
        """
        code = vectors.vectors(theta, at_least=2)
        for step in self.steps:
            step.fit(code)
            code = vectors.vectors(step.encode(code))
        if not self.conditional:
            unconditional(self.generator, condition)
        kept = {"store": store, "condition": condition}
        takes = inspect.signature(self.generator.fit).parameters
        fitted = self.generator.fit(code, **{name: given for name, given in kept.items() if name in takes and given is not None})
        self.generator = fitted if hasattr(fitted, "sample") else self.generator
        return self

    def sample(self, n: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Float[Tensor, "n D"]:
        """n new raw parameter vectors.

        Args:
            n: how many.
            generator: of the random numbers.
            condition: [n C], for a generator that takes one.
        """
        if not self.conditional:
            unconditional(self.generator, condition)
        code = self.generator.sample(n, generator=generator, **({} if condition is None else {"condition": condition}))
        for step in reversed(self.steps):
            code = step.decode(vectors.vectors(code))
        return code
