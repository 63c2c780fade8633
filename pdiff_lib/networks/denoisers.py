"""Networks that take noise off images: diffusers' UNets."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import own
from pdiff_lib.base.extras import extra
from pdiff_lib.networks import weights as files

_NAME = re.compile(r"unet((?:-[1-9]\d*)+)")
GROUPS, HEAD = 8, 8  # of the small ones: groups of a norm, channels of an attention head


class Denoiser(nn.Module):
    """Noisy images and their times -> the noise in them (epsilon).

    Args:
        unet: diffusers' `UNet2DModel`, or any module that is called alike and returns a tensor, or an object that has it as `sample`.
        channels, size: of the images.

    Attributes:
        input_shape: (C, s, s).
    """

    def __init__(self, unet: nn.Module, channels: int, size: int):
        super().__init__()
        self.unet, self.input_shape = unet, (channels, size, size)

    def forward(self, x: Float[Tensor, "B C s s"], t: Int64[Tensor, "..."]) -> Float[Tensor, "B _ s s"]:
        """The noise, [B C s s] (of a network without its last module what comes before it); t: [B], or one number for all."""
        found = self.unet(x, t)
        return found if isinstance(found, Tensor) else found.sample


def create(name: str, channels: int, size: int, pretrained: bool = False, weights: str = "") -> Denoiser:
    """A denoiser, in train mode, on the CPU; initial weights from the global random state.

    Args:
        name: "unet-32-64": diffusers' UNet with so many channels at each resolution, one residual block each, attention in the middle; with
            published weights a model of diffusers' hub ("google/ddpm-cifar10-32"); or `package.module:function`, which is called with
            in_channels and image_size.
        channels, size: of the images.
        pretrained: the published weights.
        weights: a safetensors file to start from.

    Raises:
        ValueError: another name, a size that cannot be halved so often, published weights for other images, weights that do not fit, or
            diffusers is not installed.
        RuntimeError: the published weights cannot be had.

    Source: Ho et al. 2020 (DDPM), whose UNet diffusers has as `UNet2DModel`; the small sizes are ours.
    """
    found = _NAME.fullmatch(name)
    if own.is_name(name) and not pretrained:
        net = own.build(name, in_channels=channels, image_size=size)
    elif not (pretrained or found):
        raise ValueError(f"network {name!r}: expected 'unet-32-64' (channels at each resolution), a model of diffusers' hub with pretrained, or "
                         "package.module:function")
    else:
        kind = extra("diffusers.models.unets.unet_2d", "diffusers", "UNets need", "vision").UNet2DModel
        net = _published(kind, name, channels, size) if pretrained else _small(kind, name, channels, size)
    denoiser = Denoiser(net, channels, size)
    if weights:
        files.load(denoiser, Path(weights), name, channels)
    return denoiser


def _small(kind: type, name: str, channels: int, size: int) -> nn.Module:
    widths = [int(w) for w in name.split("-")[1:]]
    n = len(widths)
    if size % 2 ** (n - 1) or any(w % GROUPS for w in widths):
        raise ValueError(f"network {name!r} of images with {size} pixels a side: expected multiples of {GROUPS}, at most one more of them than "
                         "the size can be halved")
    return kind(size, channels, channels, block_out_channels=widths, layers_per_block=1, down_block_types=("DownBlock2D",) * n,
                up_block_types=("UpBlock2D",) * n, norm_num_groups=GROUPS, attention_head_dim=HEAD)


def _published(kind: type, name: str, channels: int, size: int) -> nn.Module:
    try:
        net = kind.from_pretrained(name)
    except OSError as error:
        raise RuntimeError(f"published weights {name!r} cannot be had: {error}") from error
    given = net.config.in_channels, net.config.sample_size
    if given != (channels, size):
        raise ValueError(f"pretrained {name} is for images of {given[0]} channels and {given[1]} pixels: given {channels} and {size}")
    return net


@torch.no_grad()
def before_last(net: nn.Module, names: tuple[str, ...], x: Float[Tensor, "1 C s s"], t: Int64[Tensor, ""]) -> tuple[nn.Module, str] | None:
    """The network without the module that gives its output, and that module's name, where this one holds all chosen parameters: what is before
    it is the same for all vectors. None where it does not.

    Args:
        net: the network, left as it is.
        names: the chosen parameters.
        x, t: what it takes.
    """
    holder = names[0].rpartition(".")[0]
    if not holder or any(name.rpartition(".")[0] != holder for name in names):
        return None
    given: list[Tensor] = []
    hook = net.get_submodule(holder).register_forward_hook(lambda module, inputs, output: given.append(output))
    try:
        found = net(x, t)
    finally:
        hook.remove()
    if len(given) != 1 or given[0] is not found:
        return None
    trunk = copy.deepcopy(net)
    trunk.set_submodule(holder, nn.Identity())
    return trunk, holder
