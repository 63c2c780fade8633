"""Which layers of a network normalise: by their type, and what no known type is derived from, by what it does."""

from __future__ import annotations

import copy
import inspect

import torch
from timm.layers import evo_norm, filter_response_norm, grn, norm, norm_act
from torch import Tensor, nn

from pdiff_lib.networks.modes import evaluating

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,  # torch's, and timm's without such a base
         *(kind for module in (norm, norm_act, evo_norm, filter_response_norm, grn) for kind in vars(module).values()
           if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__))


def in_forward_order(net: nn.Module) -> list[str]:
    """Names of the normalisation layers with parameters of their own.

    Args:
        net: the network. With `input_shape`, one zero image runs through it: layers come in the order of their first calls,
            those that are not called are left out, and layers of unknown types are judged by what they do. Without, they
            come as the network names them, and known types alone are found.
    """
    own = {n: m for n, m in net.named_modules() if next(m.parameters(recurse=False), None) is not None}
    shape = getattr(net, "input_shape", None)
    if shape is None:
        return [n for n, m in own.items() if isinstance(m, NORMS)]
    called: dict[str, Tensor | None] = {}

    def hook(name: str):
        def see(_module: nn.Module, args: tuple) -> None:
            called.setdefault(name, args[0] if args else None)
        return see

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in own.items() if isinstance(m, NORMS) or not list(m.children())]
    weight = next(net.parameters())
    try:
        with torch.no_grad(), evaluating(net):
            net(torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype))
    finally:
        for h in hooks:
            h.remove()
    return [n for n, x in called.items() if isinstance(own[n], NORMS) or _normalises(own[n], x)]


@torch.no_grad()
def _normalises(module: nn.Module, x: Tensor | None) -> bool:
    """Whether a layer of a kind that is not known takes the scale off its input, and puts a gain for each channel or feature
    on it: its output has the input's shape, and is the same for four times the input."""
    parameters = list(module.parameters())
    if not isinstance(x, Tensor) or not x.is_floating_point() or any(
            p.squeeze().ndim > 1 and p.shape != x.shape[-p.ndim:] for p in parameters):
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        module = copy.deepcopy(module).train()  # by the batch, where the layer has running statistics
        for p in module.parameters():  # a gain that starts at zero hides what the layer does
            p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
        x = torch.randn(2 * len(x), *x.shape[1:], generator=generator).to(x)
        once, four = module(x), module(4 * x)
        return once.shape == x.shape and torch.allclose(once, four, rtol=1e-2, atol=1e-3)
    except Exception:  # whatever a layer of a user's own raises when it is called by itself
        return False
