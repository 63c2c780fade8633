"""One training loop for everything that is trained here, resumable to the bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib.runs import Checkpoint

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


def loop(loss_at: Callable[[int], Float[Tensor, ""]], steps: int, modules: Mapping[str, nn.Module],
         optimizer: torch.optim.Optimizer, *, schedule: str = "cosine", after: Callable[[int], None] | None = None,
         buffers: Mapping[str, Tensor] | None = None, checkpoint: Checkpoint | None = None, desc: str = "",
         progress: bool = True) -> Float[Tensor, "steps"]:
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

    Returns:
        The loss of each step, on the CPU.
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
        if checkpoint.due():
            checkpoint.save(_state(i + 1, modules, optimizer, own))
    losses = own["losses"].cpu()
    if not torch.isfinite(losses).all():
        first = int((~torch.isfinite(losses)).nonzero()[0])
        raise FloatingPointError(f"{desc or 'training'}: the loss is {float(losses[first])} at step {first} of {steps}: "
                                 f"expected finite values; a lower learning rate than {peaks[0]:g} is the usual remedy")
    return losses


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
