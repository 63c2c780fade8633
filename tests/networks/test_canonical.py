"""canonical.py: trained networks keep their function; one order and one scale, wherever a network starts from."""

import itertools

import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch import nn

from pdiff_lib import networks
from pdiff_lib.networks import canonical, subset, symmetry

DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16).float(), torch.tensor(DIGITS.target)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def known(net):
    sub = subset.select(net, "all")
    return net, sub, symmetry.groups(net, sub), symmetry.scalings(net, sub)


def mlp(*widths):
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
    net = nn.Sequential(nn.Flatten(), *layers)
    net.input_shape = (widths[0],)
    return known(net)


def outputs(net, sub, theta, x):
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net.eval(), sub.unflatten(t), (x,)) for t in theta])


def moved(theta, groups, scalings, seed=0):
    """The same functions, in another order and on other scales."""
    theta = symmetry.permute(theta, groups, symmetry.random(groups, len(theta), seeded(seed)))
    for scaling in scalings:
        theta = canonical.scaled(theta, scaling, torch.randn(len(theta), len(scaling[0]), generator=seeded(seed + 1)).exp())
    return theta


@pytest.fixture(scope="module")
def trained():
    """24 networks 64-10-10 trained independently on the first 900 digits."""
    net, sub, groups, scalings = mlp(64, 10, 10)
    theta = torch.stack([sub.flatten(mlp_of(seed)) for seed in range(24)]).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.02)
    for step in range(120):
        batch = torch.randint(900, (128,), generator=seeded(step))
        scores = torch.vmap(lambda t: torch.func.functional_call(net, sub.unflatten(t), (X[batch],)))(theta)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores.flatten(0, 1), Y[batch].repeat(24), reduction="sum").backward()
        optimizer.step()
    theta = theta.detach()
    assert accuracy(net, sub, theta).min() > 0.8
    return net, sub, groups, scalings, theta


def mlp_of(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))


def accuracy(net, sub, theta):
    return (outputs(net, sub, theta, X[900:]).argmax(2) == Y[900:]).float().mean(1)


def convnet(*activations, shape=(1, 16, 16)):
    a, b, c = activations
    net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), a, nn.Conv2d(8, 6, 3), b, nn.Flatten(), nn.Linear(96, 9), c,
                        nn.Linear(9, 10))
    net.input_shape = shape
    return net


NETS = {name: networks.create(name, 10, 3) for name in ("hyperrep-cnn", "mlp-mini", "convnet-mini", "resnet-mini", "vit-mini",
                                                        "convnext-mini")}
NETS |= {"tanh": convnet(nn.Tanh(), nn.Tanh(), nn.Tanh()), "leaky": convnet(nn.LeakyReLU(), nn.LeakyReLU(), nn.LeakyReLU()),
         "mixed": convnet(nn.Tanh(), nn.LeakyReLU(0.2), nn.ReLU())}


@pytest.mark.parametrize("name", NETS)
def test_every_network_keeps_its_function_and_comes_out_the_same(name):
    net, sub, groups, scalings = known(NETS[name])
    theta = sub.flatten(net) * (1 + 0.3 * torch.randn(4, sub.numel, generator=seeded())) \
        + 0.02 * torch.randn(4, sub.numel, generator=seeded(1))
    x = torch.randn(6, *net.input_shape, generator=seeded(2))
    a, other = outputs(net, sub, theta, x), moved(theta, groups, scalings, 3)
    found = canonical.canonical(theta, groups, scalings)
    for same in (canonical.balance(theta, scalings), canonical.match(theta, theta[1], groups), found, other):
        torch.testing.assert_close(outputs(net, sub, same, x), a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    torch.testing.assert_close(canonical.canonical(other, groups, scalings), found, rtol=1e-4, atol=1e-5)
    orders = symmetry.permute(theta, groups, symmetry.random(groups, 4, seeded(4)))
    assert torch.equal(canonical.canonical(orders, groups), canonical.canonical(theta, groups))  # to the bit
    copies = symmetry.permute(theta[:1].expand(3, -1), groups, symmetry.random(groups, 3, seeded(5)))
    assert torch.equal(canonical.match(copies, theta[0], groups), theta[:1].expand(3, -1))


def test_trained_networks_keep_their_function_and_can_be_averaged(trained):
    net, sub, groups, scalings, theta = trained
    found = canonical.canonical(theta, groups, scalings)
    a = outputs(net, sub, theta, X)
    torch.testing.assert_close(outputs(net, sub, found, X), a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    raw, first, ordered = (float(accuracy(net, sub, t.mean(0)[None])) for t in (theta, symmetry.align(theta, theta[0], groups), found))
    assert min(ordered, first) > raw + 0.3, (raw, first, ordered)  # 0.70, 0.67, 0.17


def test_balanced_sides_have_one_norm_and_theta_the_smallest(trained):
    _, sub, _, scalings, theta = trained
    (incoming, outgoing), = scalings
    found = canonical.balance(theta, scalings)
    torch.testing.assert_close(found[:, incoming].norm(dim=2), found[:, outgoing].norm(dim=2), rtol=1e-5, atol=0)
    product = theta[:, incoming].norm(dim=2) * theta[:, outgoing].norm(dim=2)
    torch.testing.assert_close(found[:, incoming].norm(dim=2), product.sqrt(), rtol=1e-5, atol=0)
    _, sub, _, scalings = mlp(6, 5, 4, 3)  # layers that share numbers: against a general minimiser
    theta = torch.randn(2, sub.numel, generator=seeded())

    def square(logs, vector):
        for scaling, log in zip(scalings, torch.tensor(logs).split([5, 4])):
            vector = canonical.scaled(vector, scaling, log.exp()[None])
        return float(vector.square().sum())

    for vector, found in zip(theta.double(), canonical.balance(theta, scalings)):
        best = minimize(square, [0.0] * 9, vector[None]).fun
        assert best < 0.99 * float(vector.square().sum())
        assert float(found.double().square().sum()) == pytest.approx(best, rel=1e-6)


def test_a_scale_that_came_in_makes_no_difference():
    _, sub, groups, scalings = mlp(6, 5, 5, 5, 3)
    theta = torch.randn(5, sub.numel, generator=seeded())
    other = moved(theta, (), scalings)  # other scales, the same order
    assert (other / theta).abs().max() > 10
    torch.testing.assert_close(canonical.balance(other, scalings), canonical.balance(theta, scalings), rtol=1e-5, atol=1e-6)


def test_units_with_zeros_on_one_side_stay():
    _, sub, groups, scalings = mlp(6, 4, 3)
    (incoming, outgoing), = scalings
    theta = torch.randn(3, sub.numel, generator=seeded())
    theta[0, incoming[1]], theta[1, outgoing[2]], theta[2, groups[0][3]] = 0, 0, 0
    found = canonical.balance(theta, scalings)
    for k, unit in enumerate((1, 2, 3)):
        assert torch.equal(found[k, groups[0][unit]], theta[k, groups[0][unit]])
        norms = (found[k, positions].norm(dim=1)[torch.arange(4) != unit] for positions in (incoming, outgoing))
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    ordered = canonical.canonical(theta, groups, scalings)
    assert torch.equal(ordered.sort(dim=1).values, found.sort(dim=1).values)
    zeros = torch.zeros(2, sub.numel)
    assert torch.equal(canonical.canonical(zeros, groups, scalings), zeros)


def test_with_one_hidden_layer_it_is_the_best_of_all_permutations():
    _, sub, groups, _ = mlp(3, 4, 2)
    theta, reference = torch.randn(20, sub.numel, generator=seeded()), torch.randn(sub.numel, generator=seeded(1))
    every = torch.stack([symmetry.permute(theta, groups, [torch.tensor(p).expand(20, -1)]) for p in itertools.permutations(range(4))])
    best = (every - reference).norm(dim=2).min(dim=0)
    found = canonical.match(theta, reference, groups)
    assert torch.equal(found, every[best.indices, torch.arange(20)])
    assert torch.equal(found, symmetry.align(theta, reference, groups))


def test_with_several_layers_no_exchange_of_two_units_comes_nearer():
    _, sub, groups, _ = mlp(3, 5, 4, 5, 2)
    theta, reference = torch.randn(6, sub.numel, generator=seeded()), torch.randn(sub.numel, generator=seeded(1))
    found = canonical.match(theta, reference, groups)
    distance = (found - reference).norm(dim=1)
    assert (distance <= (canonical._started(theta, reference, groups) - reference).norm(dim=1)).all()
    for g in groups:
        for a, b in itertools.combinations(range(len(g)), 2):
            order = torch.arange(len(g)).expand(6, -1).clone()
            order[:, [a, b]] = order[:, [b, a]]
            assert ((symmetry.permute(found, (g,), [order]) - reference).norm(dim=1) >= distance - 1e-6).all()
    assert torch.equal(canonical.match(found, reference, groups), found)


def test_each_round_brings_the_networks_nearer_to_each_other(trained):
    """As in k-means with one centre: matching and averaging both lower the sum of squares."""
    _, _, groups, scalings, theta = trained
    theta, squares = canonical.balance(theta, scalings), []
    for rounds in (1, 2, 3, 4):
        centre, found = canonical.centre(theta, groups, rounds=rounds), canonical.canonical(theta, groups, rounds=rounds)
        squares += [float((found - c).square().sum()) for c in (centre, found.mean(0))]
        assert ((found - centre).norm(dim=1) <= (theta - centre).norm(dim=1) + 1e-5).all()
    assert squares == sorted(squares, reverse=True) and squares[-1] < 0.9 * float((theta - theta.mean(0)).square().sum())


def test_the_first_round_matches_to_a_given_network(trained):
    _, _, groups, scalings, theta = trained
    found = canonical.canonical(theta, groups, reference=theta[5], rounds=1)
    assert torch.equal(found[5], theta[5]) and torch.equal(found, symmetry.align(theta, theta[5], groups))
    scale = canonical.scaled(theta[5:6], scalings[0], torch.full((1, 10), 3.0))[0]
    torch.testing.assert_close(canonical.canonical(theta, groups, scalings, reference=scale),
                               canonical.canonical(theta, groups, scalings, reference=theta[5]), rtol=1e-4, atol=1e-6)


def test_together_as_one_by_one(trained, monkeypatch):
    *_, groups, scalings, theta = trained
    balanced, matched = canonical.balance(theta, scalings), canonical.match(theta, theta.mean(0), groups)
    assert torch.equal(matched, torch.cat([canonical.match(t[None], theta.mean(0), groups) for t in theta]))
    torch.testing.assert_close(balanced, torch.cat([canonical.balance(t[None], scalings) for t in theta]), rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(canonical, "NUMBERS", 5 * theta.shape[1])  # five networks in work at once
    assert torch.equal(canonical.match(theta, theta.mean(0), groups), matched)
    torch.testing.assert_close(canonical.balance(theta, scalings), balanced, rtol=1e-6, atol=1e-7)


def test_the_step_learns_from_some_networks_and_orders_others(trained):
    net, _, groups, scalings, theta = trained
    zoo, new = theta[:16], theta[16:]
    step = symmetry.Canonical(net, balanced=True, rounds=3).fit(zoo)
    assert torch.equal(step.encode(zoo), canonical.canonical(zoo, groups, scalings))
    ordered = step.encode(new)
    torch.testing.assert_close(step.encode(moved(new, groups, scalings)), ordered, rtol=1e-4, atol=1e-6)
    balanced = canonical.balance(new, scalings)
    assert ((ordered - step.reference).norm(dim=1) < (balanced - step.reference).norm(dim=1)).all()
    assert torch.equal(step.decode(ordered), ordered)
    plain = symmetry.Canonical(net).fit(zoo)  # as before there was more
    assert torch.equal(plain.encode(new), symmetry.align(new, zoo[0], groups)) and torch.equal(plain.reference, zoo[0])


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.bfloat16, lambda t: t.requires_grad_(), torch.Tensor.numpy])
def test_all_floats_are_taken_and_none_is_changed(trained, change):
    *_, groups, scalings, theta = trained
    theta = theta[:3].bfloat16().float()
    given = change(theta.clone())
    for call in (lambda t: canonical.balance(t, scalings), lambda t: canonical.balance(t, ()), lambda t: canonical.match(t, t[0], groups),
                 lambda t: canonical.canonical(t, groups, scalings)):
        found = call(given)
        assert torch.equal(found, call(theta)) and found.dtype == torch.float32 and not found.requires_grad
        found.zero_()
        assert torch.equal(torch.as_tensor(given).float(), theta)


def test_wrong_arguments_are_named(trained, unchecked):
    *_, groups, scalings, theta = trained
    with pytest.raises(ValueError, match="rounds is 0: expected at least 1"):
        canonical.canonical(theta, groups, rounds=0)
    with pytest.raises(ValueError, match=r"the reference has shape \[7\]: expected \[760\]"):
        canonical.match(theta, torch.zeros(7), groups)
    with pytest.raises(ValueError, match=r"theta has shape \[7\]: expected \[760\]"):
        canonical.canonical(theta, groups, reference=torch.zeros(7))
    for call in (lambda t: canonical.match(t, t[0], groups), lambda t: canonical.balance(t, scalings),
                 lambda t: canonical.centre(t, groups, rounds=1)):
        with pytest.raises(ValueError, match="theta has 700 numbers per vector: expected more than 7.., the last position"):
            call(theta[:, :700])
        with pytest.raises(ValueError, match="NaN or infinity in 24 of 24"):
            call(theta / 0) if call(theta) is not None else None
