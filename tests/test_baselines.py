"""baselines.py: each against what it says it is, computed by NumPy."""

import math

import numpy as np
import pytest
import torch

from pdiff_lib.baselines import Gaussian, Interpolation, Noise, WeightAverage

METHODS = [Noise(0.1, (4, 5)), WeightAverage(), Interpolation(), Gaussian()]
NAMES = [type(m).__name__ for m in METHODS]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zoo(k=6, d=9):
    return torch.randn(k, d, generator=seeded(7)) * torch.linspace(0.1, 3, d) + torch.arange(d)


@pytest.mark.parametrize("sizes", [None, (9,), (4, 5), (2, 3, 4)])
def test_noise_is_in_units_of_each_tensors_own_spread(sizes):
    theta, scale, n = zoo(), 0.01, 6000
    samples = Noise(scale, sizes).fit(theta).sample(n, seeded()).numpy().astype(np.float64)
    originals = theta.numpy().astype(np.float64)
    parent = ((samples[:, None] - originals) ** 2).sum(2).argmin(1)
    assert np.abs(np.bincount(parent, minlength=6) / n - 1 / 6).max() < 4 * math.sqrt(5 / 36 / n)
    at = 0
    for size in sizes or (9,):
        part = slice(at, at + size)
        units = (samples[:, part] - originals[parent, part]) / originals[parent, part].std(axis=1, keepdims=True)
        assert abs(units.mean()) < 4 * scale / math.sqrt(n * size)
        assert units.std() == pytest.approx(scale, rel=4 / math.sqrt(2 * n * size))
        by_parent = [units[parent == i].std() for i in range(6)]
        assert by_parent == pytest.approx([scale] * 6, rel=5 / math.sqrt(2 * n / 7 * size))
        at += size


def test_noise_of_scale_zero_copies():
    samples = Noise(0.0).fit(zoo()).sample(30, seeded())
    assert {tuple(v) for v in samples.tolist()} == {tuple(v) for v in zoo().tolist()}


def test_weight_average_is_the_mean():
    samples = WeightAverage().fit(zoo()).sample(3)
    np.testing.assert_allclose(samples.numpy(), np.tile(zoo().numpy().astype(np.float64).mean(0), (3, 1)), rtol=1e-5)
    samples[0] = 0  # a sample may be changed without changing another
    assert samples[1].abs().sum() > 0


def test_interpolations_lie_on_the_lines_between_two_originals():
    theta, n = zoo(), 3000
    samples, originals = Interpolation().fit(theta).sample(n, seeded()).double(), theta.double()
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))
    step = originals[b] - originals[a]
    weight = ((samples[:, None] - originals[a]) * step).sum(2) / step.square().sum(1).clamp(min=1e-30)
    distance = (samples[:, None] - originals[a] - weight.clamp(0, 1)[..., None] * step).norm(dim=2)
    assert float(distance.amin(1).max()) < 1e-4
    pair = distance.argmin(1)
    assert (a[pair] != b[pair]).all()  # two different ends
    between = weight[torch.arange(n), pair]
    assert float(between.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(between.std()) == pytest.approx(1 / math.sqrt(12), rel=0.05)
    ends = torch.stack([a, b], 1)[pair].sort(1).values
    assert len(ends.unique(dim=0)) == 15  # all pairs of six


def test_gaussian_has_the_originals_mean_and_covariance():
    theta, n = zoo(k=5), 40_000
    samples = Gaussian().fit(theta).sample(n, seeded()).numpy().astype(np.float64)
    want = np.cov(theta.numpy().astype(np.float64), rowvar=False)
    spread = np.sqrt(np.diag(want))
    assert (np.abs(samples.mean(0) - theta.numpy().mean(0)) < 4.5 * spread / math.sqrt(n)).all()
    # Standard error of a covariance: sqrt((s_ii s_jj + s_ij^2) / n).
    error = np.sqrt((np.outer(spread, spread) ** 2 + want**2) / n)
    assert (np.abs(np.cov(samples, rowvar=False) - want) < 4.5 * error).all()


def test_gaussian_stays_in_the_span():
    theta = zoo(k=5)
    samples = Gaussian().fit(theta).sample(20, seeded())
    directions = (theta - theta.mean(0)).numpy().astype(np.float64)
    deviation = (samples - theta.mean(0)).numpy().astype(np.float64)
    rest = deviation - np.linalg.lstsq(directions.T, deviation.T, rcond=None)[0].T @ directions
    assert np.abs(rest).max() < 1e-4 and np.linalg.matrix_rank(deviation, tol=1e-3) == 4


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_samples_are_decided_by_the_generator(method):
    state, fitted = torch.get_rng_state(), method.fit(zoo())
    a, b, c = (fitted.sample(8, seeded(s)) for s in (1, 1, 2))
    assert fitted is method and a.shape == (8, 9) and a.dtype == torch.float32 and torch.equal(a, b)
    assert torch.equal(a, c) == isinstance(method, WeightAverage)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("theta, message", [
    (torch.zeros(1, 9), "theta holds 1 vectors: expected at least 2"), (torch.zeros(9), r"shape \[9\]: expected"),
    (torch.full((3, 9), math.nan), "NaN or infinity in 3 of 3")], ids=["one", "1-d", "nan"])
def test_what_is_no_zoo_is_refused(unchecked, method, theta, message):
    with pytest.raises(ValueError, match=message):
        method.fit(theta)
