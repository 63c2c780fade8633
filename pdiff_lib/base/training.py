"""One training loop for everything that is trained here, resumable to the bit; on which device, and how exactly, it computes."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib.base.runs import Checkpoint

LOOK_SECONDS = 1.0  # how long a loss that is not finite may go unseen; each look makes the host wait for a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS repeats no sum; read when CUDA is first used

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda params, lr, weight_decay: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay),
}


def seed_for(seed: int, *where: int | str) -> int:
    """A 63-bit seed for one purpose (a stream's name, a step): randomness without a state to save.

    >>> seed_for(0, "autoencoder", 1) == seed_for(0, "autoencoder", 1) != seed_for(0, "autoencoder", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr((seed, *where)).encode(), digest_size=8).digest()) >> 1


def device_of(device: str | torch.device | None) -> torch.device:
    """The device asked for; CUDA when there is one and None is asked for.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for: torch.cuda.is_available() is False here")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left for this process."""
    if device.type == "cuda":  # what PyTorch holds and does not use is free as well
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global random numbers of the CPU are those of a seed; outside, they go on as if nothing had been. GPUs keep
    theirs: `torch.manual_seed` would set them too, and nothing would restore them."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def precision(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """How CUDA computes in float32 inside: deterministic where it can (what cannot is warned of by PyTorch), convolutions and
    matrix products alike; on a CPU nothing changes.

    Args:
        device: where the work is done.
        tf32: round the factors of products to 10 bits, for up to 8 times the speed. For training networks; what is measured
            (evaluation, encoding, sampling) is computed in full float32.
    """
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (products.allow_tf32, convolutions.allow_tf32, convolutions.deterministic, convolutions.benchmark,
              torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory)
    _set_precision(tf32, tf32, True, False, True, True, False)  # memory that is allocated here is always written before it is read
    try:
        yield
    finally:
        _set_precision(*before)


def _set_precision(products: bool, convolutions: bool, deterministic: bool, benchmark: bool, everywhere: bool, warn_only: bool,
                   fill: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    torch.use_deterministic_algorithms(everywhere, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def loop(loss_at: Callable[[int], Float[Tensor, ""]], steps: int, modules: Mapping[str, nn.Module],
         optimizer: torch.optim.Optimizer, *, schedule: str = "cosine", after: Callable[[int], None] | None = None,
         buffers: Mapping[str, Tensor] | None = None, checkpoint: Checkpoint | None = None, desc: str = "",
         progress: bool = True, tf32: bool = False) -> Float[Tensor, "steps"]:
    """Minimise a loss; picks up where a killed run stopped.

    Args:
        loss_at: the loss of step i (0-based). Its randomness must come from i alone (`seed_for`): that makes a resumed
            run repeat the uninterrupted one exactly.
        steps: number of optimizer steps.
        modules: what is trained, by name (saved with the optimizer).
        optimizer: its learning rate is the peak; `schedule` "cosine" decays it to 0, "constant" leaves it.
        after: called after each optimizer step with i.
        buffers: tensors that `after` fills in place and that must survive a kill.
        checkpoint: where the state is kept.
        desc: text of the progress bar.
        progress: show it.
        tf32: see `precision`.

    Returns:
        The loss of each step, on the CPU.

    Raises:
        FloatingPointError: a loss, or at the end a trained number, is infinite or NaN. It is noticed within seconds, and such a
            state is never kept as a checkpoint.
    """
    checkpoint = checkpoint or Checkpoint()
    peaks = [g["lr"] for g in optimizer.param_groups]
    device = optimizer.param_groups[0]["params"][0].device
    own = {"losses": torch.zeros(steps, device=device), **(buffers or {})}
    start = 0
    if (state := checkpoint.load()) is not None:
        start = _restore(state, modules, optimizer, own)
    bar = tqdm(range(start, steps), desc=desc, initial=start, total=steps, disable=not progress, mininterval=1.0,
               leave=False)
    looked = time.monotonic()
    with precision(device, tf32):
        for i in bar:
            factor = 0.5 * (1 + math.cos(math.pi * i / steps)) if schedule == "cosine" else 1.0
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            loss = loss_at(i)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            own["losses"][i] = loss.detach()
            if after is not None:
                after(i)
            due = checkpoint.due()
            if due or time.monotonic() - looked > LOOK_SECONDS:
                _check(own["losses"], steps, desc, peaks[0])
                looked = time.monotonic()
            if due:
                checkpoint.save(_state(i + 1, modules, optimizer, own))
    _check(own["losses"], steps, desc, peaks[0])
    bad = [f"{name}.{k}" for name, module in modules.items() for k, t in module.state_dict().items() if not torch.isfinite(t).all()]
    if bad:
        raise FloatingPointError(f"{desc or 'training'}: {len(bad)} tensors hold NaN or infinity after the last step, first {bad[0]}: "
                                 f"expected finite values; a lower learning rate than {peaks[0]:g} is the usual remedy")
    return own["losses"].cpu()


def _check(losses: Float[Tensor, "steps"], steps: int, desc: str, peak: float) -> None:
    """Steps that are still to come hold zero."""
    if bool(torch.isfinite(losses).all()):
        return
    first = int((~torch.isfinite(losses)).nonzero()[0])
    cause = ("nothing was learned yet: the starting weights or the inputs hold NaN, infinity or huge numbers" if first == 0
             else f"a lower learning rate than {peak:g} is the usual remedy")
    raise FloatingPointError(f"{desc or 'training'}: the loss is {float(losses[first])} at step {first} of {steps}: "
                             f"expected finite values; {cause}")


def _state(step: int, modules, optimizer, own) -> dict[str, Tensor]:
    state = {"step": torch.tensor(step)}
    for name, module in modules.items():
        state.update({f"module.{name}.{k}": v for k, v in module.state_dict().items()})
    for i, slots in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in slots.items() if v is not None})
    state.update({f"buffer.{k}": v for k, v in own.items()})
    return state


def _restore(state: Mapping[str, Tensor], modules, optimizer, own) -> int:
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)})
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, i, slot = key.split(".", 2)
            slots.setdefault(int(i), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, buffer in own.items():
        buffer.copy_(state[f"buffer.{name}"])
    return int(state["step"])
