"""Flow matching that does not see the order of hidden units: a transformer with a token per unit gives the velocity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pdiff_lib.base.recipe import setting
from pdiff_lib.base.runs import tensor_digest
from pdiff_lib.generators import flow

Groups = Sequence[Int64[Tensor, "U n"]]


@dataclass(frozen=True)
class Settings(flow.Settings):
    """Of `flow.Settings`, with `width` and `blocks` of the transformer; `heads`: of its attention. `places`: "none" (units are a
    set), "learned" (each unit knows its place in the vector), "auto" (learned where a number belongs to units of two layers, as
    between two hidden ones: what a unit reads then stands in an order of its own). `matching`: the units of the noise are paired with
    those of a network at the least total distance; only of sets."""

    width: int = setting(128, 1)
    blocks: int = setting(4, 1)
    heads: int = setting(4, 1)
    ema: float = setting(0.999, 0.0, 1.0)
    places: str = setting("auto", choices=("auto", "none", "learned"))
    matching: bool = True


class Block(nn.Module):
    """Attention and an MLP, both before a norm that the time shifts and scales, both weighed by it (Peebles and Xie 2023, adaLN; here
    weights start at 1)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.time = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, h: Float[Tensor, "B N W"], time: Float[Tensor, "B W"]) -> Float[Tensor, "B N W"]:
        """The tokens after the block."""
        scale, shift, weight, scale2, shift2, weight2 = self.time(time).unsqueeze(1).chunk(6, dim=-1)
        q, k, v = self.qkv(self.norms[0](h) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + (1 + weight) * self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + (1 + weight2) * self.mlp(self.norms[1](h) * (1 + scale2) + shift2)


class UnitTransformer(nn.Module):
    """v_theta(x_t, t) from a token per hidden unit (all numbers that move with it) and one for the numbers of no unit, and the input
    itself, scaled by a learned function of the time.

    Units of a group share their encoder and their decoder; a number of two units gets the sum of both answers. Without learned places
    a permutation of the units of one group permutes the answer: exactly, where there is one group.

    Args:
        numel: D.
        groups: positions of the numbers of each unit, by group.
        width, blocks, heads: of the transformer.
        places: whether each unit's place in the vector is known, by a learned token of its own.
    """

    def __init__(self, numel: int, groups: Groups, width: int, blocks: int, heads: int, places: bool):
        super().__init__()
        free = torch.ones(numel, dtype=torch.bool).index_fill_(0, torch.cat([g.flatten() for g in groups]).cpu(), False)
        kinds = [*groups, *([free.nonzero().T] if free.any() else [])]  # the rest: a group of one unit
        for i, g in enumerate(kinds):
            self.register_buffer(f"at{i}", g, persistent=False)
        self.encoders = nn.ModuleList(nn.Linear(g.shape[1], width) for g in kinds)
        self.decoders = nn.ModuleList(nn.Linear(width, g.shape[1]) for g in kinds)
        self.places = nn.Parameter(0.02 * torch.randn(sum(len(g) for g in kinds), width)) if places else None
        self.time = nn.Sequential(nn.Linear(flow.TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks, self.norm, self.gate = nn.ModuleList(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width), nn.Linear(width, 1)
        for layer in (*self.decoders, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "B D"], t: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """v_theta(x_t, t); t from 0 to 1."""
        kinds = [getattr(self, f"at{i}") for i in range(len(self.encoders))]
        time, h = self.time(flow.time_features(t)), torch.cat([encode(x[:, at]) for encode, at in zip(self.encoders, kinds)], dim=1)
        h = h if self.places is None else h + self.places
        for block in self.blocks:
            h = block(h, time)
        answer = self.gate(time) * x
        for decode, at, part in zip(self.decoders, kinds, self.norm(h).split([len(at) for at in kinds], dim=1)):
            answer = answer.index_add(1, at.flatten(), decode(part).flatten(1))
        return answer


class UnitFlow(flow.Flow):
    """Flow matching with the symmetry of hidden units built in (`UnitTransformer`): of networks with one hidden layer it learns the
    same from any order of their units. Their scales are not looked at: balance them before (`symmetry.Canonical`, which any order of
    the units is good for).

    Args:
        sizes: lengths of the tensors in a vector.
        groups: of hidden units, from `symmetry.groups`; at least one.
        others, attributes, errors: of `flow.Flow`, settings as of `Settings`.

    Source: ours. Flows on weights with the symmetry built in are Erdogan 2025 (arXiv 2504.03710), by graph networks; minimal distance
        between noise and sets is of Klein et al. 2023, "Equivariant flow matching".

    Raises:
        ValueError: no groups, positions beyond the vector or twice in a group, heads that do not divide the width, and what `Flow` refuses.
    """

    Settings = Settings
    CODE = (*flow.Flow.CODE, flow)

    def __init__(self, sizes: Sequence[int] | None, groups: Groups | None, device: str | torch.device | None = None, progress: bool = True,
                 **settings):
        super().__init__(sizes, device, progress, **settings)
        if not groups:
            raise ValueError(f"groups of hidden units: {groups}: expected at least one, as symmetry.groups finds them")
        for i, g in enumerate(groups):
            if g.ndim != 2 or g.is_floating_point() or g.min() < 0 or len(g.unique()) != g.numel():
                raise ValueError(f"group {i} is {g.dtype} {list(g.shape)}: expected [units numbers], each position once, from 0 on")
        s = self.settings
        if s.width % s.heads:
            raise ValueError(f"width is {s.width} with {s.heads} heads: expected a multiple of them")
        self.groups = tuple(g.to(self.device) for g in groups)
        shared = sum(g.numel() for g in groups) > len(torch.cat([g.flatten() for g in groups]).unique())
        self.places = s.places == "learned" or (s.places == "auto" and shared)

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        if (last := max(int(g.max()) for g in self.groups)) >= theta.shape[1]:
            raise ValueError(f"theta has {theta.shape[1]} numbers per vector: expected more than {last}, the last position of a unit")
        super()._prepare(theta)
        if self._standardiser is not None and not self.places:  # no unit differs from others by its statistics
            mean = self._standardiser.mean
            for g in self.groups:
                mean[g] = theta[:, g].mean(dim=(0, 1)).expand(len(g), -1)
            parts = (theta - mean).split(list(self.sizes or theta.shape[1:]), dim=1)
            std = torch.cat([part.square().mean().sqrt().expand(part.shape[1]) for part in parts])
            self._standardiser.std = torch.where(std > 0, std, 1.0)
            self._x1 = self._standardiser(theta)

    def _key(self, theta: Float[Tensor, "K D"]) -> dict[str, Any]:
        return {**super()._key(theta), "groups": [tensor_digest(g) for g in self.groups]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples of the fitted generator depend on, their random numbers apart."""
        return {**super().fingerprint, "groups": [tensor_digest(g) for g in self.groups]}

    def _build(self) -> UnitTransformer:
        s = self.settings
        return UnitTransformer(self.numel, self.groups, s.width, s.blocks, s.heads, self.places)

    def _pairs(self, g: torch.Generator) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        x0, x1 = super()._pairs(g)
        for units in self.groups if self.settings.matching and not self.places else ():
            gain = torch.einsum("bun,bvn->buv", x1[:, units], x0[:, units]).cpu().numpy()  # least distance: norms stay
            order = np.stack([linear_sum_assignment(m, maximize=True)[1] for m in gain])
            picked = units[torch.from_numpy(order).to(units.device)].flatten(1)
            x0 = x0.index_copy(1, units.flatten(), x0.gather(1, picked))
        return x0, x1
