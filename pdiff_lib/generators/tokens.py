"""Parameter vectors as sequences of tokens of one length, padded where a tensor ends; nothing is lost either way."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Tokens:
    """Which number of a vector stands where in its tokens.

    Args:
        positions: [N L] places in the vector, -1: padding; each place once.
        tensor: [N] the number of the tensor (or layer) that a token is of.

    Attributes:
        mask: [N L] where a token holds a number.
        within: [N] the token's number within its tensor.

    Raises:
        ValueError: places that are not 0 to D-1, each once.

    >>> tokens = Tokens.cut((3, 1), 2); tokens.encode(torch.tensor([[1., 2., 3., 4.]]))
    tensor([[[1., 2.],
             [3., 0.],
             [4., 0.]]])
    """

    def __init__(self, positions: Int64[Tensor, "N L"], tensor: Int64[Tensor, "N"]):
        self.positions, self.tensor, self.mask = positions, tensor, positions >= 0
        self.numel = int(self.mask.sum())
        if not positions[self.mask].sort().values.equal(torch.arange(self.numel)):
            raise ValueError(f"{self.numel} places in tokens: expected 0 to {self.numel - 1}, each once")
        first = torch.searchsorted(tensor, tensor)  # tokens of a tensor follow each other
        self.within = torch.arange(len(tensor)) - first
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def cut(cls, sizes: Sequence[int], length: int) -> Tokens:
        """Each tensor, flattened, cut into pieces of `length` (RPG, G.pt)."""
        return cls._of([torch.arange(size)[None] for size in sizes], length)

    @classmethod
    def rows(cls, shapes: Sequence[tuple[int, ...]], length: int) -> Tokens:
        """One row per output unit: its weights, then its bias, cut into pieces of `length` (SANE). A bias is a vector that
        follows a tensor of at least two axes with as many outputs; what else is a vector (of a norm) has rows of one number."""
        layers, open_to_bias = [], False
        for shape in shapes:
            places = torch.arange(prod(shape)).reshape(shape[0] if shape else 1, -1)
            if open_to_bias and len(shape) == 1 and len(layers[-1]) == shape[0]:
                layers[-1], open_to_bias = torch.cat([layers[-1], places + layers[-1].numel()], dim=1), False
            else:
                layers.append(places)
                open_to_bias = len(shape) > 1
        return cls._of(layers, length)

    @classmethod
    def _of(cls, layers: Sequence[Int64[Tensor, "_ _"]], length: int) -> Tokens:
        if length < 1:
            raise ValueError(f"tokens of length {length}: expected at least 1")
        start, positions, tensor = 0, [], []
        for i, layer in enumerate(layers):
            pieces = -(-layer.shape[1] // length)
            padded = torch.full((len(layer), pieces * length), -1)
            padded[:, :layer.shape[1]] = layer + start
            positions.append(padded.reshape(-1, length))
            tensor.append(torch.full((len(positions[-1]),), i))
            start += layer.numel()
        return cls(torch.cat(positions), torch.cat(tensor))

    def __len__(self) -> int:
        """N, how many tokens a vector has."""
        return len(self.positions)

    def encode(self, theta: Float[Tensor, "M D"]) -> Float[Tensor, "M N L"]:
        """Vectors to tokens; padding is 0."""
        if theta.shape[-1] != self.numel:
            raise ValueError(f"vectors of {theta.shape[-1]} numbers: expected {self.numel}")
        positions, mask = self._on(theta.device)
        return theta[..., positions.clamp(min=0)].where(mask, 0.0)

    def decode(self, tokens: Float[Tensor, "M N L"]) -> Float[Tensor, "M D"]:
        """Tokens to vectors; what stands on padding is left out."""
        positions, mask = self._on(tokens.device)
        theta = tokens.new_zeros(*tokens.shape[:-2], self.numel)
        theta[..., positions[mask]] = tokens[..., mask]
        return theta

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions and mask on a device; copied there once."""
        if device not in self._copies:
            self._copies[device] = self.positions.to(device), self.mask.to(device)
        return self._copies[device]
