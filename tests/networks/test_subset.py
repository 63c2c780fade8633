"""subset.py: the paper's subsets by name and count, exactness both ways, standardising against NumPy, every refusal."""

import math

import numpy as np
import pandas as pd
import pytest
import timm.layers
import torch
from hypothesis import given, strategies as st
from torch import nn

from pdiff_lib import networks
from pdiff_lib.generators.pdiff import PDiff
from pdiff_lib.networks import subset
from pdiff_lib.networks.subset import Standardiser, Subset

TABLE_6 = [("resnet18", 2048, ("layer4.1.bn1", "layer4.1.bn2")), ("resnet50", 5120, ("layer4.2.bn2", "layer4.2.bn3")),
           ("vit_tiny_patch16_224", 768, ("blocks.11.norm2", "norm")),
           ("vit_base_patch16_224", 3072, ("blocks.11.norm2", "norm")),
           ("convnext_tiny", 3072, ("stages.3.blocks.2.norm", "head.norm")),
           ("convnext_base", 4096, ("stages.3.blocks.2.norm", "head.norm"))]
MINIS = {"convnet-mini": 24262, "mlp-mini": 66970, "resnet-mini": 25138, "vit-mini": 80714, "convnext-mini": 74970}


def tiny():
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


@pytest.mark.parametrize("name, numel, layers", TABLE_6, ids=[row[0] for row in TABLE_6])
def test_last_two_norms_are_the_papers(name, numel, layers):
    with torch.device("meta"):  # shapes without memory
        sub = subset.select(networks.create(name, 10), "last_norms:2")
    assert sub.numel == numel
    assert sub.names == tuple(f"{layer}.{p}" for layer in layers for p in ("weight", "bias"))


@pytest.mark.parametrize("name, numel", MINIS.items())
def test_all_of_the_minis_is_the_papers_count(name, numel):
    net = networks.create(name, 10)
    sub = subset.select(net, "all")
    assert sub.numel == numel and sub.names == tuple(n for n, _ in net.named_parameters())


class Reversed(nn.Module):
    """Calls its layers in another order than it names them."""

    input_shape = (4,)

    def __init__(self):
        super().__init__()
        self.last, self.first, self.unused = nn.LayerNorm(4), nn.BatchNorm1d(4), nn.LayerNorm(4)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.last(self.drop(self.first(x)))


def test_norms_are_ordered_by_their_calls_and_the_network_is_left_alone():
    net = Reversed().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert subset.select(net, "last_norms:1").names == ("last.weight", "last.bias")
    assert subset.select(net, "last_norms:2").names == ("first.weight", "first.bias", "last.weight", "last.bias")
    assert net.training and net.drop.training and not net.last._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Rms(nn.Module):
    """A normalisation layer of a user's own, derived from none: divides by the root mean square over the channels."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(channels, 1, 1))  # starts at zero, as at the end of a residual branch

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain


class Running(nn.Module):
    """A batch norm of a user's own."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("seen", torch.ones(channels))

    def forward(self, x):
        var = x.var((0, 2, 3)) if self.training else self.seen
        return x / (var + 1e-5).sqrt()[:, None, None] * self.scale[:, None, None] + self.shift[:, None, None]


class NormalisedConv(nn.Conv2d):
    """Normalises its weight, not what goes through it."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class NormaliseImage(nn.Module):
    """Mean and standard deviation of the images, which do not depend on them."""

    def __init__(self, channels):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        return (x - self.mean) / 0.25


class NormFree(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))  # x + 0 * f(x): no function of its input's scale that could be seen

    def forward(self, x):
        return self.gain * x


class Cosine(nn.Linear):
    """The cosines of the angles between its input and its weights: four times the input is the same, but it is no norm."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class NormAndLinear(nn.Sequential):
    """Has a norm and is none: its bias is a parameter of its own."""

    def __init__(self, channels):
        super().__init__(nn.LayerNorm([channels, 6, 6], elementwise_affine=False))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        return super().forward(x) + self.bias


@pytest.mark.parametrize("layer", [
    nn.BatchNorm2d, nn.SyncBatchNorm, lambda c: nn.InstanceNorm2d(c, affine=True), lambda c: nn.LayerNorm([c, 6, 6]),
    lambda c: nn.GroupNorm(2, c), lambda c: nn.RMSNorm([c, 6, 6]), Rms, Running, timm.layers.RmsNorm2d,
    timm.layers.LayerNorm2d, timm.layers.BatchNormAct2d, timm.layers.EvoNorm2dB0, lambda c: timm.layers.EvoNorm2dS0(c, 4),
    timm.layers.FilterResponseNormTlu2d, timm.layers.GroupNorm1, timm.layers.SimpleNorm2d])
def test_what_normalises_is_a_norm_whatever_its_name(layer):
    renamed = layer(8)
    renamed.__class__ = type("Scale", (type(renamed),), {})
    net = nn.Sequential(nn.Conv2d(3, 8, 3), renamed, nn.Flatten(), nn.Linear(288, 4))
    net.input_shape = (3, 8, 8)
    want = {f"1.{n}" for n, _ in renamed.named_parameters()}
    assert set(subset.select(net, "last_norms:1").names) == want and want
    with pytest.raises(ValueError, match="has 1 normalisation layers"):
        subset.select(net, "last_norms:2")
    assert torch.equal(net[1].state_dict()[min(want)[2:]], layer(8).state_dict()[min(want)[2:]])  # looked at, not changed


@pytest.mark.parametrize("layer", [
    lambda c: NormalisedConv(c, c, 1), NormaliseImage, NormFree, NormAndLinear, lambda c: timm.layers.LayerScale2d(c),
    lambda c: nn.utils.parametrizations.weight_norm(nn.Conv2d(c, c, 1)), lambda c: nn.PReLU(c),
    lambda c: nn.Sequential(nn.Flatten(), Cosine(36 * c, 36 * c), nn.Unflatten(1, (c, 6, 6))), nn.LocalResponseNorm,
    lambda c: nn.utils.parametrizations.spectral_norm(nn.Conv2d(c, c, 1)), lambda c: timm.layers.ScaledStdConv2d(c, c, 1)])
def test_what_does_not_normalise_is_no_norm_whatever_its_name(layer):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer(8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    net.input_shape = (3, 8, 8)
    assert subset.select(net, "last_norms:1").names == ("2.weight", "2.bias")
    with pytest.raises(ValueError, match="has 1 normalisation layers"):
        subset.select(net, "last_norms:2")


def test_a_timm_network_without_norms_has_none():
    with torch.device("meta"), pytest.raises(ValueError, match="NormFreeNet has 0 normalisation layers"):
        subset.select(networks.create("dm_nfnet_f0", 10), "last_norms:1")  # its NormFreeBlocks have a gain each


@pytest.mark.parametrize("choice, names", [
    ("0.*", ("0.weight", "0.bias")), ("2.bias, 0.weight", ("0.weight", "2.bias")),
    (["*.bias"], ("0.bias", "1.bias", "2.bias")), ("?.weight", ("0.weight", "1.weight", "2.weight")),
    ("0.*,*.weight", ("0.weight", "0.bias", "1.weight", "2.weight"))])
def test_patterns_choose_in_the_networks_order(choice, names):
    assert subset.select(tiny(), choice).names == names


@pytest.mark.parametrize("choice, message", [
    ("layer9.*", r"pattern 'layer9.\*' matches no parameter of Sequential.*2.bias"),
    ("0.*,x", "pattern 'x' matches no"),
    ("", "pattern '' matches no"), ("last_norms:0", "expected last_norms:N with N at least 1"),
    ("last_norms:two", "expected last_norms:N"), ("last_norms:-1", "expected last_norms:N"),
    ("last_norms:99", "'last_norms:99': Sequential has 1 normalisation layers")])
def test_choices_of_nothing_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        subset.select(tiny(), choice)


shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes, st.integers(0, 2**31))
def test_flatten_and_unflatten_are_exact_both_ways(shapes, seed):
    sub = Subset(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**31 - 2**24, sub.numel, dtype=np.int32)  # any finite float, subnormal ones among them
    theta = torch.from_numpy(bits.view(np.float32))
    parts = sub.unflatten(theta)
    assert [tuple(v.shape) for v in parts.values()] == shapes
    assert sub.numel == sum(map(math.prod, shapes)) == sum(sub.sizes)
    assert np.array_equal(sub.flatten(parts).numpy().view(np.int32), bits)
    again = sub.unflatten(sub.flatten(parts))
    assert all(torch.equal(again[k], parts[k]) for k in sub.names)
    assert np.array_equal(np.concatenate([v.numpy().ravel() for v in parts.values()]), theta.numpy())


def test_load_writes_the_chosen_parameters_alone():
    net = tiny()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sub = subset.select(net, "1.*,2.bias")
    theta = torch.arange(8.0)
    assert sub.load(net, theta) is net and torch.equal(sub.flatten(net), theta)
    assert net[1].bias.tolist() == [3, 4, 5] and net[2].bias.tolist() == [6, 7]
    assert torch.equal(net[0].weight, before["0.weight"]) and torch.equal(net[2].weight, before["2.weight"])
    theta.zero_()
    assert net[2].bias.tolist() == [6, 7] and net[2].bias.requires_grad


def test_flatten_copies():
    net = tiny()
    theta = subset.select(net, "0.bias").flatten(net)
    kept = net[0].bias.detach().clone()
    theta += 1
    assert torch.equal(net[0].bias.detach(), kept) and not theta.requires_grad


def test_vectors_and_networks_of_another_kind_are_refused():
    sub = subset.select(tiny(), "all")
    with pytest.raises(ValueError, match=r"theta has shape \[28\]: expected \[29\]"):
        sub.unflatten(torch.zeros(28))
    with pytest.raises(ValueError, match="no parameter '0.weight' here: expected 0.weight, 0.bias"):
        sub.flatten({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"0.weight has shape \(3, 5\): expected \(3, 4\)"):
        sub.flatten(nn.Sequential(nn.Linear(5, 3)))


# ---------------------------------------------------------------- standardising

def zoo(k=6, d=10, seed=0):
    rng = np.random.default_rng(seed)
    return (5 * rng.normal(size=(k, d)) + np.linspace(-3, 9, d)).astype(np.float32)


@pytest.mark.parametrize("sizes", [None, (10,), (3, 7), (1, 2, 3, 4)])
def test_standardiser_equals_numpy(sizes):
    theta = zoo()
    standardise = Standardiser(torch.from_numpy(theta), sizes)
    want, at = np.empty(theta.shape), 0
    for size in sizes or (10,):
        part = theta[:, at : at + size].astype(np.float64)
        scale = np.mean([row.std() for row in part]) if size > 1 else part.std()  # one number: over the checkpoints
        want[:, at : at + size] = (part - np.mean([row.mean() for row in part])) / scale
        at += size
    got = standardise(torch.from_numpy(theta))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(standardise.inverse(got).numpy(), theta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(standardise(torch.from_numpy(theta[0])).numpy(), want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (3, 7), (1, 2, 3, 4)])
def test_standardiser_around_the_mean_vector_equals_numpy(sizes):
    theta = zoo()
    standardise = Standardiser(torch.from_numpy(theta), sizes, "vector")
    want, at = theta.astype(np.float64) - theta.astype(np.float64).mean(axis=0), 0
    for size in sizes or (10,):
        want[:, at : at + size] /= np.sqrt(np.mean(want[:, at : at + size] ** 2))
        at += size
    got = standardise(torch.from_numpy(theta))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(standardise.inverse(got).numpy(), theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centre", ["tensor", "vector"])
def test_tensors_that_all_vectors_share_keep_their_scale(centre):
    theta = torch.tensor([[2.0, 2.0, 1.0, 5.0], [2.0, 2.0, 3.0, 7.0]])
    standardise = Standardiser(theta, (2, 2), centre)
    assert standardise.std[:2].tolist() == [1, 1] and standardise(theta)[:, :2].abs().max() == 0
    assert torch.equal(standardise.inverse(standardise(theta)), theta)


@pytest.mark.parametrize("part", [
    0.25 + 0.002 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1)),  # one number, as of a PReLU
    (0.1 + 0.002 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1))).expand(40, 77),  # all alike
    (0.1 + 0.002 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1))) * (1 + 1e-7 * torch.arange(9) % 2)],
    ids=["one", "alike", "alike up to rounding"])
def test_without_a_spread_within_checkpoints_that_over_checkpoints_counts(part):
    others = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    theta, size = torch.cat([others, part, others], dim=1), part.shape[1]
    standardise = Standardiser(theta, (5, size, 5))
    spread = part.double().std(correction=0).item()
    assert standardise.std[5:5 + size].tolist() == pytest.approx([spread] * size, rel=1e-4)
    assert standardise(theta)[:, 5:5 + size].std().item() == pytest.approx(1, rel=0.02)
    assert standardise.inverse(torch.randn(4000, 10 + size))[:, 5].std().item() == pytest.approx(spread, rel=0.05)
    alone = Standardiser(others, (5,)).std  # no other tensor's scale has changed by a bit
    assert torch.equal(standardise.std[:5], alone) and torch.equal(standardise.std[-5:], alone)
    want = torch.stack([p.std(dim=1, correction=0).mean() for p in (others,)])
    assert torch.equal(alone[:1], want)


def test_a_vector_of_one_number_is_standardised_too():
    theta = torch.tensor([[2.0], [4.0], [6.0]])
    assert Standardiser(theta)(theta).std(correction=0).item() == pytest.approx(1)


def test_sizes_must_add_up():
    with pytest.raises(ValueError, match="sizes add up to 9: expected 10"):
        Standardiser(torch.from_numpy(zoo()), (3, 6))


# ---------------------------------------------------------------- the border

FITS = torch.arange(6.0).reshape(2, 3)


def inference(x):
    with torch.inference_mode():
        return x.clone()


def readonly(x):
    x = x.numpy().copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("given", [
    FITS, FITS.double(), FITS.half(), FITS.bfloat16(), FITS.clone().requires_grad_(),
    nn.Parameter(FITS), 1 * nn.Parameter(FITS),
    FITS.T.contiguous().T, FITS[:1].expand(2, 3), inference(FITS), FITS.numpy(), FITS.double().numpy(), FITS.half().numpy(),
    FITS.numpy().astype(">f8"), FITS.numpy().astype(np.longdouble), FITS.numpy()[::-1, ::-1], readonly(FITS)])
def test_vectors_takes_all_real_floats(unchecked, given):
    plain = given.detach().double().numpy() if isinstance(given, torch.Tensor) else given
    before = np.array(plain, dtype=np.float64)
    theta = subset.vectors(given, 3, 2)
    assert (type(theta), theta.dtype, theta.shape) in [(t, torch.float32, (2, 3)) for t in (torch.Tensor, nn.Parameter)]
    assert not theta.requires_grad and theta.grad_fn is None and theta.is_contiguous() and not theta.is_inference()
    np.testing.assert_array_equal(theta.numpy(), before)
    if isinstance(given, np.ndarray):
        theta += 1
        np.testing.assert_array_equal(given.astype(float), before)  # an array is never written through


def test_vectors_that_fit_are_not_copied():
    assert subset.vectors(FITS) is FITS and subset.vectors(FITS, device="cpu") is FITS
    assert subset.vectors(FITS, device="cpu").device == FITS.device
    large = torch.full((2, 3), 3e38)  # finite, though their sum is not
    assert subset.vectors(large) is large
    row = torch.arange(3.0)
    assert torch.equal(subset.vector(row, 3), row) and subset.vector(row.double().numpy()).dtype == torch.float32


@pytest.mark.parametrize("given, message", [
    ([[1.0, 2.0]], "theta is a list: expected a tensor or a NumPy array .vectors, D"), (None, "theta is a NoneType"),
    (pd.DataFrame({"a": [1.0]}), "theta is a DataFrame"), (np.ma.array(np.ones((2, 3)), mask=True), "theta is a MaskedArray"),
    *((FITS.to(dtype), f"numbers of type {dtype} .*: expected dense floats of 16, 32 or 64 bits") for dtype in (
        torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    (FITS.numpy().astype(int), "numbers of type int64"), (FITS.numpy() > 0, "numbers of type bool"),
    (FITS.numpy() + 1j, "numbers of type complex64"), (FITS.numpy().astype(object), "numbers of type object"),
    (np.array([["1"]]), "numbers of type <U1"), (FITS.to_sparse(), "torch.sparse_coo"), (FITS.to("meta"), "on meta"),
    (FITS[0], r"theta has shape \[3\]: expected \[vectors, D\]; a single vector is theta\[None\]"),
    (FITS[None], r"theta has shape \[1, 2, 3\]: expected \[vectors, D\]$"), (torch.tensor(1.0), r"theta has shape \[\]"),
    (torch.tensor([[0.0], [math.nan], [math.inf]]), "NaN or infinity in 2 of 3 vectors, first in vector 1$"),
    (np.array([[1.0], [-math.inf]]), "in 1 of 2 vectors, first in vector 1$"),
    (FITS.half() / 0, "in 2 of 2 vectors, first in vector 0$"),
    (torch.tensor([[1.0], [1e39]], dtype=torch.float64), "first in vector 1 .*beyond the range of float32"),
    (np.array([[-1e39], [0.0]]), "first in vector 0 .*beyond the range of float32")])
def test_vectors_refuses_the_rest_in_words(unchecked, given, message):
    with pytest.raises(ValueError, match=message):
        subset.vectors(given)
    if getattr(given, "ndim", 2) == 2:
        for use in (Standardiser, subset.distinct, tiny_subset().still):
            with pytest.raises(ValueError, match="^theta "):
                use(given)


def tiny_subset():
    return subset.select(tiny(), "1.weight")


@pytest.mark.parametrize("given, message", [
    ([1.0, 2.0, 3.0], "theta is a list"), (torch.arange(3), "numbers of type torch.int64"), (torch.ones(3) > 0, "torch.bool"),
    (np.arange(4.0), r"theta has shape \[4\]: expected \[3\]"),
    (torch.ones(1, 3), r"theta has shape \[1, 3\]: expected \[3\]"),
    (torch.tensor([1.0, math.nan, 1.0]), "NaN or infinity in 1 of 1")])
def test_a_single_vector_has_the_same_border(unchecked, given, message):
    net = tiny()
    with pytest.raises(ValueError, match=message):
        tiny_subset().load(net, given)
    assert (net[1].weight == 1).all()
    if "NaN" not in message:
        with pytest.raises(ValueError, match=message):
            tiny_subset().unflatten(given)


def test_unflatten_takes_arrays_and_keeps_precision_and_gradient():
    sub, theta = tiny_subset(), torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    assert sub.unflatten(theta)["1.weight"].dtype == torch.float64
    sub.unflatten(theta)["1.weight"].sum().backward()
    assert theta.grad.tolist() == [1, 1, 1] and sub.unflatten(theta.detach().numpy())["1.weight"].tolist() == [0, 1, 2]
    assert sub.load(tiny(), theta)[1].weight.tolist() == sub.load(tiny(), theta.bfloat16())[1].weight.tolist() == [0, 1, 2]


def test_loading_into_another_network_is_refused_and_changes_nothing():
    """Without a check the first would be broadcast over the larger tensor."""
    sub = Subset(("0.weight",), ((3,),))
    net = tiny()
    before = net[0].weight.clone()
    missing = Subset(("9.bias",), ((3,),))
    for other, message in ((sub, r"0.weight has shape \(3, 4\): expected \(3,\)"), (missing, "no parameter '9.bias'")):
        with pytest.raises(ValueError, match=message):
            other.load(net, torch.zeros(3))
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e5m2])
def test_quantised_tensors_of_a_state_dict_are_no_parameters(dtype):
    """Beside floats they would become floats without a word: -128 to 127, without their scale."""
    state = tiny().state_dict()
    state["1.weight"] = state["1.weight"].to(dtype)
    with pytest.raises(ValueError, match=f"1.weight holds numbers of type {dtype}: expected floats"):
        subset.select(tiny(), "all").flatten(state)


# ---------------------------------------------------------------- without a spread

def test_originals_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match="all 20 originals are the same vector: expected at least two different ones"):
        subset.distinct(torch.arange(5.0).expand(20, 5))
    with pytest.raises(ValueError, match="theta holds 1 vectors: expected at least 2"):
        subset.distinct(torch.zeros(1, 5))
    theta = torch.zeros(20, 5)
    theta[7, 3] = 1e-30
    subset.distinct(theta)


def test_still_tensors_are_named():
    sub, theta = subset.select(tiny(), "all"), torch.randn(4, 29)
    assert sub.still(theta) == []
    theta[:, 12:15], theta[:, 18:21] = torch.randn(3), 0.0  # 0.bias and 1.bias
    assert sub.still(theta) == sub.still(theta.double().numpy()) == ["0.bias", "1.bias"]


def test_vectors_of_another_length_or_number_are_refused():
    with pytest.raises(ValueError, match=r"shape \[2, 3\]: expected \[vectors, 4\]"):
        subset.vectors(FITS, 4)
    with pytest.raises(ValueError, match="holds 2 vectors: expected at least 3"):
        subset.vectors(FITS, 3, 3)


@pytest.mark.parametrize("size", [1, 6])
def test_a_generated_tensor_has_the_spread_of_the_originals_where_one_checkpoint_has_none(size):
    """.25 +- .002 over the checkpoints: in units of its own, a method would give it the width of those units."""
    generator = torch.Generator().manual_seed(0)
    level = 0.25 + 0.002 * torch.randn(60, 1, generator=generator)
    theta = torch.cat([torch.randn(60, 20, generator=generator), level.expand(-1, size)], dim=1)
    method = PDiff((20, size), progress=False, latent_dim=16, latent_model="gaussian", ae_channels=(4, 4), ae_steps=150)
    generated = method.fit(theta).sample(500, torch.Generator().manual_seed(1))[:, 20:]
    assert 0.0002 < generated.std(dim=0).mean().item() < 0.004 and abs(generated.mean().item() - 0.25) < 0.002
