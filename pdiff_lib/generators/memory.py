"""What p-diff's training takes: closed forms of parameters and bytes, and the same counted while a step runs.

`Step` is one training step of the autoencoder or of the denoiser. `need` is its closed form. `counted` executes its
operations without data, and `run` with data in a process of its own; both add up the storages that are alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pdiff_lib.base import training
from pdiff_lib.generators import denoiser, meter

PARTS = ("autoencoder", "denoiser")
KERNEL = 7
FLOAT, HALF = 4, 2  # bytes of a number in float32 and in bfloat16


class Need(NamedTuple):
    """Bytes of one training step by what holds them.

    Attributes:
        parameters: how many numbers are trained.
        largest: numbers in the largest tensor of parameters.
        activations: bytes kept by the forward pass for the backward pass.
        forward: bytes that the forward pass holds at its peak, beyond what it keeps at its end.
        backward: bytes that the backward pass adds to the activations at its peak.
        batch: bytes of the batch itself.
        accumulated: gradients stay during the backward pass (several passes per step).
    """

    parameters: int
    largest: int
    activations: int
    forward: int
    backward: int
    batch: int
    accumulated: bool = False

    @property
    def state(self) -> int:
        """Bytes that stay between two steps: parameters, gradients, AdamW's two moments."""
        return 4 * FLOAT * self.parameters

    @property
    def peak(self) -> int:
        """The highest of three moments: in the forward pass, in the backward pass, at AdamW's update of the largest tensor.

        The first pass of a step drops the gradients of the step before when its backward pass begins.
        """
        dropped = 0 if self.accumulated else FLOAT * self.parameters
        forward = self.state + self.activations + self.forward
        backward = self.state - dropped + self.activations + self.backward
        return self.batch + max(forward, backward, self.state + 2 * FLOAT * self.largest)


@dataclass(frozen=True)
class Step:
    """One training step.

    Args:
        part: "autoencoder" or "denoiser".
        numel: D (the denoiser does not depend on it).
        latent_dim: L.
        channels: of the part; None: the paper's.
        batch: vectors (or latents) per step.
        passes: the batch is cut into this many forward and backward passes, whose gradients add up.
        recompute: keep only what enters each convolution block, and compute the rest again in the backward pass
            (activation checkpointing; autoencoder only).
        bf16: autocast, as the authors train both (here only the denoiser is, on CUDA).

    Raises:
        ValueError: an unknown part, a size below 1, passes that do not divide the batch into at least 2 each,
            `recompute` for the denoiser or together with bf16.

    Source: Eq. 5, Eq. 6, Table 13.
    """

    part: str
    numel: int = 2048
    latent_dim: int = 128
    channels: tuple[int, ...] | None = None
    batch: int = 50
    passes: int = 1
    recompute: bool = False
    bf16: bool = False

    def __post_init__(self):
        if self.part not in PARTS:
            raise ValueError(f"part is {self.part!r}: expected one of {', '.join(map(repr, PARTS))}")
        defaults = {"autoencoder": (64, 128, 256, 256, 32), "denoiser": (64, 128, 256, 512, 256, 128, 64)}
        object.__setattr__(self, "channels", tuple(self.channels or defaults[self.part]))
        for name in ("numel", "latent_dim", "batch", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.batch % self.passes or self.batch // self.passes < 2:
            raise ValueError(f"passes is {self.passes}: expected a divisor of the batch ({self.batch}) that leaves at least 2 "
                             "vectors per pass (batch norm)")
        if self.recompute and (self.part != "autoencoder" or self.bf16):
            raise ValueError("recompute is True: expected the autoencoder in float32, the only closed form there is")

    @property
    def need(self) -> Need:
        """The closed form."""
        return (_autoencoder if self.part == "autoencoder" else _denoiser)(self)

    def counted(self) -> int:
        """Peak bytes of tensors in one step (the second, when AdamW has its moments), without running it.

        Every operation is executed on tensors without data (torch's FakeTensorMode), so any D takes half a second; what a
        backend allocates inside an operation (workspaces of a convolution) is not seen.
        """
        with FakeTensorMode(allow_non_fake_inputs=True):
            return meter.peak(self, torch.device("cpu"), whole=False)

    def run(self, device: str | torch.device | None = None) -> meter.Ran:
        """Run two steps in a process of its own, so that peaks do not mix.

        Args:
            device: None: CUDA when there is one.

        Returns:
            Its peaks; on CUDA both are `torch.cuda.max_memory_allocated`.

        Raises:
            ValueError: the denoiser on CUDA without bf16.
            MemoryError: the system ended the process.
        """
        device = training.device_of(device)
        if device.type == "cuda" and self.part == "denoiser" and not self.bf16:
            raise ValueError("bf16 is False: expected True on CUDA, where the denoiser trains under autocast")
        with ProcessPoolExecutor(1, mp_context=_fresh(device.type)) as pool:
            try:
                return pool.submit(meter.run, self, device, torch.get_num_threads()).result()
            except BrokenProcessPool:
                raise MemoryError(f"{self} was ended by the system: its closed form is {self.need.peak / 1e9:.1f} GB") from None

    def largest_numel(self, budget: int) -> int:
        """The largest D (a multiple of 64) whose closed form fits into `budget` bytes; 0: none.

        >>> Step("autoencoder", latent_dim=1024).largest_numel(40 * 10**9)
        188672
        """
        low, high = 0, 64
        while replace(self, numel=high).need.peak <= budget:
            low, high = high, 2 * high
        while high - low > 64:
            middle = (low + high) // 128 * 64
            low, high = (middle, high) if replace(self, numel=middle).need.peak <= budget else (low, middle)
        return low


def _fresh(device: str) -> BaseContext:
    """How to start a process that has imported all and done nothing: copied from one that is kept so, or, for CUDA and where the
    system has no such copies, anew each time."""
    if device == "cuda" or "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([meter.__name__])
    return context


def _autoencoder(step: Step) -> Need:
    c, L, b = step.channels, step.latent_dim, step.batch // step.passes
    multiple = max(64, 2 ** len(c))
    D = -(-step.numel // multiple) * multiple
    flat = c[-1] * D // 2 ** len(c)
    up = (*reversed(c[:-1]), c[0])
    convolutions = [*zip((1, *c), c), *zip(reversed(c), up), (c[0], 1)]
    sizes = [KERNEL * i * o for i, o in convolutions] + [flat * L, L * L, flat * L]
    parameters = sum(sizes) + sum(o for _, o in convolutions) + 2 * L + flat + 2 * sum(c) + 2 * sum(up)
    # What a block of the encoder (its length halved each time) and of the decoder (doubled) gives.
    blocks = [o * D // 2 ** (i + 1) for i, o in enumerate(c)] + [o * D // 2 ** (len(c) - 1 - i) for i, o in enumerate(up)]
    each = 1 if step.recompute else 3  # convolution, batch norm and activation each keep one
    compute = D + each * sum(blocks) + 2 * L + flat
    loss = D + step.numel  # output and target
    statistics = 0 if step.recompute else 2 * (sum(c) + sum(up))
    width = HALF if step.bf16 else FLOAT
    activations = b * (width * compute + FLOAT * loss) + FLOAT * statistics
    if step.bf16:
        activations += HALF * b * D + HALF * sum(sizes)  # the output in both types; the weights, cast
    backward = b * blocks[-1] * (3 * FLOAT if step.recompute else width)
    forward = b * FLOAT * max(0, blocks[-1] - loss) if step.recompute else 0  # the last block, before the loss is there
    return Need(parameters, max(sizes), activations, forward, backward, FLOAT * step.batch * step.numel, step.passes > 1)


def _denoiser(step: Step) -> Need:
    c, L, b, F = step.channels, step.latent_dim, step.batch // step.passes, denoiser.TIME_FEATURES
    convolutions = list(zip((1, *c), (*c, 1)))
    sizes = [KERNEL * i * o for i, o in convolutions] + [F * L, L * L]
    parameters = sum(sizes) + sum(o for _, o in convolutions) + 2 * L + 2 * sum(c)
    # A convolution keeps its input (1, *c), batch norm and ELU theirs (c twice); then the time embedding, and the loss.
    compute = (1 + 3 * sum(c) + 2) * L + F
    width = HALF if step.bf16 else FLOAT
    activations = b * (width * compute + FLOAT * L) + FLOAT * 2 * sum(c)
    if step.bf16:
        activations += HALF * sum(sizes)
    forward = b * L * width * max(0, *_skips(c))
    return Need(parameters, max(sizes), activations, forward, b * L * width * c[-1], FLOAT * step.batch * L, step.passes > 1)


def _skips(c: Sequence[int]) -> list[int]:
    """Channels alive at the end of each block of the denoiser, beyond those kept for the backward pass at the very end."""
    half, extra = len(c) // 2, []
    for i in range(len(c)):
        waiting = sum(c[: min(i, half, len(c) - i)])  # outputs that a later block adds
        own = c[i] + (c[i - 1] if i > half else 0)  # output and input (before the middle, the input is one that waits)
        extra.append(waiting + own - sum(a + 2 * b for a, b in zip(c[i:], c[i + 1:])) - c[-1])
    return extra
