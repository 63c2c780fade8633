"""symmetry.py: permuted networks are the same function; matching against brute force and against known permutations."""

import itertools

import pytest
import torch
from torch import nn

from pdiff_lib import networks
from pdiff_lib.networks import subset, symmetry
from pdiff_lib.networks.classifiers import _Residual

SIDES = {"hyperrep-cnn": 32, "mlp-mini": 64, "convnet-mini": 64, "resnet-mini": 64}
UNITS = {"hyperrep-cnn": [16, 32, 15, 20], "mlp-mini": [64, 16], "convnet-mini": [8, 8, 4, 16], "resnet-mini": [8, 4, 4, 16]}
every_network = pytest.mark.parametrize("name", SIDES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prepared(name, k=3):
    """A network, its groups and k parameter vectors, layer norms among them not at their initial ones and zeros."""
    net = networks.create(name, 10, 3)
    sub = subset.select(net, "all")
    theta = sub.flatten(net) * (1 + 0.3 * torch.randn(k, sub.numel, generator=seeded())) + 0.02 * torch.randn(k, sub.numel)
    return net, sub, symmetry.groups(net, sub), theta


def outputs(net, sub, theta, x):
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net.eval(), sub.unflatten(t), (x,)) for t in theta])


@every_network
def test_a_permuted_network_computes_the_same_function(name):
    net, sub, groups, theta = prepared(name)
    assert [len(g) for g in groups] == UNITS[name]
    x = torch.randn(8, 3, SIDES[name], SIDES[name], generator=seeded(1))
    moved = symmetry.permute(theta, groups, symmetry.random(groups, 3, seeded(2)))
    a, b = outputs(net, sub, theta, x), outputs(net, sub, moved, x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert ((moved != theta).float().mean(dim=1) > 0.6).all()  # nearly all numbers moved
    assert torch.equal(moved.sort(dim=1).values, theta.sort(dim=1).values)  # and none was lost
    one_group = [p if i == 0 else torch.arange(len(g)).expand(3, -1)
                 for i, (g, p) in enumerate(zip(groups, symmetry.random(groups, 3, seeded(3))))]
    torch.testing.assert_close(outputs(net, sub, symmetry.permute(theta, groups, one_group), x), a, rtol=1e-5,
                               atol=1e-5 * float(a.abs().max()))


@every_network
def test_every_hidden_unit_is_found(name):
    """The numbers of a unit are those that a change of its bias's place must move: each number of a hidden layer's weights
    stands in the group of its output and in that of its input."""
    _, sub, groups, _ = prepared(name)
    times = torch.zeros(sub.numel, dtype=torch.long)
    for g in groups:
        assert g.unique().numel() == g.numel()
        times[g.flatten()] += 1
    times = {n: t.long() for n, t in sub.unflatten(times.double()).items()}
    layers = [n for n, t in times.items() if t.ndim in (2, 4)]  # weights of linear and convolution layers
    assert (times[layers[0]] == 1).all() and (times[layers[-1]] == 1).all()  # inputs and outputs keep their order
    assert all((times[n] == 2).all() for n in layers[1:-1])
    assert (times[layers[-1].replace("weight", "bias")] == 0).all()


@every_network
def test_alignment_undoes_a_permutation_exactly(name):
    _, _, groups, theta = prepared(name)
    moved = symmetry.permute(theta[:1].expand(5, -1), groups, symmetry.random(groups, 5, seeded(4)))
    assert torch.equal(symmetry.align(moved, theta[0], groups), theta[:1].expand(5, -1))


@every_network
def test_alignment_never_goes_further_away(name):
    net, sub, groups, theta = prepared(name, k=2)
    others = torch.stack([sub.flatten(networks.create(name, 10, 3, seed=s)) for s in range(1, 6)])
    aligned = symmetry.align(others, theta[0], groups)
    before, after = ((t - theta[0]).norm(dim=1) for t in (others, aligned))
    assert (after < before).all()
    assert torch.equal(symmetry.align(aligned, theta[0], groups), aligned)  # it is done
    x = torch.randn(4, 3, SIDES[name], SIDES[name], generator=seeded(1))
    a, b = outputs(net, sub, others, x), outputs(net, sub, aligned, x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_alignment_of_one_layer_is_the_best_of_all_permutations():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net.input_shape = (3,)
    sub = subset.select(net, "all")
    groups = symmetry.groups(net, sub)
    theta, reference = torch.randn(6, sub.numel, generator=seeded()), torch.randn(sub.numel, generator=seeded(1))
    aligned = symmetry.align(theta, reference, groups)
    for vector, found in zip(theta, aligned):
        every = [symmetry.permute(vector[None], groups, [torch.tensor([p])])[0] for p in itertools.permutations(range(4))]
        assert (found - reference).norm() == pytest.approx(min(float((v - reference).norm()) for v in every), rel=1e-6)
    together = torch.cat([symmetry.align(v[None], reference, groups) for v in theta])
    assert torch.equal(together, aligned)  # a network's alignment does not depend on the others


def test_ties_do_not_go_round_in_circles():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net.input_shape = (3,)
    sub = subset.select(net, "all")
    theta = torch.ones(2, sub.numel)
    assert torch.equal(symmetry.align(theta, torch.ones(sub.numel), symmetry.groups(net, sub)), theta)


def test_skip_connections_and_flattened_maps():
    """Two residual blocks in a row, the second after a norm; then 5 channels of 2 x 2 positions into a linear layer."""
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.LayerNorm([5, 6, 6]), _Residual(nn.Conv2d(5, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 1)),
        nn.LayerNorm([5, 6, 6]), _Residual(nn.Conv2d(5, 4, 1), nn.GELU(), nn.Conv2d(4, 5, 1), nn.GELU()),
        nn.MaxPool2d(3), nn.Flatten(), nn.Linear(20, 3))
    net.input_shape = (2, 8, 8)
    sub = subset.select(net, "all")
    groups = symmetry.groups(net, sub)
    assert [len(g) for g in groups] == [5, 3, 4]
    theta, x = torch.randn(3, sub.numel, generator=seeded()), torch.randn(4, 2, 8, 8, generator=seeded(1))
    moved = symmetry.permute(theta, groups, symmetry.random(groups, 3, seeded(2)))
    torch.testing.assert_close(outputs(net, sub, moved, x), outputs(net, sub, theta, x), rtol=1e-4, atol=1e-4)


def test_augmentation_puts_permuted_copies_after_the_originals():
    net, sub, groups, theta = prepared("hyperrep-cnn")
    more = symmetry.augment(theta, groups, 2, seeded())
    assert more.shape == (9, sub.numel) and torch.equal(more[:3], theta)
    assert torch.equal(symmetry.augment(theta, groups, 0), theta)
    assert torch.equal(more.sort(dim=1).values, theta.sort(dim=1).values.repeat(3, 1))
    assert torch.pdist(more).min() > 0 and torch.equal(more, symmetry.augment(theta, groups, 2, seeded()))
    x = torch.randn(4, 3, 32, 32, generator=seeded(1))
    torch.testing.assert_close(outputs(net, sub, more, x), outputs(net, sub, theta, x).repeat(3, 1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [
    torch.Tensor.double, torch.Tensor.bfloat16, lambda t: t.requires_grad_(), torch.Tensor.numpy])
def test_all_floats_are_taken_and_none_is_changed(change):
    _, _, groups, theta = prepared("hyperrep-cnn")
    theta = theta.bfloat16().float()
    given, orders = change(theta.clone()), symmetry.random(groups, 3, seeded())
    calls = [lambda t: symmetry.permute(t, groups, orders), lambda t: symmetry.augment(t, groups, 1, seeded()),
             lambda t: symmetry.align(t, t[0], groups), lambda t: symmetry.augment(t, groups, 0)]
    for call in calls:
        found = call(given)
        assert torch.equal(found, call(theta)) and found.dtype == torch.float32 and not found.requires_grad
        found.zero_()
        assert torch.equal(torch.as_tensor(given).float(), theta)


def test_permutations_are_drawn_where_the_generator_lives(unchecked, monkeypatch):
    """A CUDA generator cannot be made here: whoever draws must ask for its device."""
    class Cuda:
        device = torch.device("cuda", 1)

    asked, draw = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, device: asked.append(device) or draw(*shape))
    found = symmetry.random((torch.arange(12).reshape(3, 4), torch.arange(10).reshape(5, 2)), 2, Cuda())
    assert asked == [Cuda.device] * 2 and [(p.shape, p.device.type) for p in found] == [((2, 3), "cpu"), ((2, 5), "cpu")]


class Twisted(nn.Module):
    """Looks like a sequence, and is none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.input_shape = (4,)

    def forward(self, x):
        return self.layers(x + self.layers[0](x).cumsum(1))


@pytest.mark.parametrize("net, message", [
    (networks.create("vit-mini", 10), "_ViTMini .the network.: expected hyperrep-cnn, mlp-mini"),
    (networks.create("test_resnet", 10), "ResNet .the network.: expected hyperrep-cnn"),
    (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), "BatchNorm1d .1."),
    (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)), "Conv2d .0."),
    (nn.Sequential(nn.Linear(4, 2)), "expected hyperrep-cnn"),  # nothing hidden
    (nn.Sequential(nn.Linear(4, 3), _Residual(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2)), "the function of Sequential"),
    (Twisted(), "leave the function of Twisted as it is")], ids=lambda v: type(v).__name__)
def test_networks_that_are_not_understood_are_refused(net, message):
    if not hasattr(net, "input_shape"):
        net.input_shape = (4,)
    with pytest.raises(ValueError, match=message):
        symmetry.groups(net, subset.select(net, "all"))


def test_wrong_arguments_are_named():
    net, _, groups, theta = prepared("hyperrep-cnn")
    with pytest.raises(ValueError, match="a subset of 2 tensors: expected all"):
        symmetry.groups(net, subset.select(net, "0.*"))
    with pytest.raises(ValueError, match="copies is -1"):
        symmetry.augment(theta, groups, -1)


def test_wrong_shapes_are_named(unchecked):
    _, _, groups, theta = prepared("hyperrep-cnn")
    with pytest.raises(ValueError, match=r"permutations of shapes \[\(2, 16\).*expected \[\(3, 16\)"):
        symmetry.permute(theta, groups, symmetry.random(groups, 2))
    with pytest.raises(ValueError, match=r"the reference has shape \[7\]: expected \[10853\]"):
        symmetry.align(theta, torch.zeros(7), groups)
    lost = symmetry.random(groups, 3)
    lost[1][2] = lost[1][2, 0]  # 32 times the same unit
    with pytest.raises(ValueError, match="permutations of 32 units do not hold each of them once"):
        symmetry.permute(theta, groups, lost)
    for bad, message in ((theta.long(), "torch.int64"), (theta / 0, "NaN or infinity in 3 of 3"), (theta[0], "theta.None.")):
        orders = symmetry.random(groups, 3)
        for use in (lambda t: symmetry.permute(t, groups, orders), lambda t: symmetry.augment(t, groups, 1),
                    lambda t: symmetry.align(t, theta[0], groups), lambda t: symmetry.align(theta, t[0], groups)):
            with pytest.raises(ValueError, match=f"{message}|shape|in 1 of 1"):
                use(bad)
