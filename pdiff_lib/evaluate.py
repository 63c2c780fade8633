"""What many parameter vectors predict, in one pass over the images.

Only a few parameters differ between the vectors, so most of the network computes the same numbers for each of them.
The network is captured as a graph and cut in two: the frozen part, which depends on no chosen parameter and runs once
per batch of images, and the rest, which runs once per vector. Images are the outer loop and vectors the inner one, so
memory is bounded by the batch and not by the number of vectors or images.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from pdiff_lib.subset import Subset, check

aten = torch.ops.aten
VMAP_ON_CUDA = 16  # vectors per vmap on a GPU, where one vector's rest is too small to fill it
HALF = 2  # narrowing that keeps more than 1 / HALF of an axis is left where it is: it would save little


def predict(
    net: nn.Module,
    sub: Subset,
    theta: Float[Tensor, "M D"],
    x: Shaped[Tensor, "N C H W"],
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    vectors_at_once: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Int64[Tensor, "M N"]:
    """The class that each parameter vector gives to each image.

    Capturing the network takes 0.3 to 2 s per call, and again for a last batch of another length: hand all vectors
    over in one call. A network that cannot be captured runs whole for every vector, with a warning that says why.
    The network works on a copy, in eval mode and with its own running statistics; `net` itself is not touched.

    Args:
        net: the network; returns class scores [n, classes].
        sub: which of its parameters `theta` holds.
        theta: parameter vectors, raw.
        x: images, as `prepare` takes them (uint8, say), or as the network does where there is no `prepare`.
        prepare: from a batch of images on the device to what the network takes (resizing, normalising).
        batch_size: images at a time; with `vectors_at_once`, what memory depends on.
        vectors_at_once: vectors that share one vmap over the rest; None takes 1 (a loop) on the CPU and 16 on CUDA.
        device: where to compute; None takes that of the network's parameters.
        progress: show a progress bar over the batches.

    Returns:
        Class indices on the CPU; the first of equal scores. Equal to running the whole network for every vector, bit
        for bit where the same kernels run (vmap, and a matrix product over fewer tokens, may round differently).

    Raises:
        ValueError: the arguments do not fit each other or the network, or hold NaN or infinity.

    Source: how the paper evaluates generated networks (Section 3.1: 200 per experiment); the cut is ours.
    """
    check(theta, sub.numel, at_least=1)
    device = torch.device(device) if device is not None else next(net.parameters()).device
    _check(net, sub, x, device, batch_size, vectors_at_once)
    net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
    vectors_at_once = vectors_at_once or (VMAP_ON_CUDA if device.type == "cuda" else 1)
    theta = theta.detach().to(device, net.get_parameter(sub.names[0]).dtype)

    def batch_from(start: int, size: int) -> Tensor:
        batch = x[start:start + size].to(device)
        return prepare(batch) if prepare else batch

    predictions = torch.empty(len(theta), len(x), dtype=torch.int64)
    parts: dict[torch.Size, Split | Whole] = {}
    with torch.no_grad():
        _try_one_image(net, x, lambda: batch_from(0, 1))
        for start in tqdm(range(0, len(x), batch_size), desc="images", unit="batch", disable=not progress):
            batch = batch_from(start, batch_size)
            if batch.shape not in parts:
                parts[batch.shape] = _cut(net, sub.names, batch)
            part = parts[batch.shape]
            boundary = part.frozen(batch)
            chunks = theta.split(vectors_at_once if isinstance(part, Split) else 1)
            rows = [_scores(part, sub, chunk, boundary).argmax(-1) for chunk in chunks]
            predictions[:, start:start + len(batch)] = torch.cat(rows).cpu()
    return predictions


def wrong(
    net: nn.Module, sub: Subset, theta: Float[Tensor, "M D"], x: Shaped[Tensor, "N C H W"], y: Int[Tensor, "N"], **how
) -> Bool[Tensor, "M N"]:
    """Which images each parameter vector gets wrong: what accuracy and similarity are computed from.

    Args:
        net, sub, theta, x: as for `predict`.
        y: true class indices.
        **how: the keywords of `predict`.

    Raises:
        ValueError: not one label per image, or what `predict` refuses.

    Source: the wrong predictions of Eq. 7.
    """
    if y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {list(y.shape)}: expected [{len(x)}], one label per image")
    return predict(net, sub, theta, x, **how) != y.cpu()


def accuracy(wrong: Bool[Tensor, "M N"]) -> Float[Tensor, "M"]:
    """Fraction of the images that each model gets right, in float64.

    >>> accuracy(torch.tensor([[True, False, False, False]]))
    tensor([0.7500], dtype=torch.float64)
    """
    return (~wrong).sum(dim=1).double() / wrong.shape[1]


def summary(wrong: Bool[Tensor, "M N"], seed: int = 0) -> dict[str, float | int]:
    """The accuracies of many models in a few numbers, all of them fractions.

    `best` picks the best of many models on the images that it is reported on, so it rises with their number alone.
    The honest figure beside it picks on one random half of the images and reports on the other.

    Args:
        wrong: from `wrong`; at least 1 model and 2 images.
        seed: of the random halves (the first has N // 2 images).

    Returns:
        `n_models`, `n_images`, `mean` and `std` over the models (population, ddof 0), `best`, `best_selected_half`
        (accuracy of the model that is best on the first half, there; the first of equals) and `best_other_half` (the
        same model on the second half).

    Raises:
        ValueError: no model, or fewer than 2 images.

    Source: Table 1 reports `best`; the two halves are ours.
    """
    models, images = wrong.shape
    if models < 1 or images < 2:
        raise ValueError(f"wrong has shape [{models}, {images}]: expected at least 1 model and 2 images")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed)).to(wrong.device)
    accuracies = accuracy(wrong)
    selected, other = accuracy(wrong[:, order[:images // 2]]), accuracy(wrong[:, order[images // 2:]])
    best = int(selected.argmax())
    return {
        "n_models": models,
        "n_images": images,
        "mean": accuracies.mean().item(),
        "std": accuracies.std(correction=0).item(),
        "best": accuracies.max().item(),
        "best_selected_half": selected[best].item(),
        "best_other_half": other[best].item(),
    }


class Split:
    """A network in two parts: `rest(params, frozen(x))` equals the network with `params` in place of its own.

    Args:
        net: the network, in eval mode.
        names: the chosen parameters.
        example: a batch as the network takes it; the parts are valid for this shape alone, so that control flow that
            depends on the shape stays right.

    Attributes:
        frozen: from a batch to the tensors that the rest needs, as a tuple.
        rest: from the chosen parameters by name, and that tuple, to the scores.
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...], example: Tensor):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export's own
            program = torch.export.export(net, (example,), strict=False)
            # In-place operations would change the boundary under the next vector. An empty table only makes them
            # out of place; decomposing further would change kernels, and with them the last bits.
            if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in program.graph.nodes):
                program = program.run_decompositions({})
        graph = program.graph
        canonical = {id(p): n for n, p in net.named_parameters()}  # a tied parameter has one name here, two in the graph
        inputs: dict[fx.Node, str] = {}
        constants: dict[fx.Node, object] = {}
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs):
            if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
                images = node
            elif spec.kind is torch.export.graph_signature.InputKind.PARAMETER:
                parameter = net.get_parameter(spec.target)
                if canonical[id(parameter)] in names:
                    inputs[node] = canonical[id(parameter)]
                constants[node] = parameter
            else:
                constants[node] = program.constants.get(spec.target, program.state_dict.get(spec.target))
        for node in graph.find_nodes(op="get_attr"):
            constants[node] = operator.attrgetter(node.target)(program.graph_module)

        _narrow_early(graph, _dependents(graph, inputs))
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        dependent = _dependents(graph, inputs)

        frozen, rest = fx.Graph(), fx.Graph()
        in_frozen, params, handed = {images: frozen.placeholder("x")}, rest.placeholder("params"), rest.placeholder("boundary")
        in_rest: dict[fx.Node, fx.Node] = {n: rest.call_function(operator.getitem, (params, name)) for n, name in inputs.items()}
        boundary: list[fx.Node] = []

        def frozen_value(node: fx.Node) -> fx.Node:
            if node not in in_frozen:
                in_frozen[node] = frozen.get_attr(node.name)
            return in_frozen[node]

        def rest_value(node: fx.Node) -> fx.Node:
            if node not in in_rest and node in constants:
                in_rest[node] = rest.get_attr(node.name)
            elif node not in in_rest:
                in_rest[node] = rest.call_function(operator.getitem, (handed, len(boundary)))
                boundary.append(node)
            return in_rest[node]

        for node in graph.find_nodes(op="call_function", sort=True):
            if node in dependent:
                in_rest[node] = rest.node_copy(node, rest_value)
            else:
                in_frozen[node] = frozen.node_copy(node, frozen_value)
        (scores,) = graph.output_node().args[0]
        rest.output(rest_value(scores))
        frozen.output(tuple(frozen_value(n) for n in boundary))
        values = {n.name: v for n, v in constants.items()}
        self.frozen = fx.GraphModule(values, frozen)
        self.rest = fx.GraphModule(values, rest)


class Whole:
    """The plain way with the verbs of `Split`: nothing is frozen, and the rest is the whole network."""

    def __init__(self, net: nn.Module):
        self.net = net

    def frozen(self, x: Tensor) -> tuple[Tensor]:
        return (x,)

    def rest(self, params: dict[str, Tensor], boundary: tuple[Tensor]) -> Tensor:
        return torch.func.functional_call(self.net, params, boundary)


def _cut(net: nn.Module, names: tuple[str, ...], example: Tensor) -> Split | Whole:
    try:
        return Split(net, names, example)
    except Exception as error:  # torch.export has no common base for what it cannot capture
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        warnings.warn(f"{type(net).__name__} cannot be captured, so the whole network runs for every vector ({reason})")
        return Whole(net)


def _scores(part: Split | Whole, sub: Subset, theta: Tensor, boundary: tuple[Tensor, ...]) -> Tensor:
    """Scores [m n classes] of m vectors, from what the frozen part handed over."""
    if len(theta) == 1:
        return part.rest(sub.unflatten(theta[0]), boundary)[None]
    return torch.func.vmap(lambda vector: part.rest(sub.unflatten(vector), boundary))(theta)


def _dependents(graph: fx.Graph, sources: dict[fx.Node, str]) -> set[fx.Node]:
    """The nodes that the sources reach, with the sources."""
    reached = set(sources)
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


# Operations that treat every entry along an axis alike, unless it is one of the last so many axes. Only their first
# argument has that axis. Elementwise operations carry a tag of their own.
MIXED_AXES = {
    aten.linear.default: lambda node: 1,
    aten.layer_norm.default: lambda node: len(node.args[1]),
    aten.dropout.default: lambda node: 0,
    aten.contiguous.default: lambda node: 0,
}


def _narrow_early(graph: fx.Graph, dependent: set[fx.Node]) -> None:
    """Where the rest reads a few entries of an axis (a ViT's head: one token of 197), compute only those.

    The selection moves upstream, through copies of the operations, as far as each of them treats the axis entry by
    entry; the originals stay for whoever else reads them. Axes count from the end: there broadcasting aligns them.
    """
    for reader in [n for n in graph.nodes if n in dependent and n.target in (aten.select.int, aten.slice.Tensor)]:
        source, axis, *window = reader.args
        shape = source.meta["val"].shape
        axis %= len(shape)
        if reader.target is aten.select.int:
            window = [window[0] % shape[axis], window[0] % shape[axis] + 1]
        kept = len(range(shape[axis])[slice(*window)])
        if source not in dependent or HALF * kept > shape[axis]:
            continue
        copies: dict[tuple[fx.Node, int], fx.Node] = {}

        def narrowed(node: fx.Node, axis: int) -> fx.Node:
            if (node, axis) not in copies:
                copies[node, axis] = narrow(node, axis)
            return copies[node, axis]

        def narrow(node: fx.Node, axis: int) -> fx.Node:
            if node in dependent and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                return graph.node_copy(node, lambda a: narrowed(a, axis) if _spans(a, axis) else a)
            if node in dependent and node.target in MIXED_AXES and -axis > MIXED_AXES[node.target](node):
                args = (narrowed(node.args[0], axis), *node.args[1:])
                return graph.call_function(node.target, args, node.kwargs)
            return graph.call_function(aten.slice.Tensor, (node, axis, *window))

        with graph.inserting_before(reader):
            few = narrowed(source, axis - len(shape))
        reader.args = (few, axis, 0) if reader.target is aten.select.int else (few, axis)


def _spans(node: fx.Node, axis: int) -> bool:
    """Whether the tensor has this axis (negative) and is not broadcast along it."""
    shape = node.meta["val"].shape
    return len(shape) >= -axis and shape[axis] > 1


def _check(net: nn.Module, sub: Subset, x: Tensor, device: torch.device, batch_size: int, vectors_at_once: int | None) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("cuda requested but torch.cuda.is_available() is False")
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"x has shape {list(x.shape)}: expected [images, channels, height, width] with at least 1 image")
    for name, number in (("batch_size", batch_size), ("vectors_at_once", 1 if vectors_at_once is None else vectors_at_once)):
        if number < 1:
            raise ValueError(f"{name} is {number}: expected at least 1")
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    for name, shape in zip(sub.names, sub.shapes):
        if shapes.get(name) != tuple(shape):
            raise ValueError(f"the subset's {name} has shape {tuple(shape)}: {type(net).__name__} has {shapes.get(name)} there")


def _try_one_image(net: nn.Module, x: Tensor, first: Callable[[], Tensor]) -> None:
    """Refuse a network and images that do not go together, before any long work."""
    shape = list(x.shape[1:])
    try:
        image = first()
        shape = list(image.shape[1:])
        scores = net(image)
    except Exception as error:
        raise ValueError(f"{type(net).__name__} does not take images of shape {shape} ({x.dtype}): {error}") from error
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{type(net).__name__} returns {got} for one image: expected class scores [1, classes]")
