"""methods.py: what methods that are not ours are given, may do, and must give."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from pdiff_lib.generators import methods


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


THETA = torch.randn(6, 5, generator=seeded(1)).bfloat16().half().float()  # numbers that all float types hold


class Copies:
    """Hands the zoo back, changed or not."""

    def __init__(self, change=lambda t: t):
        self.change = change

    def fit(self, theta):
        self.theta = theta

    def sample(self, n, generator=None):
        return self.change(self.theta[:n])


def sample(method, n=4):
    return methods.sample("own", method, n, 5, seeded(), 7)


@pytest.mark.parametrize("ruin", [
    lambda t: t.zero_(), lambda t: t.sub_(t.mean(0)), lambda t: t.numpy().fill(3), lambda t: t.data.add_(1),
    lambda t: t[0].copy_(t[1]), lambda t: t.resize_(1, 5), lambda t: t.requires_grad_()])
def test_a_fit_ruins_its_own_copy(ruin):
    class Ruins(Copies):
        def fit(self, theta):
            ruin(theta)

    theta = THETA.clone()
    methods.fit(Ruins(), theta, 0)
    assert torch.equal(theta, THETA) and not theta.requires_grad


def inference(t):
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize("change", [
    lambda t: t, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.numpy, nn.Parameter, inference,
    lambda t: t.numpy().astype(">f8"), lambda t: t.clone().requires_grad_() * 1, lambda t: t.T.contiguous().T])
def test_samples_become_vectors_that_the_method_holds_no_part_of(change):
    method = methods.fit(Copies(change), THETA, 0)
    theta = sample(method)
    assert type(theta) is torch.Tensor and theta.dtype == torch.float32 and torch.equal(theta, THETA[:4])
    assert not theta.requires_grad and theta.grad_fn is None and theta.is_contiguous() and not theta.is_inference()
    method.theta.zero_()
    assert torch.equal(theta, THETA[:4])


@pytest.mark.parametrize("change, message", [
    (lambda t: t[:3], r"sample\(4\) gave 3 vectors: expected 4"), (lambda t: t.repeat(2, 1), r"sample\(4\) gave 8 vectors"),
    (lambda t: t[:0], "theta holds 0 vectors"), (lambda t: t[0], r"theta has shape \[5\]: expected \[vectors, 5\]; a single"),
    (lambda t: t[:, 1:], r"theta has shape \[4, 4\]"), (lambda t: t[None], r"theta has shape \[1, 4, 5\]"),
    (lambda t: t.index_fill(0, torch.tensor([1, 3]), torch.nan), "NaN or infinity in 2 of 4 vectors, first in vector 1"),
    (lambda t: t.double() * 1e300, "beyond the range of float32"), (lambda t: t.long(), "numbers of type torch.int64"),
    (lambda t: list(t), "theta is a list"), (lambda t: None, "theta is a NoneType"), (lambda t: t > 0, "torch.bool")])
def test_what_is_no_set_of_vectors_is_refused_and_the_method_named(change, message):
    with pytest.raises(ValueError, match=f"^method 'own': .*{message}"):
        sample(methods.fit(Copies(change), THETA, 0))


class Draws(Copies):
    """Draws from all that is global, and leaves settings behind."""

    def _draw(self):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return torch.rand(1).item() + np.random.rand() + random.random()

    def fit(self, theta):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.drawn = self._draw()

    def sample(self, n, generator=None):
        return torch.full((n, 5), self._draw())


def test_what_is_global_is_as_it_was_and_draws_from_it_repeat():
    method, states = Draws(), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    first = sample(methods.fit(method, THETA, 3))
    torch.rand(3), np.random.rand(3)
    torch.set_rng_state(states[0])
    again = sample(methods.fit(method, THETA, 3))
    assert torch.equal(first, again) and not torch.equal(first, methods.sample("own", method, 4, 5, seeded(), 8))
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    after = np.random.get_state()[1]
    methods.fit(method, THETA, 3)
    assert np.array_equal(np.random.get_state()[1], after)


def test_what_is_global_is_as_it_was_after_an_error_too():
    class Fails(Draws):
        def fit(self, theta):
            super().fit(theta)
            raise RuntimeError("no")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        methods.fit(Fails(), THETA, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_what_fit_returns_is_the_method_where_it_can_sample():
    class Other(Copies):
        def __init__(self, result):
            self.result = result

        def fit(self, theta):
            return self.result

    for result in (None, [0.5, 0.1], torch.zeros(3), 0.0):  # losses, say
        assert isinstance(methods.fit(method := Other(result), THETA, 0), Other) and method.result is result
    assert methods.fit(Other(fitted := Copies()), THETA, 0) is fitted


class NoGenerator(Copies):
    def sample(self, n):
        return self.theta[:n]


class NeedsMore(Copies):
    def fit(self, theta, labels):
        self.theta = theta


@pytest.mark.parametrize("method", [object(), NoGenerator(), NeedsMore(), Copies, None, nn.Linear(2, 2)])
def test_what_is_no_method_is_refused_before_any_work(method):
    with pytest.raises(ValueError, match=r"^method 'own' is a .*expected an object with fit\(theta\) and sample\(n, gen"):
        methods.check("own", method)


def test_all_that_has_the_two_verbs_is_a_method():
    class WithStore(Copies):
        def fit(self, theta, store=None):
            return self

        def sample(self, n, **more):
            return n

    for method in (Copies(), WithStore(), Draws()):
        methods.check("own", method)


@pytest.mark.parametrize("ruin", [
    lambda t: t.add_(1), lambda t: t.numpy().fill(0), lambda t: t.data.mul_(2), lambda t: t[1:].zero_(),
    lambda t: t.copy_(t.flip(0)), lambda t: t.view(-1)[3].fill_(1e-30)])
def test_a_change_in_place_is_found_when_they_are_next_asked_for(ruin):
    kept = methods.Kept()
    kept.keep("gaussian", THETA.clone())
    kept.keep("other", THETA.clone())
    assert "gaussian" in kept and "vae" not in kept
    ruin(kept.get("gaussian"))
    with pytest.raises(ValueError, match="^the vectors of 'gaussian' were changed in place: expected .* copy"):
        kept.get("gaussian")
    with pytest.raises(ValueError, match="changed in place by the fit of method 'own': expected"):
        kept.get("gaussian", by="the fit of method 'own'")
    assert torch.equal(kept.get("other"), THETA)
