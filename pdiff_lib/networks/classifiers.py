"""Image classifiers by name: every timm model, the paper's five mini networks, those of the zoos of other papers."""

import copy
import difflib
import re
from collections import OrderedDict
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from pdiff_lib.base import own
from pdiff_lib.base.runs import code_digest
from pdiff_lib.networks.modes import evaluating
from pdiff_lib.networks.weights import load


class _ConvNetMini(nn.Sequential):
    """ConvNet-mini (paper A.2), 24,262 parameters at 10 classes: the layer norms span whole feature maps."""

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__(
            nn.Conv2d(in_chans, 8, 7, stride=2, padding=3), nn.LayerNorm([8, 32, 32]), nn.LeakyReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm([8, 16, 16]), nn.LeakyReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3, padding=1), nn.LayerNorm([4, 8, 8]), nn.LeakyReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(), nn.Linear(16, num_classes),
        )


class _MLPMini(nn.Module):
    """MLP-mini (paper A.2), 66,970 parameters at 10 classes: sees one 32x32 grey picture, whatever `in_chans` is."""

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1024, 64), nn.LayerNorm(64), nn.LeakyReLU(),
            nn.Linear(64, 16), nn.LayerNorm(16), nn.LeakyReLU(),
            nn.Linear(16, num_classes),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        return self.layers(F.avg_pool2d(x, 2).mean(1).flatten(1))


class _Residual(nn.Module):
    """x + f(x), with f given: the skip connection of ResNet-mini and ViT-mini."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _bottleneck() -> _Residual:
    return _Residual(nn.Conv2d(8, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 8, 3, padding=1))


class _ResNetMini(nn.Sequential):
    """ResNet-mini (paper A.2), 25,138 parameters at 10 classes: two residual blocks with a bottleneck of 4 channels."""

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__(
            nn.Conv2d(in_chans, 8, 3, stride=2, padding=1), nn.LeakyReLU(), nn.LayerNorm([8, 32, 32]), nn.MaxPool2d(2),
            _bottleneck(), nn.LayerNorm([8, 16, 16]), nn.MaxPool2d(2),
            _bottleneck(), nn.LayerNorm([8, 8, 8]), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 16), nn.LeakyReLU(), nn.Linear(16, num_classes),
        )


class _Attention(nn.Module):
    """Self-attention without biases, heads narrower than dim / heads (4 heads of 8 on 64 channels)."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Float[Tensor, "B tokens dim"]) -> Float[Tensor, "B tokens dim"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _sincos_positions(side: int, dim: int) -> Float[Tensor, "tokens dim"]:
    """Fixed 2-D positions of SimpleViT (Beyer et al. 2022): sine and cosine of x and y at dim / 4 frequencies."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    omega = 10000 ** -torch.linspace(0, 1, dim // 4)
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


class _ViTMini(nn.Module):
    """ViT-mini (paper A.2), 80,714 parameters at 10 classes: SimpleViT with 64 tokens of 64, depth 4, 4 heads of 8."""

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__()
        dim, patch = 64, 8
        self.embed = nn.Sequential(
            nn.LayerNorm(patch * patch * in_chans), nn.Linear(patch * patch * in_chans, dim), nn.LayerNorm(dim))
        # Not a parameter and not saved: a generated vector must hold nothing that is not learned.
        self.register_buffer("positions", _sincos_positions(64 // patch, dim), persistent=False)
        self.blocks = nn.Sequential(*(layer for _ in range(4) for layer in (
            _Residual(nn.LayerNorm(dim), _Attention(dim, heads=4, dim_head=8)),
            _Residual(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim)))))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        tokens = self.embed(F.unfold(x, 8, stride=8).transpose(1, 2)) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _convnext_mini(num_classes: int, in_chans: int) -> nn.Module:
    """ConvNeXt-mini (paper A.2), 74,970 parameters at 10 classes: timm's ConvNeXt with layer scale, other widths."""
    return ConvNeXt(in_chans, num_classes, depths=(1, 2, 2, 2), dims=(16, 32, 32, 32))


class _HyperRepCNN(nn.Sequential):
    """The 3-layer CNN of the hyper-representations papers (paper Table 7): no padding, 32x32 shrinks to 15 x 2 x 2."""

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__(
            nn.Conv2d(in_chans, 16, 3), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Flatten(), nn.Linear(60, 20), nn.LeakyReLU(), nn.Linear(20, num_classes),
        )


class _HyperRep2464(nn.Sequential):
    """The CNN of the first hyper-representations papers (2,464 parameters at 10 classes and one channel): 28x28 shrinks to
    4 x 3 x 3. Their released zoo of MNIST has tanh between the layers; leaky ReLU here, as in the larger one."""

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__(
            nn.Conv2d(in_chans, 8, 5), nn.MaxPool2d(2), nn.LeakyReLU(), nn.Conv2d(8, 6, 5), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(6, 4, 2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(36, 20), nn.LeakyReLU(), nn.Linear(20, num_classes),
        )


class _MLP(nn.Sequential):
    """Linear layers with ReLU between them, on flattened images."""

    def __init__(self, *widths: int):
        super().__init__(nn.Flatten(), *[layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())][:-1])


# name -> (how to build it, the only side in pixels that it takes)
_SMALL = {
    "convnet-mini": (_ConvNetMini, 64),
    "mlp-mini": (_MLPMini, 64),
    "resnet-mini": (_ResNetMini, 64),
    "vit-mini": (_ViTMini, 64),
    "convnext-mini": (_convnext_mini, 64),
    "hyperrep-cnn": (_HyperRepCNN, 32),
    "hyperrep-2464": (_HyperRep2464, 28),
}
_WIDTHS = re.compile(r"mlp(-[1-9]\d*)+")  # mlp-10, mlp-32-32: the hidden layers


def create(name: str, num_classes: int, in_chans: int = 3, image_size: int | None = None, pretrained: bool = False,
           weights: str | Path | None = None, seed: int = 0, new_head: bool = False) -> nn.Module:
    """Build the classifier called `name`, in train mode, on the CPU.

    Args:
        name: a timm model ("resnet18"), one of the five "...-mini" networks, "hyperrep-cnn", "hyperrep-2464", an MLP with the
            widths of its hidden layers ("mlp-10", "mlp-32-32"; ReLU), or a function of one's own as
            "package.module:function" (see `base.own`), which is called with `num_classes` and `in_chans` and returns the network.
        num_classes: width of the last layer, at least 1.
        in_chans: channels of the images, at least 1.
        image_size: side of the images in pixels; None: 64 for the minis, 32 for "hyperrep-cnn", 28 for "hyperrep-2464" and MLPs,
            timm's own default.
        pretrained: start from the weights that timm publishes for this model (ImageNet; downloaded when needed).
        weights: safetensors file with a state dict that fits; pickled files, which run code, are refused. `new_head`: see `weights.load`.
        seed: of the random initial weights; the global random state is neither read nor changed.

    Returns:
        The network, with a plain attribute `input_shape = (C, H, W)`: the images it is meant for.

    Raises:
        ValueError: unknown name (close ones are listed), impossible setting, or weights that cannot be used.
        RuntimeError: the published weights cannot be had.

    Source: paper 3.1 and A.2; parameter counts of Table 6. Where A.2 is silent (layer norms, strides) these are the
        constructions that give those counts.
    """
    for key, value in (("num_classes", num_classes), ("in_chans", in_chans), ("image_size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"{key} = {value}: expected at least 1")
    if pretrained and weights is not None:
        raise ValueError(f"pretrained = True and weights = {str(weights)!r}: expected one source of weights, not both")
    # Only the CPU generator is seeded, and restored: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if own.is_name(name):
            net = _create_own(name, num_classes, in_chans, image_size, pretrained)
        elif _WIDTHS.fullmatch(name) or name in _SMALL:
            net = _create_small(name, num_classes, in_chans, image_size, pretrained)
        else:
            net = _create_timm(name, num_classes, in_chans, image_size, pretrained)
    if weights is not None:
        load(net, Path(weights), name, num_classes, new_head)
    return net


def code_key(name: str) -> dict[str, str]:
    """What the key of a stage needs beside a network's weights: the code, where it is the user's own."""
    return {"code": code_digest(*own.modules(name))} if own.is_name(name) else {}


def _create_small(name: str, num_classes: int, in_chans: int, image_size: int | None, pretrained: bool) -> nn.Module:
    if pretrained:
        raise ValueError(f"pretrained = True: there are no published weights of {name}")
    if name in _SMALL:
        build, side = _SMALL[name]
        if image_size not in (None, side):
            raise ValueError(f"image_size = {image_size}: {name} takes {side}x{side} images only")
        net = build(num_classes, in_chans)
    else:
        side = image_size or 28
        net = _MLP(in_chans * side**2, *map(int, name.split("-")[1:]), num_classes)
    net.input_shape = (in_chans, side, side)
    return net


def _create_own(name: str, num_classes: int, in_chans: int, image_size: int | None, pretrained: bool) -> nn.Module:
    if pretrained:
        raise ValueError(f"pretrained = True: there are no published weights of {name}; expected False, and weights or checkpoints")
    net = own.build(name, num_classes=num_classes, in_chans=in_chans)
    if not isinstance(net, nn.Module) or not any(True for _ in net.parameters()):
        raise ValueError(f"network {name!r} gave a {type(net).__name__}: expected a torch.nn.Module with parameters")
    if image_size:
        net.input_shape = (in_chans, image_size, image_size)
    elif len(getattr(net, "input_shape", ())) != 3:
        raise ValueError(f"image_size = None: {name} does not say which images it takes; expected a size, or input_shape (C, H, W)")
    return net.train()


def _create_timm(name: str, num_classes: int, in_chans: int, image_size: int | None, pretrained: bool) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*_SMALL, *timm.list_models()], n=5)
        hint = f"did you mean {', '.join(close)}?" if close else f"expected {', '.join(_SMALL)} or a timm model's name"
        raise ValueError(f"network {name!r} is unknown: {hint}")
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # a known model with an unknown tag, as in "resnet18.nonsense"
        tags = timm.list_pretrained(name.split(".")[0] + ".*")
        raise ValueError(f"network {name!r} is unknown: expected one of {', '.join(tags)}") from error
    # timm's own mark of the models that are built for one image size (ViT, Swin, ...); the others refuse the argument.
    size = {"img_size": image_size} if image_size and published and published.fixed_input_size else {}
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **size)
    except Exception as error:
        if not pretrained:
            raise ValueError(f"timm cannot build {name} with in_chans = {in_chans}, image_size = {image_size}: "
                             f"{error}") from error
        raise RuntimeError(f"{name}: its published weights could not be loaded ({type(error).__name__}: {error}). "
                           "Check the connection to huggingface.co, or pass a safetensors file as weights") from error
    sides = (image_size, image_size) if image_size else tuple(net.pretrained_cfg["input_size"][1:])
    net.input_shape = (in_chans, *sides)
    return net.train()


def copied(net: nn.Module) -> nn.Module:
    """A deep copy, also of a network that holds tensors which it computed itself (`weight_norm`'s hooks leave one in each
    layer): PyTorch refuses to copy these. The copy computes its own at its next forward pass."""
    ready = {}  # copies that deepcopy need not make
    for value in (value for module in net.modules() for value in vars(module).values()):
        if isinstance(value, Tensor) and not value.is_leaf:
            ready[id(value)] = value.detach().clone()
        elif type(value) in (dict, OrderedDict) and not value:  # of hooks, a dozen in each module: a third of the time
            ready[id(value)] = type(value)()
    return copy.deepcopy(net, ready)


def check(net: nn.Module, shape: tuple[int, int, int]) -> None:
    """Make sure that `net` takes images of this shape, by running one zero image; its modes are left as they were.

    Args:
        net: a network made by `create`.
        shape: (C, H, W), pixels.

    Raises:
        ValueError: it does not; names the shape, the network's `input_shape` and what went wrong.
    """
    parameter = next(net.parameters())
    try:
        with torch.no_grad(), evaluating(net):
            net(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ValueError(f"the network does not take images of shape {list(shape)} (it is meant for "
                         f"{list(net.input_shape)}): {error}") from error
