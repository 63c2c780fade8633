"""A captured network's graph in other operations, which give the same for less."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def writes(node: fx.Node) -> bool:
    return getattr(node.target, "_schema", None) is not None and node.target._schema.is_mutable


def dependents(graph: fx.Graph, sources: dict[fx.Node, str]) -> set[fx.Node]:
    """The nodes that the sources reach, with the sources."""
    reached = set(sources)
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def plain_batch_norms(graph: fx.Graph, dependent: set[fx.Node]) -> None:
    """Batch norm in eval mode as the operation that it ends in on a CPU, with the same bits: on CUDA `batch_norm` picks cuDNN by
    the layout of its input, which a vmap does not let it ask for."""
    for node in [n for n in graph.nodes if n in dependent and n.target is aten.batch_norm.default and not n.args[5]]:
        with graph.inserting_before(node):
            parts = graph.call_function(aten.native_batch_norm.default, node.args[:8])
            first = graph.call_function(operator.getitem, (parts, 0))
            first.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(first)
        graph.erase_node(node)


def products_of_pixels(graph: fx.Graph, dependent: set[fx.Node], constants: dict[fx.Node, Tensor]) -> None:
    """A convolution over images of one pixel as the matrix product that it is, for all but one entry of its kernel meet padding:
    ResNet-18 at 32 pixels ends so. 4 to 10 times as fast on a CPU, and equal up to rounding. The entries become a constant more."""
    for node in [n for n in graph.nodes if n in dependent and n.target is aten.conv2d.default]:
        image, kernel, bias, _, padding, dilation, groups = (*node.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(node.args) - 2:])
        if kernel not in constants or groups != 1 or any(n.meta["val"].shape[2:].numel() != 1 for n in (image, node)):
            continue
        met = [p // d for p, d in zip(padding, dilation)]
        if any(p % d for p, d in zip(padding, dilation)) or any(m >= k for m, k in zip(met, constants[kernel].shape[2:])):
            continue  # padding is all that it meets
        with graph.inserting_before(kernel):
            entries = graph.placeholder(f"{kernel.name}_of_a_pixel")
        constants[entries] = constants[kernel][:, :, met[0], met[1]].contiguous()
        with graph.inserting_before(node):
            flat = graph.call_function(aten.flatten.using_ints, (image, 1))
            product = graph.call_function(aten.linear.default, (flat, entries, bias))
            pixel = graph.call_function(aten.unflatten.int, (product, 1, [-1, 1, 1]))
        pixel.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(pixel)
        graph.erase_node(node)


# Operations that treat all entries along an axis of their first argument alike, unless it is one of the last so many
# axes. Elementwise operations carry a tag of their own.
MIXED_AXES = {aten.linear.default: lambda node: 1, aten.layer_norm.default: lambda node: len(node.args[1]),
              aten.dropout.default: lambda node: 0, aten.contiguous.default: lambda node: 0}


def narrow_early(graph: fx.Graph, dependent: set[fx.Node]) -> None:
    """Where the rest reads a few entries of an axis (a ViT's head: one token of 197), compute only those.

    The selection moves upstream, through copies of the operations, as far as each of them treats the axis entry by
    entry; the originals stay for whoever else reads them. Axes count from the end: there broadcasting aligns them.
    """
    def narrow(node: fx.Node, axis: int) -> fx.Node:
        shape = node.meta["val"].shape
        if len(shape) < -axis or shape[axis] == 1:
            return node  # broadcast along the axis
        if (node, axis) not in done:
            if node in dependent and torch.Tag.pointwise in getattr(node.target, "tags", ()) and not writes(node):
                few = graph.node_copy(node, lambda argument: narrow(argument, axis))
            elif node in dependent and node.target in MIXED_AXES and -axis > MIXED_AXES[node.target](node):
                few = graph.call_function(node.target, (narrow(node.args[0], axis), *node.args[1:]), node.kwargs)
            else:
                few = graph.call_function(aten.slice.Tensor, (node, axis, *window))
            done[node, axis] = few
        return done[node, axis]

    readers = [n for n in graph.nodes if n in dependent and n.target in (aten.select.int, aten.slice.Tensor)]
    for reader in [n for n in readers if len(n.args) > 2]:  # a slice without bounds takes the whole axis
        source, axis, *window = reader.args
        shape = source.meta["val"].shape
        axis %= len(shape)
        if reader.target is aten.select.int:
            window = [window[0] % shape[axis], window[0] % shape[axis] + 1]
        done: dict[tuple[fx.Node, int], fx.Node] = {}  # so that residual branches do not multiply
        if source in dependent and 2 * len(range(shape[axis])[slice(*window)]) <= shape[axis]:  # else it saves little
            with graph.inserting_before(reader):
                few = narrow(source, axis - len(shape))
            reader.args = (few, axis, 0) if reader.target is aten.select.int else (few, axis)
