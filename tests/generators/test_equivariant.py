"""equivariant.py: the order of hidden units makes no difference, against brute force and on real networks; resuming; what is refused."""

import itertools
import math

import pytest
import torch
from test_sane import SHAPES, TEST, UNITS, accuracy, seeded, zoo
from torch import nn

from device import DEVICE
from pdiff_lib.base.runs import Store
from pdiff_lib.generators import baselines
from pdiff_lib.generators.equivariant import UnitFlow, UnitTransformer
from pdiff_lib.networks import subset, symmetry
from resumed import killed_and_resumed

SIZES = tuple(math.prod(shape) for shape in SHAPES)
SMALL = {"width": 16, "blocks": 1, "heads": 2, "steps": 6, "batch": 8, "solver_steps": 4}


def made(groups=(UNITS,), sizes=SIZES, **changes):
    return UnitFlow(sizes, groups, progress=False, **{**SMALL, **changes})


def shuffled(theta, seed=0):
    """Each network with its hidden units in a random order of its own: the same functions."""
    orders = torch.rand(len(theta), len(UNITS), generator=seeded(seed)).argsort(dim=1)
    return symmetry.permute(theta, (UNITS,), [orders])


def disturbed(net):
    for i, parameter in enumerate(net.parameters()):  # what starts at 0 too
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(i)).to(parameter)
    return net.eval()


@pytest.mark.parametrize("places", [False, True])
def test_another_order_of_units_gives_the_answer_in_that_order_unless_places_are_known(places):
    net = disturbed(UnitTransformer(760, (UNITS,), 16, 2, 4, places))
    x, t = torch.randn(5, 760, generator=seeded()), torch.rand(5, generator=seeded(1))
    with torch.no_grad():
        there, back = net(shuffled(x), t), shuffled(net(x, t))
    assert torch.allclose(there, back, atol=1e-5) != places
    assert float(back.std()) > 0.1


def test_all_tokens_reach_every_answer_and_a_number_of_two_units_gets_both():
    groups = (torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 4], [3, 5]]))  # 1 and 3 belong to both; 6 to none
    net = disturbed(UnitTransformer(7, groups, 8, 1, 2, False))
    x, t = torch.randn(1, 7, generator=seeded()), torch.tensor([0.3])
    assert (torch.func.jacrev(lambda v: net(v, t))(x)[0, :, 0].abs() > 1e-6).all()
    with torch.no_grad():
        for p in (*net.decoders.parameters(), *net.gate.parameters()):
            p.zero_()
        for i, decoder in enumerate(net.decoders):
            decoder.bias.fill_(10.0**i)
        assert net(x, t)[0].tolist() == [1, 11, 1, 11, 10, 10, 100]


def test_networks_in_any_order_are_the_same_to_it():
    theta = zoo()[:40].to(DEVICE)
    one, other = (made().fit(given) for given in (theta, shuffled(theta.cpu()).to(DEVICE)))
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.sample(3, seeded()), other.sample(3, seeded()), rtol=1e-2, atol=1e-3)
    known = [made(places="learned").fit(given).losses for given in (theta, shuffled(theta.cpu()).to(DEVICE))]
    assert not torch.allclose(*known, rtol=1e-3)


def test_units_of_the_noise_go_to_the_nearest_ones():
    groups = (torch.arange(12).view(4, 3),)
    fitted = made(groups, None).fit(torch.randn(20, 13, generator=seeded()))
    plain = made(groups, None, matching=False).fit(torch.randn(20, 13, generator=seeded()))
    (x0, x1), (before, same) = (f._pairs(torch.Generator(DEVICE).manual_seed(3)) for f in (fitted, plain))
    assert torch.equal(x1, same) and torch.equal(x0[:, 12], before[:, 12])
    for noise, given, data in zip(*(x[:, groups[0]].cpu() for x in (x0, before, x1))):
        found = {order: float((given[list(order)] - data).square().sum()) for order in itertools.permutations(range(4))}
        assert torch.equal(noise, given[list(min(found, key=found.get))])
    assert not torch.equal(x0, before)


def test_between_two_hidden_layers_units_know_their_places():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    net.input_shape = (5,)
    sub = subset.select(net, "all")
    groups = symmetry.groups(net, sub)
    fitted = made(groups, sub.sizes).fit(torch.randn(20, sub.numel, generator=seeded()))
    assert fitted.places and fitted.net.places.shape == (4 + 3 + 1, 16) and not made().places
    assert torch.isfinite(fitted.sample(3, seeded())).all()


def test_from_networks_in_any_order_it_makes_networks_that_work():
    theta = shuffled(zoo())
    fitted = made(width=64, blocks=2, heads=4, steps=500, batch=64, lr=3e-3, solver_steps=20).fit(theta)
    own, new = accuracy(theta, TEST).mean(), accuracy(fitted.sample(60, seeded()), TEST).mean()
    gaussian = accuracy(baselines.Gaussian().fit(theta).sample(60, seeded()), TEST).mean()
    assert own > 0.8 and new > gaussian + 0.1, (own, new, gaussian)


def test_a_killed_training_resumes_to_the_bit(tmp_path, monkeypatch):
    want = made().fit(zoo()[:20])
    resumed, steps = killed_and_resumed(lambda: made().fit(zoo()[:20], Store(tmp_path)), monkeypatch, at=3)
    assert steps == [3, 4, 5] and torch.equal(resumed.losses, want.losses)
    assert torch.equal(resumed.sample(5, seeded()), want.sample(5, seeded()))
    made(solver="rk4", solver_steps=3).fit(zoo()[:20], Store(tmp_path))
    assert len(steps) == 3  # how it samples is no part of what is trained
    made((UNITS[:9],)).fit(zoo()[:20], Store(tmp_path))
    assert len(steps) == 9


def test_what_it_cannot_learn_from_is_refused():
    for call, message in (
            (lambda: made(None), "groups of hidden units: None"), (lambda: made(()), "at least one"),
            (lambda: made((UNITS, UNITS[[0, 0]])), r"group 1 is torch.int64 \[2, 75\]: .* each position once"),
            (lambda: made(heads=3), "width is 16 with 3 heads"), (lambda: made(places="some"), "places is 'some'"),
            (lambda: made(sizes=None).fit(zoo()[:4, :700]), "700 numbers per vector: expected more than 749")):
        with pytest.raises(ValueError, match=message):
            call()
