"""symmetry.py: permuted networks are the same function; matching against brute force and against known permutations."""

import itertools

import pytest
import torch
from torch import nn

from pdiff_lib import networks
from pdiff_lib.networks import canonical, subset, symmetry
from pdiff_lib.networks.classifiers import _Residual

SIDES = {"hyperrep-cnn": 32, "mlp-mini": 64, "convnet-mini": 64, "resnet-mini": 64}
UNITS = {"hyperrep-cnn": [16, 32, 15, 20], "mlp-mini": [64, 16], "convnet-mini": [8, 8, 4, 16], "resnet-mini": [8, 4, 4, 16]}
every_network = pytest.mark.parametrize("name", SIDES)
ATTENTION = [4] + [8] * 8  # heads, then within each head what q and k, and what v and `out` share
BEYOND = {"vit-mini": (ATTENTION + [64]) * 4, "convnext-mini": [16, 64, 32, 128, 128, 32, 128, 128, 32, 128, 128]}


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


@pytest.mark.parametrize("name", [*SIDES, *BEYOND])
def test_a_permuted_network_computes_the_same_function(name):
    net, sub, groups, theta = prepared(name)
    assert [len(g) for g in groups] == {**UNITS, **BEYOND}[name]
    x = torch.randn(8, *net.input_shape, generator=seeded(1))
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


@pytest.mark.parametrize("name, moved_by", [
    ("vit-mini", {"qkv": 2, "out": 2, "layers.1.weight": 1, "layers.1.bias": 1, "layers.3.weight": 1}),  # else 0: the stream stays
    ("convnext-mini", {"stages.1.downsample.1.weight": 2, "stages.2.downsample.1.weight": 2, "stages.3.downsample.1.weight": 2,
                       "fc1.weight": 2, "fc2.weight": 2, "head.fc.bias": 0, "": 1})])
def test_every_unit_is_found_in_attention_and_in_convnext(name, moved_by):
    _, sub, groups, _ = prepared(name)
    times = torch.zeros(sub.numel)
    for g in groups:
        assert g.unique().numel() == g.numel()
        times[g.flatten()] += 1
    for tensor, found in sub.unflatten(times).items():
        assert (found == next((n for part, n in moved_by.items() if part in tensor), 0)).all(), tensor


def test_fixed_positions_pin_the_order_of_the_residual_stream():
    """All that reads or writes the stream, permuted alike: another function, but for a network without positions."""
    net, sub, _, theta = prepared("vit-mini", k=1)
    at, x = sub.unflatten(torch.arange(sub.numel).double()), torch.randn(4, 3, 64, 64, generator=seeded(1))
    reads = ("qkv.weight", "layers.1.weight", "head.weight")
    stream = [p.long().movedim(1 if n.endswith(reads) else 0, 0).reshape(64, -1) for n, p in at.items()
              if not n.startswith("embed.0") and not n.endswith(("layers.1.bias", "head.bias"))]
    moved = symmetry.permute(theta, (torch.cat(stream, dim=1),), [torch.arange(64).roll(1)[None]])
    a, b = outputs(net, sub, theta, x), outputs(net, sub, moved, x)
    assert (a - b).abs().max() > 0.01 * a.abs().max()
    net.positions.zero_()
    a, b = outputs(net, sub, theta, x), outputs(net, sub, moved, x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def sequence(*layers, shape):
    net = nn.Sequential(*layers)
    net.input_shape = shape
    return net


SCALED = [  # a network; how many units there are of each kind that has a free scale
    (networks.create("hyperrep-cnn", 10), [16, 32, 15, 20]),
    (networks.create("mlp-mini", 10), [64, 16]),  # by the numbers of the layer norms
    (networks.create("convnet-mini", 10), [8, 8, 4, 16]),
    (networks.create("resnet-mini", 10), [4, 4, 8, 16]),  # within the blocks, and after the last of them
    (networks.create("vit-mini", 10), [192] + [64, 32, 32, 64] * 4 + [64]),  # norm to q, k, v; q to k; v to out; norm to MLP
    (networks.create("convnext-mini", 10), [16] * 2 + ([16] + [32] * 4) + ([32] * 5) * 2 + [32]),
    (sequence(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10), shape=(1, 8, 8)), [10]),
    (sequence(nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.Tanh(), nn.Conv2d(8, 6, 5), nn.LeakyReLU(), nn.Flatten(), nn.Linear(600, 20),
              nn.Tanh(), nn.Linear(20, 10), shape=(1, 32, 32)), [6]),  # none where a tanh is between
    (sequence(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3), nn.LayerNorm(3), nn.Sigmoid(), nn.Linear(3, 2), shape=(5,)), []),
    (sequence(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.AvgPool2d(2), nn.Conv2d(4, 3, 1),
              nn.ReLU(), nn.Flatten(), nn.Linear(12, 3, bias=False), shape=(2, 6, 6)), [4, 4, 3]),  # through a depthwise convolution
]


@pytest.mark.parametrize("net, units", SCALED, ids=lambda v: type(v).__name__)
def test_a_free_scale_is_found_where_there_is_one_and_leaves_the_function(net, units):
    sub = subset.select(net, "all")
    scalings = symmetry.scalings(net, sub)
    assert [len(incoming) for incoming, _ in scalings] == [len(outgoing) for _, outgoing in scalings] == units
    theta = sub.flatten(net) + 0.05 * torch.randn(3, sub.numel, generator=seeded())
    moved, x = theta, torch.randn(8, *net.input_shape, generator=seeded(1))
    for scaling in scalings:
        moved = canonical.scaled(moved, scaling, torch.randn(3, len(scaling[0]), generator=seeded(2)).exp())
    a, b = outputs(net, sub, theta, x), outputs(net, sub, moved, x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert bool((moved != theta).any()) == bool(units)


def test_larger_networks_of_the_same_layers_are_understood():
    """A ConvNeXt of timm's own with 1 x 1 convolutions for its MLPs, and a depthwise convolution in a sequence."""
    net = networks.create("test_convnext", 10, image_size=64)
    sub = subset.select(net, "all")
    groups = symmetry.groups(net, sub)
    theta, x = sub.flatten(net) + 0.05 * torch.randn(2, sub.numel, generator=seeded()), torch.randn(4, 3, 64, 64, generator=seeded(1))
    a = outputs(net, sub, theta, x)
    b = outputs(net, sub, symmetry.permute(theta, groups, symmetry.random(groups, 2, seeded(2))), x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    net = SCALED[-1][0]
    assert [len(g) for g in symmetry.groups(net, subset.select(net, "all"))] == [4, 3]


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
    (networks.create("test_vit", 10), "VisionTransformer .the network.: expected hyperrep-cnn, mlp-mini"),
    (networks.create("test_resnet", 10), "ResNet .the network.: expected hyperrep-cnn"),
    (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), "BatchNorm1d .1."),
    (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)), "Conv2d .0."),
    (nn.Sequential(nn.Linear(4, 2)), "expected hyperrep-cnn"),  # nothing hidden
    (nn.Sequential(nn.Linear(4, 3), _Residual(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2)), "the function of Sequential"),
    (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), shared := nn.Linear(4, 4), nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2)),
     "4.weight is a parameter of another layer as well"),
    (Twisted(), "leave the function of Twisted as it is")], ids=lambda v: type(v).__name__)
def test_networks_that_are_not_understood_are_refused(net, message):
    if not hasattr(net, "input_shape"):
        net.input_shape = (4,)
    with pytest.raises(ValueError, match=message):
        symmetry.groups(net, subset.select(net, "all"))


def test_scales_that_would_change_the_function_are_refused():
    net = Twisted()
    net.layers[0].register_forward_hook(lambda module, x, y: y.tanh())  # unseen in the order of the layers
    with pytest.raises(ValueError, match="no scales were found that leave the function of Twisted"):
        symmetry.scalings(net, subset.select(net, "all"))
    net = sequence(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2), shape=(4,))
    with pytest.raises(ValueError, match="BatchNorm1d .1."):
        symmetry.scalings(net, subset.select(net, "all"))


def test_wrong_arguments_are_named():
    net, _, groups, theta = prepared("hyperrep-cnn")
    for find in (symmetry.groups, symmetry.scalings):
        with pytest.raises(ValueError, match="a subset of 2 tensors: expected all"):
            find(net, subset.select(net, "0.*"))
    with pytest.raises(ValueError, match="rounds is 0: expected at least 1"):
        symmetry.Canonical(net, rounds=0)
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
