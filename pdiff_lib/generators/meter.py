"""What a training step of p-diff takes, counted while it runs: the measured half of `memory`, whose `Step` every `step` is."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pdiff_lib.generators import denoiser
from pdiff_lib.generators.autoencoder import Autoencoder, noisy_reconstruction_loss
from pdiff_lib.generators.diffusion import Schedule

SCHEDULE = Schedule()


class Ran(NamedTuple):
    """What a run took: peak bytes of tensors, bytes by which the process grew at its highest, seconds per step."""

    counted: int
    resident: int
    seconds: float


class Meter(TorchDispatchMode):
    """Adds up the storages of tensors that operations create in its scope, for as long as they live.

    Exact and the same on every machine, unlike the size of a process, which has the allocator's reserves in it. Operations
    that work on tensors without data count as if they had some.

    Attributes:
        live, peak: bytes now, and at the highest.

    >>> with Meter() as meter:
    ...     x = torch.zeros(1000)
    ...     y = (x + 1).view(10, 100).sum()
    >>> meter.live, meter.peak
    (4004, 8004)
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._watch(t.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # views share one storage; an in-place operation returns a known one
        if key not in self._known:
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


class _Block(nn.Sequential):
    """Layers that keep their input only."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def _grouped(layers: nn.Sequential, count: int) -> nn.Sequential:
    blocks = [_Block(*layers[3 * i: 3 * i + 3]) for i in range(count)]
    return nn.Sequential(*blocks, *layers[3 * count:])


def prepared(step: Any, device: torch.device) -> tuple[nn.Module, Callable[..., None]]:
    """The network and a call that makes one training step, as `fit` of the autoencoder and of the denoiser do; with a number, of no
    more passes than that."""
    generator = torch.Generator(device)
    with torch.device(device):
        if step.part == "autoencoder":
            net, batch = Autoencoder(step.numel, step.latent_dim, step.channels), torch.randn(step.batch, step.numel)
        else:
            net, batch = denoiser.Denoiser(step.latent_dim, step.channels), torch.randn(step.batch, step.latent_dim)
    if step.recompute:
        net.encoder, net.decoder = (_grouped(layers, len(step.channels)) for layers in (net.encoder, net.decoder))
    if step.bf16:
        for name in ("encode", "decode") if step.part == "autoencoder" else ("forward",):
            setattr(net, name, torch.autocast(device.type, torch.bfloat16)(getattr(net, name)))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5)

    def loss_of(x: Tensor) -> Tensor:
        if step.part == "autoencoder":
            return noisy_reconstruction_loss(net, x, 1e-3, 0.1, generator)
        t = torch.zeros(len(x), dtype=torch.long, device=device)
        return denoiser.noise_loss(net, x, t, torch.randn_like(x), SCHEDULE).mean()

    def train(at_most: int = step.passes) -> None:
        for i, x in enumerate(batch.split(step.batch // step.passes)[:at_most]):
            loss = loss_of(x) / step.passes
            if i == 0:
                optimizer.zero_grad(set_to_none=True)  # after the forward pass, as `training.loop`
            loss.backward()
        optimizer.step()

    return net, train


def peak(step: Any, device: torch.device, whole: bool = True) -> int:
    """Peak bytes of the second step; the first makes AdamW's moments. Not `whole`: of as few passes as reach it, one of the first
    step and two of the second, as a third holds what the second held."""
    with Meter() as meter:
        _, train = prepared(step, device)
        train(step.passes if whole else 1)
        meter.peak = meter.live
        train(step.passes if whole else 2)
    return meter.peak


def run(step: Any, device: torch.device, threads: int) -> Ran:
    torch.set_num_threads(threads)
    peak(replace(step, numel=64, latent_dim=4, channels=(2,) * 5, batch=2, passes=1), torch.device("cpu"))  # lazy imports
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2**16)  # glibc: give freed tensors back, instead of keeping those below 32 MB
    if device.type == "cuda":
        _, train = prepared(step, device)
        train()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()  # the clock starts when nothing is left to do
    before, start = _status("VmRSS"), time.perf_counter()
    if device.type == "cuda":
        train()
        torch.cuda.synchronize()
        allocated = torch.cuda.max_memory_allocated()
        return Ran(allocated, allocated, time.perf_counter() - start)
    counted = peak(step, device)
    return Ran(counted, _status("VmHWM") - before, (time.perf_counter() - start) / 2)


def _status(field: str) -> int:
    """A size of this process from Linux's /proc, in bytes."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))
