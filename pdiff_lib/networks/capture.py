"""Cutting a network in two: what no chosen parameter reaches, and the rest.

The network is captured as a graph (`torch.export`); every node that depends on a chosen parameter belongs to the rest.
A capture takes 0.1 to 4 s, and is worth it where it spares more than that: `Count` estimates both.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pdiff_lib.networks import rewrites
from pdiff_lib.networks.rewrites import dependents, writes
from pdiff_lib.networks.subset import tensors_of

aten = torch.ops.aten

# Seconds of one CPU core, measured (tests/benchmarks/README.md). Only their ratios matter, which other machines share.
OPERATION, ELEMENT, FLOP = 20e-6, 1.4e-9, 1 / 80e9  # per operation and batch; per number written and per FLOP, for each image
CAPTURE = 5e-3  # per operation of the network
MANY = 1_000_000  # numbers of a vector: to copy them into channels-last weights costs more than to call the network with them


class Split(NamedTuple):
    """A network in two parts: `rest(params, frozen(x))` equals the network with `params` in place of its own."""

    frozen: Callable[[Tensor], tuple[Tensor, ...]]
    rest: Callable[[dict[str, Tensor], tuple[Tensor, ...]], Tensor]
    captured: bool = True


def split(net: nn.Module, names: tuple[str, ...], example: Tensor) -> Split:
    """Cut a network in eval mode.

    Args:
        net: the network.
        names: its chosen parameters, and running statistics.
        example: a batch as the network takes it. The parts are valid for this shape alone, so that control flow which
            depends on the shape stays right.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export's own
        program = torch.export.export(net, (example,), strict=False)
        images, chosen, constants = _inputs(program, net, names)
        if not _in_place_is_harmless(program.graph, dependents(program.graph, chosen)):
            # The empty table only makes operations out of place; decomposing further would change kernels, and with
            # them the last bits. Not always done: it takes longer than the capture, and slows the frozen part by 9%.
            program = program.run_decompositions({})
            images, chosen, constants = _inputs(program, net, names)
    graph = program.graph
    rewrites.plain_batch_norms(graph, dependents(graph, chosen))
    rewrites.products_of_pixels(graph, dependents(graph, chosen), constants)
    rewrites.narrow_early(graph, dependents(graph, chosen))
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    dependent = dependents(graph, chosen)
    (scores,) = graph.output_node().args[0]
    boundary = [n for n in graph.nodes if n not in dependent and n not in constants
                and any(u in dependent or u.op == "output" for u in n.users)]

    frozen, rest = fx.Graph(), fx.Graph()
    in_frozen = {images: frozen.placeholder("x")}
    in_frozen |= {n: frozen.get_attr(n.name) for n in constants}
    params, handed = rest.placeholder("params"), rest.placeholder("boundary")
    in_rest = {n: rest.call_function(operator.getitem, (params, name)) for n, name in chosen.items()}
    in_rest |= {n: rest.get_attr(n.name) for n in constants}
    in_rest |= {n: rest.call_function(operator.getitem, (handed, i)) for i, n in enumerate(boundary)}
    for node in graph.nodes:
        if node.op == "call_function":
            here, values = (rest, in_rest) if node in dependent else (frozen, in_frozen)
            values[node] = here.node_copy(node, values.__getitem__)
    rest.output(in_rest[scores])
    frozen.output(tuple(in_frozen[n] for n in boundary))
    for part in (frozen, rest):
        part.eliminate_dead_code()
    attributes = {n.name: value for n, value in constants.items()}
    return Split(fx.GraphModule(attributes, frozen), fx.GraphModule(attributes, rest))


def whole(net: nn.Module) -> Split:
    """The plain way: nothing is frozen, and `net` itself takes the numbers of its chosen parameters. Faster than
    `torch.func.functional_call`, and each weight keeps its layout; but for many numbers, whose copying costs more than that."""
    own = tensors_of(net)

    def rest(params: dict[str, Tensor], boundary: tuple[Tensor, ...]) -> Tensor:
        if sum(value.numel() for value in params.values()) > MANY:
            return torch.func.functional_call(net, params, boundary)
        for name, value in params.items():
            own[name].copy_(value)
        return net(*boundary)

    return Split(lambda x: (x,), rest, captured=False)


def split_or_whole(net: nn.Module, names: tuple[str, ...], example: Tensor) -> Split:
    """`split`; of a network that cannot be captured, `whole`, with a warning that says why."""
    try:
        return split(net, names, example)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch.export has no common base for what it cannot capture
        warn_whole(net, error)
        return whole(net)


def warn_whole(net: nn.Module, error: Exception) -> None:
    """Say that a network is not captured, and why."""
    warnings.warn(f"{type(net).__name__} cannot be captured, so the whole network runs for every vector ({reason(error)})")


def reason(error: Exception) -> str:
    """What went wrong, on one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Count(TorchDispatchMode):
    """What a capture of a network would cost, and what it would spare: an estimate, from what the network does to one image.

    The frozen part is what no chosen parameter reaches, as in `split`. Operations, numbers written and FLOPs are counted,
    and no time is measured: the same calls take the same way each time, and predictions repeat to the last bit. A tensor
    that is written through a view of it counts as frozen.

    Args:
        net: the network.
        names: its chosen parameters.
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.net, self.chosen = net, [tensors_of(net)[name] for name in names]

    def run(self, image: Tensor) -> Tensor:
        """The scores of one image, counted."""
        self.operations = self.frozen = 0
        self.seconds_per_image = 0.0  # of the frozen part
        self.reached = {id(p): p for p in self.chosen}  # holds the tensors, so that no other gets their number
        try:
            with self:
                return self.net(image)
        finally:
            self.reached.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if any(id(t) in self.reached for t in _tensors((*args, *kwargs.values()) if kwargs else args)):
            self.reached.update((id(t), t) for t in _tensors((result,)))
            return result
        self.frozen += 1
        if not func.is_view:
            self.seconds_per_image += ELEMENT * sum(t.numel() for t in _tensors((result,)))
        if formula := flop_registry.get(func.overloadpacket):
            self.seconds_per_image += FLOP * formula(*args, **(kwargs or {}), out_val=result)
        return result

    def pays(self, batches: int, size: int) -> bool:
        """Whether a capture costs less than the frozen part over so many batches of `size` images."""
        return batches * (OPERATION * self.frozen + size * self.seconds_per_image) > CAPTURE * self.operations


def _tensors(values: Iterable) -> list[Tensor]:
    """The tensors among an operation's arguments or results, those in lists too."""
    flat = chain.from_iterable(value if isinstance(value, (list, tuple)) else (value,) for value in values)
    return [value for value in flat if isinstance(value, Tensor)]


def fast_layout(net: nn.Module, image: Tensor) -> torch.memory_format:
    """Channels last, in which convolutions run 1.3 (ResNet-18) to 1.4 times (ResNet-50) as fast on a CPU, with the network
    converted to it; unless the network insists on contiguous tensors (`view`), or has parameters that know no such layout."""
    return _fast_layout(net, image, net)[0]


def _fast_layout(net: nn.Module, image: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[torch.memory_format, Tensor]:
    """The layout, and the scores of the image that `run` of the network gives in it."""
    if image.ndim != 4:
        return torch.contiguous_format, run(image)
    try:
        net.to(memory_format=torch.channels_last)
        return torch.channels_last, run(image.contiguous(memory_format=torch.channels_last))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        net.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format, run(image)


@torch.no_grad()
def try_one_image(
    net: nn.Module, x: Tensor, first: Callable[[], Tensor], count: Count | None
) -> tuple[torch.memory_format, int]:
    """Refuse a network and images that do not go together; returns the layout to work in and the number of classes."""
    layout, scores = tried(net, x, first, lambda image: _fast_layout(net, image, count.run if count else net))
    return layout, classes_of(net, scores)


def tried(net: nn.Module, x: Tensor, first: Callable[[], Tensor], run: Callable[[Tensor], Any]) -> Any:
    """What `run` gives for the first of the images; whatever it raises is a `ValueError` that names the network and the shape."""
    shape = list(x.shape[1:])
    try:
        images = first()
        shape = list(images.shape[1:])
        return run(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{type(net).__name__} does not take images of shape {shape} ({x.dtype}): {error}") from error


def classes_of(net: nn.Module, scores: Any) -> int:
    """How many classes there are scores for; raises `ValueError` where these are no scores."""
    got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if isinstance(got, str) or len(got) != 2:
        raise ValueError(f"{type(net).__name__} returns {got} for images: expected class scores [images, classes]")
    return got[1]


def _inputs(program: torch.export.ExportedProgram, net: nn.Module, names: tuple[str, ...]):
    """The graph's inputs: the images, the chosen parameters with their names, all others with their values."""
    names_of = {id(p): n for n, p in net.named_parameters()}  # a tied parameter: one name here, two in the graph
    graph, chosen = program.graph, {}
    constants = {n: operator.attrgetter(n.target)(program.graph_module) for n in graph.find_nodes(op="get_attr")}
    for node, spec in zip(graph.find_nodes(op="placeholder"), program.graph_signature.input_specs):
        if spec.kind.name == "USER_INPUT":
            images = node
        elif spec.kind.name == "PARAMETER":
            constants[node] = net.get_parameter(spec.target)
            if names_of[id(constants[node])] in names:
                chosen[node] = names_of[id(constants.pop(node))]
        else:
            constants[node] = program.state_dict.get(spec.target, program.constants.get(spec.target))
            if spec.target in names:
                chosen[node] = spec.target
                del constants[node]
    return images, chosen, constants


def _in_place_is_harmless(graph: fx.Graph, dependent: set[fx.Node]) -> bool:
    """Whether each operation in place overwrites a tensor of its own side that nobody else sees, whole or in part.

    Otherwise one vector could change what the next one is handed, or a change could pass unseen through a view.
    """
    for node in filter(writes, graph.nodes):
        written, (_, *others) = node.args[0], node.target._schema.arguments
        if len(written.users) > 1 or (node in dependent) != (written in dependent) or any(a.is_write for a in others):
            return False
        schema, tags = getattr(written.target, "_schema", None), getattr(written.target, "tags", ())
        fresh = schema is not None and not any(r.alias_info for r in schema.returns)
        if torch.Tag.maybe_aliasing_or_mutating in tags and written.target is not aten.batch_norm.default:
            fresh = False
        if not fresh and not writes(written):
            return False
    return True
