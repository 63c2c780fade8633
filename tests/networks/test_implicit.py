"""implicit.py: fields by name against the same written out, and that symmetry understands them."""

import math

import pytest
import torch

from pdiff_lib.base import training
from pdiff_lib.networks import implicit, subset, symmetry


def made(name: str, d: int) -> implicit.Field:
    with training.seeded(0):
        return implicit.create(name, d)


@pytest.mark.parametrize("name, d, numel", [("field-128-128-128", 3, 36737), ("field-32-32", 2, 1697), ("field-32-32-o6", 2, 1953),
                                            ("field-8-o0", 3, 41), ("siren-32-32", 2, 1185)])
def test_a_name_says_how_many_numbers(name, d, numel):
    net = made(name, d)
    assert net.input_shape == (d,) and sum(p.numel() for p in net.parameters()) == numel
    assert net(torch.zeros(4, 7, d)).shape == (4, 7, 1)


def test_a_field_is_relu_on_coordinates_and_their_octaves():
    net, x = made("field-8-4-o2", 2), torch.tensor([[0.3, -0.7]])
    (w1, b1, w2, b2, w3, b3) = net.parameters()
    h = torch.tensor([0.3, -0.7, *(f(k * v) for k in (1, 2) for f in (math.sin, math.cos) for v in (0.3, -0.7))])
    h = (w2 @ (w1 @ h + b1).relu() + b2).relu()
    torch.testing.assert_close(net(x)[0], w3 @ h + b3)


def test_a_siren_is_the_papers_with_its_frequency_in_the_weights():
    """sin(w (W x + b)) of plain layers with SIREN's initial weights, drawn from the same random numbers."""
    net, x = made("siren-64-64-w10", 2), 2 * torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) - 1
    w1, b1, w2, b2, w3, b3 = net.parameters()
    h = torch.sin(10 * (x @ (w1 / 10).T + b1 / 10))
    h = torch.sin(10 * (h @ (w2 / 10).T + b2 / 10))
    torch.testing.assert_close(net(x), h @ w3.T + b3)
    assert 0.45 < (w1 / 10).abs().max() <= 0.5  # 1 / d
    for w, factor in ((w2, 10), (w3, 1)):
        bound = math.sqrt(6 / 64) / 10 * factor
        assert 0.95 * bound < w.abs().max() <= bound
    assert made("siren-64-64", 2)(x).std() > 0.01


@pytest.mark.parametrize("name, d, scales", [("field-32-32", 2, 2), ("field-128-128-128", 3, 3), ("siren-32-32", 2, 0), ("siren-256-256-256", 3, 0)])
def test_their_hidden_units_are_understood(name, d, scales):
    """`groups` refuses what does not leave the function as it is; here also by a permutation of all of them."""
    net = made(name, d)
    sub = subset.select(net, "all")
    groups = symmetry.groups(net, sub)
    assert [len(g) for g in groups] == [int(w) for w in name.split("-")[1:]] and len(symmetry.scalings(net, sub)) == scales
    theta = sub.flatten(net)[None]
    moved = symmetry.permute(theta, groups, symmetry.random(groups, 1, torch.Generator().manual_seed(0)))
    x = 2 * torch.rand(30, d, generator=torch.Generator().manual_seed(1)) - 1
    a, b = (torch.func.functional_call(net, sub.unflatten(t[0]), (x,)) for t in (theta, moved))
    assert not torch.equal(theta, moved)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["field", "field-0", "field-8-w3", "siren-8-o2", "siren-8-w0", "mlp-8", "field-8-8-"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"network '{name}'"):
        implicit.create(name, 2)


def test_a_raster_has_pictures_row_by_row_and_bodies_x_first():
    plane, space = implicit.raster(4), implicit.raster(3, 3)
    assert plane.view(4, 4, 2)[1, 3].tolist() == [0.75, -0.25]
    torch.testing.assert_close(space.view(3, 3, 3, 3)[0, 1, 2], torch.tensor([-2 / 3, 0, 2 / 3]))
    with pytest.raises(ValueError, match="side is 0"):
        implicit.raster(0)
