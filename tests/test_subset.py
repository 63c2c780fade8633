"""subset.py: the paper's subsets by name and count, exactness both ways, standardising against NumPy, every refusal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pdiff_lib import networks, subset
from pdiff_lib.subset import Standardiser, Subset

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
        within = np.mean([row.std() for row in part])
        want[:, at : at + size] = (part - np.mean([row.mean() for row in part])) / (within if within > 0 else 1.0)
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


def test_constant_tensors_keep_their_scale():
    theta = torch.tensor([[2.0, 2.0, 1.0, 5.0], [2.0, 2.0, 3.0, 7.0]])
    standardise = Standardiser(theta, (2, 2))
    assert standardise(theta).tolist() == [[0, 0, -1.5, 0.5], [0, 0, -0.5, 1.5]]
    assert torch.equal(standardise.inverse(standardise(theta)), theta)


def test_sizes_must_add_up():
    with pytest.raises(ValueError, match="sizes add up to 9: expected 10"):
        Standardiser(torch.from_numpy(zoo()), (3, 6))


@pytest.mark.parametrize("theta, numel, at_least, message", [
    (torch.zeros(3), None, 1, r"theta has shape \[3\]: expected \[vectors, D\]"),
    (torch.zeros(2, 3), 4, 1, r"theta has shape \[2, 3\]: expected \[vectors, 4\]"),
    (torch.zeros(1, 3), 3, 2, "theta holds 1 vectors: expected at least 2"),
    (torch.tensor([[0.0], [math.nan], [math.inf]]), 1, 1, "NaN or infinity in 2 of 3 vectors, first in vector 1")])
def test_check_refuses(theta, numel, at_least, message):
    with pytest.raises(ValueError, match=message):
        subset.check(theta, numel, at_least)


def test_check_lets_good_vectors_pass():
    assert subset.check(torch.zeros(2, 3), 3, 2) is None
