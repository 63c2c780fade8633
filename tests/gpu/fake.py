"""CUDA tensors without numbers, for which C++ takes CUDA's branches (cuDNN's, say) and works out shapes, types and layouts.

On torch's FakeTensorMode, which needs no GPU: operations that have no rule under vmap on CUDA, types that do not fit under
autocast, and devices that do not fit are found; values are not, so nothing that depends on one can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_cuda() -> Iterator[None]:
    """"cuda" is there, for tensors without numbers, and autocast to bfloat16 with it."""
    with (FakeTensorMode(allow_non_fake_inputs=True),
          mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          mock.patch("torch.cuda.is_bf16_supported", lambda *_: True)):
        yield


def on_cuda(net: nn.Module) -> nn.Module:
    """A real network with its tensors on "cuda" instead, in the same layout. Inside `fake_cuda`, where `to` would not do: real
    parameters cannot become fake ones in place."""
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(empty_like(p), p.requires_grad)
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = empty_like(b)
    return net


def empty_like(t: Tensor) -> Tensor:
    """A tensor on "cuda" of the same shape, type and layout."""
    return torch.empty_like(t, device="cuda")
