"""Where tensors are said to lie, and what each operation of PyTorch's does with those of several devices (see `pretend`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
aten = torch.ops.aten
# Whose result, or its size, the host must know.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
         aten.equal, aten.bincount, aten.histc, aten.multinomial, aten._linalg_svd, aten._linalg_eigh, aten._linalg_solve_ex,
         aten.linalg_qr}
COPIES = {aten.copy_, aten._to_copy}  # between devices, of any kind
INDEXED = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
FILLED = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}  # take a number from a CPU tensor, as elementwise ones
NO_WORK = {aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided,
           aten.new_empty, aten.new_empty_strided, aten._local_scalar_dense}


def place(t: Tensor) -> torch.device:
    """The device on which a tensor is said to lie."""
    return getattr(beneath(t).untyped_storage(), "place", CPU)


def put(t: Tensor, device: torch.device) -> Tensor:
    beneath(t).untyped_storage().place = device
    return t


def is_pinned(t: Tensor) -> bool:
    return getattr(t.untyped_storage(), "pinned", False)


def beneath(t: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # of vmap and grad
        t = torch._C._functorch.get_unwrapped(t)
    return t


def tensors_in(values) -> list[Tensor]:
    """Those among arguments or results, in lists too (torch's own function for trees takes half the time of a run)."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [t for v in values if isinstance(v, (Tensor, list, tuple, dict)) for t in tensors_in(v)]


def numbered(wanted) -> torch.device:
    """A device with its number, as tensors have it."""
    device = torch.device(wanted)
    return torch.device(device.type, device.index or 0) if device.type == "cuda" else device


def is_plain(t: Tensor) -> bool:
    """Neither on the meta device nor one of torch's own tensors without data."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta


class Operations(TorchDispatchMode):
    """What C++ executes, beneath autograd and vmap: operands are compared, results placed, events counted."""

    def __init__(self, gpu, working: list[torch.device]):
        super().__init__()
        self.gpu, self.working = gpu, working

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors, wanted = tensors_in((args, kwargs)), kwargs.get("device")
        if not all(map(is_plain, tensors)) or (wanted is not None and torch.device(wanted).type == "meta"):
            return operation(*args, **kwargs)
        packet = operation.overloadpacket
        there = [place(t) for t in tensors]
        where, mixed = next((p for p in there if p != CPU), CPU), len(set(there)) > 1
        if wanted is not None and torch.device(wanted).type == "cuda":  # of a captured graph
            where, kwargs["device"] = numbered(wanted), CPU
        elif wanted is not None or not tensors:
            where = self.working[-1]
        if where == CPU:
            return operation(*args, **kwargs)
        if packet in INDEXED:
            self._compare_indices(packet, args[0], [i for i in args[1] if i is not None], *args[2:3])
        elif mixed and packet not in COPIES:
            self._compare(operation, packet, args, tensors)
        out = operation(*args, **kwargs)
        if not (packet in COPIES and there[0] == CPU):
            for t in tensors_in(out):
                put(t, where)
        if packet in COPIES and mixed:
            self.gpu.note("download" if there[0] == CPU else "upload", f"{packet.__name__} {list(tensors[1].shape)}")
        elif not operation.is_view and packet not in NO_WORK:
            self.gpu.note("launch", packet.__name__)
        if packet in WAITS or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            self.gpu.note("wait", packet.__name__)
        return out

    def _compare(self, operation, packet, args, tensors: list[Tensor]) -> None:
        if packet.__name__.startswith("_foreach"):
            for group in zip(*(a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], Tensor))):
                self._together(packet, list(group), True)
            return
        self._together(packet, tensors, torch.Tag.pointwise in operation.tags or packet in FILLED)
        written = [a for a, s in zip(args, operation._schema.arguments) if s.is_write and isinstance(a, Tensor)]
        self._together(packet, [*written, max(tensors, key=lambda t: place(t) != CPU)] if written else [], False)

    def _compare_indices(self, packet, t: Tensor, indices: list[Tensor], value: Tensor | None = None) -> None:
        if any(place(i) not in (CPU, place(t)) for i in indices):
            self.gpu.fail(RuntimeError("indices should be either on cpu or on the same device as the indexed tensor "
                                       f"({place(t)})"))
        for i in indices if place(t) != CPU else ():
            if place(i) == CPU:
                self.gpu.note("upload", f"index {list(i.shape)}")
            if i.dtype in (torch.bool, torch.uint8):
                self.gpu.note("wait", "mask as index")
        if value is not None and value.ndim:
            self._together(packet, [t, value], False)

    def _together(self, packet, tensors: list[Tensor], numbers: bool) -> None:
        """Refuse tensors of different devices; with `numbers`, CPU tensors without axes may join."""
        found = {place(t) for t in tensors if not (numbers and t.ndim == 0 and place(t) == CPU)}
        if len(found) > 1:
            listed = ", ".join(f"{place(t)} {list(t.shape)}" for t in tensors)
            self.gpu.fail(RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                                       f"{' and '.join(sorted(map(str, found)))}! ({packet.__name__}: {listed})"))
