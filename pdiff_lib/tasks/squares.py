"""Tasks on square images that training sees whole, mirrored at most."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pdiff_lib.base import recipe
from pdiff_lib.tasks.task import Task


class OnSquares(Task):
    """What such tasks share.

    Attributes:
        shape: (C, s, s) of the images.
    """

    shape: tuple[int, int, int]

    @property
    def title(self) -> str:
        return f"{self.name} at {self.shape[1]} px"

    @property
    def example(self) -> Float[Tensor, "1 C s s"]:
        return torch.zeros(1, *self.shape)

    def uncropped(self, base: recipe.Base) -> None:
        """Refuse a recipe that would crop images: what is in them, or what they look like, is what is learned."""
        if base.crop_scale != 1:
            raise ValueError(f"crop_scale is {base.crop_scale}: expected 1.0 with {type(self).__name__}, whose images are mirrored (flip) at most")
