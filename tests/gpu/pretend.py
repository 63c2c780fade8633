"""GPUs that are pretended: numbers are computed on the CPU, and every tensor knows on which device it is said to lie.

    with Pretend() as gpu:
        method.fit(theta.to("cuda"))
    print(gpu.table())

Where CUDA raises, this raises: tensors of two devices in one operation (a CPU tensor without axes may join elementwise
ones), NumPy on a CUDA tensor, a generator of another device. An error that the code under test catches is raised again at the
end of the `with`. What a GPU would do is counted by the line that asks for it (see `EVENTS`).

The place is an attribute of a tensor's storage, so views, detached tensors and those that autograd saved share it. Random
numbers are the CPU's wherever the generator lives, and autocast changes nothing: a pretended run gives the numbers of a run
on the CPU. Not there: kernels that CUDA lacks, its rounding, its memory, streams. Modes belong to a thread, so
`asyncio.to_thread` works in the same one.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # else it is imported by the first `torch.zeros`, and looks for all functions of `torch.cuda`
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from gpu.operations import CPU, Operations, beneath, is_pinned, is_plain, numbered, place, put, tensors_in

# "launch": an operation on CUDA tensors; "wait": the host waits for a result; "upload", "download": a copy from the host and
# to it, a wait as well unless it comes from "pinned" memory; "reseed": all generators of all GPUs.
EVENTS = ("launch", "wait", "upload", "download", "reseed")
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class Generator(torch.Generator):
    """Says where it lives; its numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.place = numbered(device)
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.place


class Pretend:
    """See the module.

    Args:
        devices: how many GPUs; "cuda" is the first.
        free: bytes that each of them says are free, whatever it holds.
        package: a part of the paths of the files whose lines are named.

    Attributes:
        events: how often, by (kind, operation, line); kinds are `EVENTS`.
        faults: the errors raised so far, each with its line.
    """

    def __init__(self, devices: int = 1, free: int = 80 << 30, package: str = "pdiff_lib"):
        self.devices, self.free, self.package = devices, free, package
        self.events: Counter[tuple[str, str, str]] = Counter()
        self.faults: list[tuple[Exception, str]] = []
        self._modes, self._patches = ExitStack(), ExitStack()

    def __enter__(self) -> Pretend:
        ignored = ("_lazy_init", "empty_cache", "set_rng_state", "reset_peak_memory_stats")
        answers = {"is_available": True, "is_initialized": True, "device_count": self.devices, "current_device": 0,
                   "is_bf16_supported": True, "is_current_stream_capturing": False, "memory_allocated": 0,
                   "memory_reserved": 0, "max_memory_allocated": 0, "mem_get_info": (self.free, self.free)}
        cuda = {**{name: lambda *a, value=value, **k: value for name, value in (dict.fromkeys(ignored) | answers).items()},
                "get_device_name": lambda device=None: f"pretended GPU {numbered('cuda' if device is None else device).index}",
                "get_device_properties": lambda device=None: SimpleNamespace(total_memory=self.free),
                "synchronize": lambda device=None: self.note("wait", "synchronize"),
                "manual_seed": lambda seed: self.note("reseed", "manual_seed"),
                "manual_seed_all": lambda seed: self.note("reseed", "manual_seed_all"),
                "get_rng_state": lambda device="cuda": torch.get_rng_state()}
        self._patches = ExitStack()
        for patch in (mock.patch.multiple(torch.cuda, **cuda), mock.patch.object(torch, "Generator", Generator),
                      mock.patch.object(torch.export, "export", self._export(torch.export.export)),
                      mock.patch.object(asyncio, "to_thread", _in_this_thread)):
            self._patches.enter_context(patch)
        self._begin()
        return self

    def __exit__(self, kind, *error) -> None:
        self._modes.close()
        self._patches.close()
        if kind is None and self.faults:
            raise self.faults[0][0]

    def _begin(self) -> None:
        self._modes = ExitStack()
        calls = _Calls(self)
        self._modes.enter_context(Operations(self, calls.working))
        self._modes.enter_context(calls)

    @contextmanager
    def paused(self):
        """Nothing is pretended inside."""
        self._modes.close()
        try:
            yield
        finally:
            self._begin()

    def note(self, kind: str, what: str) -> None:
        self.events[kind, what, self._line()] += 1

    def fail(self, error: Exception) -> None:
        self.faults.append((error, self._line()))
        raise error

    def _line(self) -> str:
        """The line of the package, or of whoever calls torch, that is being executed."""
        frame, outside = sys._getframe(2), ""
        while frame is not None:
            path = frame.f_code.co_filename
            if self.package in path:
                return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
            if not outside and "/torch/" not in path and path != __file__ and not path.startswith("<"):
                outside = f"{path.rpartition('/')[2]}:{frame.f_lineno}"
            frame = frame.f_back
        return outside

    def count(self, *kinds: str) -> int:
        """Events of these kinds so far."""
        return sum(n for (kind, *_), n in self.events.items() if kind in kinds)

    def table(self, *kinds: str) -> str:
        """A line per kind, line of code and operation, the most frequent first; of some kinds, or of all."""
        return "\n".join(f"{n:8,} {kind:9} {line:28} {what}" for (kind, what, line), n in self.events.most_common()
                         if kind in (kinds or EVENTS))

    def _export(self, export):
        """`torch.export.export`, whose own tensors have no data: captured on the CPU, at work where the example lies."""
        def captured(net, args, **how):
            with self.paused():
                program = export(net, args, **how)
            return self._at_work(program, place(tensors_in(args)[0]))
        return captured

    def _at_work(self, program: torch.export.ExportedProgram, where: torch.device) -> torch.export.ExportedProgram:
        """A captured network whose constants are made on a device."""
        for node in program.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": where}
        decompose = program.run_decompositions

        def decomposed(table):
            with self.paused():
                out = decompose(table)
            return self._at_work(out, where)

        program.run_decompositions = decomposed
        return program


async def _in_this_thread(function, *args, **kwargs):
    return function(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """What Python asks of torch: devices are answered, and taken out of the arguments.

    Attributes:
        working: the device on which each of the nested calls works. What an operation makes inside itself lies there.
    """

    def __init__(self, gpu: Pretend):
        super().__init__()
        self.gpu, self.working = gpu, [CPU]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        t = args[0] if args and isinstance(args[0], Tensor) else None
        if t is not None and is_plain(beneath(t)):
            if function in self.OF_A_TENSOR:
                return self.OF_A_TENSOR[function](self, t, *args[1:], **kwargs)
            if function in (Tensor.numpy, Tensor.__array__) and place(t) != CPU and not kwargs.get("force"):
                self.gpu.fail(TypeError(f"can't convert {place(t)} device type tensor to numpy. Use Tensor.cpu() to copy the "
                                        "tensor to host memory first."))
            if function is Tensor.tolist and place(t) != CPU:
                self.gpu.note("download", "tolist")
        wanted = kwargs.get("device")
        if wanted is not None and numbered(wanted).type not in ("cpu", "cuda"):
            return function(*args, **kwargs)
        if function in FROM_HOST:
            return self._from_host(function, args, kwargs)
        there = [place(x) for x in tensors_in((args, kwargs)) if is_plain(beneath(x))]
        where = next((p for p in there if p != CPU), CPU) if wanted is None else numbered(wanted)
        if wanted is not None:
            kwargs["device"] = CPU
        generator = kwargs.get("generator")
        if generator is not None and generator.device != where:
            self.gpu.fail(RuntimeError(f"Expected a '{where}' device type for generator but found '{generator.device}'"))
        return self._at(where, function, *args, **kwargs)

    def _at(self, where: torch.device, function, *args, **kwargs):
        self.working.append(where)
        try:
            return function(*args, **kwargs)
        finally:
            self.working.pop()

    def _from_host(self, function, args, kwargs):
        """Tensors made of numbers, or of a tensor that may lie elsewhere."""
        wanted, source = kwargs.get("device"), args[-1] if args else kwargs["data"]
        inherited = place(args[0]) if args and isinstance(args[0], Tensor) else CPU
        where = inherited if wanted is None else numbered(wanted)
        if isinstance(source, Tensor) and place(source) != where:
            return self._moved(source, where, function.__name__, **{k: v for k, v in kwargs.items() if k == "dtype"})
        for _ in [t for t in tensors_in(source) if not isinstance(source, Tensor) and place(t) != CPU]:
            self.gpu.note("wait", function.__name__)  # each is read by itself
        out = self._at(where, function, *args, **{**kwargs, **({} if wanted is None else {"device": CPU})})
        if where != CPU and not isinstance(source, Tensor):
            self.gpu.note("upload", function.__name__)
        return put(out, where) if where != CPU else out

    def _moved(self, t: Tensor, where: torch.device, what: str, **kwargs) -> Tensor:
        out = self._at(where, Tensor.to, t, **kwargs)
        if where == place(t):
            return out
        self.gpu.note("download" if where == CPU else "upload", f"{what} {str(t.dtype)[6:]} {list(t.shape)}")
        with _disable_current_modes():  # the copy itself, with a storage of its own; differentiable
            return put(torch.clone(out), where)

    def _to(self, t: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
        if args and isinstance(args[0], Tensor) or "other" in kwargs:
            other = kwargs.get("other", args[0] if args else None)
            return self._moved(t, place(other), "to", dtype=other.dtype, copy=copy)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type not in ("cpu", "cuda"):
            return Tensor.to(t, *args, **kwargs)
        given = {"dtype": dtype, "memory_format": layout}
        how = "pinned" if non_blocking and is_pinned(t) else "to"
        return self._moved(t, place(t) if device is None else numbered(device), how, copy=copy,
                           **{k: v for k, v in given.items() if v is not None})

    def _pin(self, t: Tensor, *_) -> Tensor:
        if place(t) != CPU:
            self.gpu.fail(RuntimeError(f"cannot pin a tensor on device {place(t)}: only dense CPU tensors can be pinned"))
        if is_pinned(t):
            return t
        out = torch.clone(t)
        out.untyped_storage().pinned = True
        return out

    def _deepcopy(self, t: Tensor, memo) -> Tensor:
        with _disable_current_modes():  # copies storages, which have no place yet
            out = Tensor.__deepcopy__(t, memo)
        return out if place(t) == CPU else put(out, place(t))

    OF_A_TENSOR = {
        Tensor.device.__get__: lambda self, t, *_: place(t),
        Tensor.is_cuda.__get__: lambda self, t, *_: place(t) != CPU,
        Tensor.is_cpu.__get__: lambda self, t, *_: place(t) == CPU,
        Tensor.get_device: lambda self, t: -1 if place(t) == CPU else place(t).index,
        Tensor.to: _to,
        Tensor.type_as: lambda self, t, other: self._moved(t, place(other), "type_as", dtype=other.dtype),
        Tensor.cuda: lambda self, t, device="cuda", **_: self._moved(t, numbered(device), "cuda"),
        Tensor.cpu: lambda self, t, **_: self._moved(t, CPU, "cpu"),
        Tensor.pin_memory: _pin,
        Tensor.is_pinned: lambda self, t, *_: is_pinned(t),
        Tensor.__deepcopy__: _deepcopy,
    }
