"""Denoising UNets: what is before the chosen module is the network without it; what cannot be is refused."""

import sys
import types

import pytest
import torch
from torch import nn

from pdiff_lib.networks import denoisers, subset


def test_the_small_unet_is_the_published_kind():
    net = denoisers.create("unet-16-32-64", 1, 28)
    assert type(net.unet).__name__ == "UNet2DModel" and net.input_shape == (1, 28, 28)
    assert subset.select(net, "unet.conv_out.*").names == ("unet.conv_out.weight", "unet.conv_out.bias")
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([5, 7, 9])
    assert torch.equal(net(x, t), net.unet(x, t).sample)


def test_before_the_last_module_is_the_network_without_it():
    net = denoisers.create("unet-8-16", 3, 8).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(400)
    names = subset.select(net, "unet.conv_out.*").names
    trunk, last = denoisers.before_last(net, names, x[:1], t)
    with torch.no_grad():
        assert last == "unet.conv_out" and torch.equal(net.unet.conv_out(trunk(x, t)), net(x, t))
    assert isinstance(net.unet.conv_out, nn.Conv2d)  # left as it was
    for chosen in ("unet.conv_norm_out.*", "unet.conv_norm_out.*,unet.conv_out.*"):
        assert denoisers.before_last(net, subset.select(net, chosen).names, x[:1], t) is None


def test_a_module_that_is_called_twice_or_is_not_the_end_is_not_last():
    class Twice(nn.Module):
        def __init__(self, after):
            super().__init__()
            self.c, self.after = nn.Conv2d(1, 1, 1), after

        def forward(self, x, t):
            return self.c(self.c(x)) if self.after == 1 else self.c(x) * self.after

    for after in (1, 2):
        assert denoisers.before_last(Twice(after), ("c.weight", "c.bias"), torch.randn(1, 1, 2, 2), torch.tensor(0)) is None


@pytest.mark.parametrize("name, channels, size, told", [
    ("unet-16-32", 1, 7, "unet-16-32.*7 pixels.*halved"),
    ("unet-12", 1, 8, "multiples of 8"),
    ("resnet18", 1, 8, "network 'resnet18': expected 'unet-32-64'"),
    ("nowhere_at_all:unet", 1, 8, "nowhere_at_all"),
])
def test_bad_names_and_sizes_are_refused(name, channels, size, told):
    with pytest.raises(ValueError, match=told):
        denoisers.create(name, channels, size)


def test_published_weights_are_had_or_it_is_said(monkeypatch, tmp_path):
    made = denoisers.create("unet-8-16", 3, 8)
    made.unet.save_pretrained(tmp_path)
    again = denoisers.create(str(tmp_path), 3, 8, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="is for images of 3 channels and 8 pixels: given 1 and 28"):
        denoisers.create(str(tmp_path), 1, 28, pretrained=True)
    with pytest.raises(RuntimeError, match="published weights .* cannot be had"):
        denoisers.create(str(tmp_path / "nothing"), 3, 8, pretrained=True)


def test_weights_of_a_file_and_a_unet_of_ones_own(monkeypatch, tmp_path):
    from safetensors.torch import save_model

    made = denoisers.create("unet-8", 1, 8)
    save_model(made, str(tmp_path / "w.safetensors"))
    again = denoisers.create("unet-8", 1, 8, weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(made.unet.conv_in.weight, again.unet.conv_in.weight)
    with pytest.raises(ValueError, match="do not fit unet-16"):
        denoisers.create("unet-16", 1, 8, weights=str(tmp_path / "w.safetensors"))

    class Plain(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.c = nn.Conv2d(channels, channels, 1)

        def forward(self, x, t):
            return self.c(x)

    module = types.ModuleType("some_unets")
    module.plain = lambda in_channels, image_size: Plain(in_channels)
    monkeypatch.setitem(sys.modules, "some_unets", module)
    own = denoisers.create("some_unets:plain", 2, 4)
    assert own(torch.randn(1, 2, 4, 4), torch.tensor(3)).shape == (1, 2, 4, 4)
