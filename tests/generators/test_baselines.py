"""baselines.py: each against what it says it is, computed by NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde, kstest

from pdiff_lib.generators.baselines import (
    SWAG,
    Copy,
    Fixed,
    Gaussian,
    Interpolation,
    LatentKDE,
    Noise,
    SubsetAverage,
    TensorMeans,
    WeightAverage,
    gaussian,
)

METHODS = [Noise(0.1, (4, 5)), WeightAverage(), Interpolation(), Gaussian(), SubsetAverage(2), SWAG(), Copy(), Interpolation(0.3)]
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


@pytest.mark.parametrize("part", ["one", "alike"])
def test_noise_on_a_tensor_without_a_spread_is_in_units_of_that_over_the_checkpoints(part):
    """A single number, and a tensor whose numbers are all alike, would get none at all."""
    k, size = 40, 1 if part == "one" else 6
    level = 0.25 + 0.002 * torch.randn(k, 1, generator=seeded(3))
    apart = torch.randn(k, 5, generator=seeded(4)) + 100 * torch.arange(k)[:, None]  # tells whose copy a sample is
    theta = torch.cat([apart, level.expand(-1, size)], dim=1)
    samples = Noise(0.5, (5, size)).fit(theta).sample(8000, seeded())
    parent = torch.cdist(samples[:, :5].double(), theta[:, :5].double()).argmin(1)
    noise = (samples - theta[parent])[:, 5:].double()
    assert noise.std().item() == pytest.approx(0.5 * level.double().std(correction=0).item(), rel=0.05)
    constant = torch.cat([theta[:, :5], torch.full((k, size), 0.25)], dim=1)  # no spread anywhere: nothing to add
    assert (Noise(0.5, (5, size)).fit(constant).sample(50, seeded())[:, 5:] == 0.25).all()


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


ALL = [*METHODS, TensorMeans((4, 5)), Fixed(torch.arange(9.0))]


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("change", [
    torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.half, lambda t: t.requires_grad_(), torch.Tensor.numpy,
    lambda t: t.numpy().astype(">f8"), lambda t: t.T.contiguous().T], ids=["f64", "bf16", "f16", "grad", "numpy", ">f8", "T"])
def test_all_floats_are_taken_and_nothing_is_shared(method, change):
    """What comes in is float32 of the same numbers, and later changes to it, or to a sample, change no later sample."""
    theta = change(zoo().bfloat16().half().float())  # numbers that all of these types hold
    same = theta.detach().float() if isinstance(theta, torch.Tensor) else torch.tensor(theta.astype(np.float32))
    first = method.fit(theta).sample(12, seeded())
    assert first.dtype == torch.float32 and not first.requires_grad
    assert torch.equal(method.fit(same.clone()).sample(12, seeded()), first)
    method.fit(theta).sample(12, seeded()).zero_()
    with torch.no_grad():
        theta -= 1 if isinstance(theta, np.ndarray) else theta.mean(0)
    assert torch.equal(method.sample(12, seeded()), first)


def test_a_fixed_vector_is_a_copy(unchecked):
    vector = torch.arange(9.0)
    fixed = Fixed(vector)
    vector.zero_()
    assert fixed.fit(zoo()).sample(1)[0].tolist() == list(range(9))
    for other in (torch.arange(9), torch.full((9,), math.nan), torch.zeros(1, 9)):
        with pytest.raises(ValueError, match="^theta h"):
            Fixed(other)


def test_a_gaussian_of_one_vector_is_refused():
    with pytest.raises(ValueError, match="theta holds 1 vectors: expected at least 2"):
        gaussian(zoo(k=1), 3)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("theta, message", [
    (torch.zeros(1, 9), "theta holds 1 vectors: expected at least 2"), (torch.zeros(9), r"shape \[9\]: expected"),
    (torch.full((3, 9), math.nan), "NaN or infinity in 3 of 3")], ids=["one", "1-d", "nan"])
def test_what_is_no_zoo_is_refused(unchecked, method, theta, message):
    with pytest.raises(ValueError, match=message):
        method.fit(theta)


def test_tensor_means_keep_the_level_of_each_tensor_and_nothing_else():
    theta = zoo(d=9) + torch.arange(9.0)
    (a, b) = TensorMeans((4, 5)).fit(theta).sample(2)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, torch.cat([theta[:, :4].mean().expand(4), theta[:, 4:].mean().expand(5)]))


def test_a_fixed_vector_stays_and_must_fit():
    vector = torch.arange(9.0)
    assert torch.equal(Fixed(vector).fit(zoo(d=9)).sample(3), vector.expand(3, 9))
    with pytest.raises(ValueError, match=r"shape \[6, 8\]: expected \[vectors, 9\]"):
        Fixed(vector).fit(zoo(d=8))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_scaled_gaussian_keeps_the_mean_and_scales_the_covariance(scale):
    theta, n = zoo(k=5), 40_000
    samples = Gaussian(scale).fit(theta).sample(n, seeded()).numpy().astype(np.float64)
    want = scale**2 * np.cov(theta.numpy().astype(np.float64), rowvar=False)
    spread = np.sqrt(np.diag(want))
    assert (np.abs(samples.mean(0) - theta.numpy().mean(0)) < 4.5 * spread / math.sqrt(n)).all()
    error = np.sqrt((np.outer(spread, spread) ** 2 + want**2) / n)
    assert (np.abs(np.cov(samples, rowvar=False) - want) < 4.5 * error).all()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_subset_averages_are_means_of_as_many_different_originals(size):
    theta, n = zoo(), 400
    samples = SubsetAverage(size).fit(theta).sample(n, seeded()).numpy()
    subsets = [np.array(s) for s in itertools.combinations(range(6), size)]
    means = np.stack([theta.numpy().astype(np.float64)[s].mean(0) for s in subsets])
    distance = np.abs(samples[:, None] - means).max(2)
    assert (distance.min(1) < 1e-5).all()
    drawn = np.bincount(distance.argmin(1), minlength=len(subsets)) / n  # every subset, about as often
    assert np.abs(drawn - 1 / len(subsets)).max() <= 4.5 * math.sqrt((1 - 1 / len(subsets)) / len(subsets) / n)


def test_subset_averages_need_as_many_originals():
    with pytest.raises(ValueError, match="size is 0: expected at least 1"):
        SubsetAverage(0)
    with pytest.raises(ValueError, match="theta holds 6 vectors: expected at least 7"):
        SubsetAverage(7).fit(zoo())


@pytest.mark.parametrize("k, rank", [(8, 3), (8, 8), (5, 20), (4, 2)])
def test_swag_has_the_covariance_of_its_definition(k, rank):
    """Maddox et al. 2019, Algorithm 1: the moments and deviations kept as checkpoints come, then half of each covariance."""
    theta, n = zoo(k, 4), 60_000
    samples = SWAG(rank).fit(theta).sample(n, seeded()).numpy().astype(np.float64)
    mean, square, deviations = np.zeros(4), np.zeros(4), []
    for i, v in enumerate(theta.numpy().astype(np.float64)):
        mean, square = (i * mean + v) / (i + 1), (i * square + v**2) / (i + 1)
        deviations = [*deviations, v - mean][-rank:]
    kept = np.stack(deviations, axis=1)
    want = 0.5 * np.diag(square - mean**2) + 0.5 * kept @ kept.T / (kept.shape[1] - 1)
    spread = np.sqrt(np.diag(want))
    assert (np.abs(samples.mean(0) - mean) < 4.5 * spread / math.sqrt(n)).all()
    error = np.sqrt((np.outer(spread, spread) ** 2 + want**2) / n)
    assert (np.abs(np.cov(samples, rowvar=False) - want) < 4.5 * error).all()


def test_swag_needs_two_deviations():
    with pytest.raises(ValueError, match="rank is 1: expected at least 2"):
        SWAG(1)


class Doubling:
    """A latent that can be checked: the first four numbers, doubled."""

    def encode(self, theta):
        return 2 * theta[:, :4]

    def decode(self, z):
        return torch.cat([z / 2, torch.zeros(len(z), 5)], dim=1)


def test_kde_of_the_best_is_scipys_in_each_dimension_by_itself():
    theta, accuracy, n = zoo(k=20), torch.rand(20, generator=seeded(5)), 5000
    method = LatentKDE(Doubling(), accuracy, share=0.3).fit(theta)
    samples = method.sample(n, seeded()).numpy().astype(np.float64)
    best = np.argsort(-accuracy.numpy())[:6]
    latents = 2 * theta.numpy().astype(np.float64)[best, :4]
    assert samples.shape == (n, 9) and (samples[:, 4:] == 0).all()
    for i in range(4):
        kde = gaussian_kde(latents[:, i])  # Scott's rule
        assert method.bandwidth[i].item() == pytest.approx(math.sqrt(kde.covariance.item()), rel=1e-5)
        cdf = np.vectorize(lambda x, kde=kde: kde.integrate_box_1d(-np.inf, x))
        assert kstest(2 * samples[:500, i], cdf).pvalue > 1e-3
    away = np.corrcoef(samples[:, :4], rowvar=False) - np.eye(4)
    assert np.abs(away).max() < 4.5 / math.sqrt(n)  # whatever the latents' correlations are
    assert np.abs(np.corrcoef(latents, rowvar=False) - np.eye(4)).max() > 0.2
    a, b, c = (method.sample(8, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("share, kept", [(0.3, 6), (1.0, 20), (0.01, 2)])
def test_kde_keeps_the_most_accurate(share, kept):
    accuracy = torch.linspace(1, 0, 20)
    assert torch.equal(LatentKDE(Doubling(), accuracy, share).fit(zoo(k=20)).z, 2 * zoo(k=20)[:kept, :4])


def test_kde_refuses_what_does_not_fit():
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"share is {share}"):
            LatentKDE(Doubling(), torch.zeros(3), share)
    with pytest.raises(ValueError, match="2 of 3 accuracies are NaN or infinite"):  # they would be sorted before the best
        LatentKDE(Doubling(), torch.tensor([math.nan, 0.5, math.inf]))
    with pytest.raises(ValueError, match="3 accuracies for 6 vectors"):
        LatentKDE(Doubling(), torch.zeros(3)).fit(zoo())


class Odd(Doubling):
    """An autoencoder that is not ours: works in place, in NumPy's float64, and hands out what it keeps."""

    def encode(self, theta):
        theta -= 1
        self.latents = 2 * theta[:, :4].double().numpy()
        return self.latents

    def decode(self, z):
        return np.concatenate([z.numpy() / 2 + 1, np.zeros((len(z), 5))], axis=1)


def test_kde_shares_nothing_with_the_autoencoder_nor_with_those_who_measured():
    theta, accuracy = zoo(k=20), torch.rand(20, generator=seeded(5))
    plain = LatentKDE(Doubling(), accuracy.clone()).fit(theta.clone()).sample(50, seeded())
    before, odd = theta.clone(), Odd()
    method = LatentKDE(odd, accuracy)
    accuracy.zero_()
    samples = method.fit(theta).sample(50, seeded())
    odd.latents[:] = 7
    assert torch.equal(theta, before) and torch.equal(samples, method.sample(50, seeded()))
    torch.testing.assert_close(samples, plain, rtol=1e-4, atol=1e-5)


def test_kde_refuses_latents_and_vectors_that_are_not_numbers():
    class Broken(Doubling):
        def decode(self, z):
            return torch.full((len(z), 9), math.nan)

    class Short(Doubling):
        def decode(self, z):
            return z

    for kind, message in ((Broken, "NaN or infinity in 5 of 5"), (Short, r"shape \[5, 4\]: expected \[vectors, 9\]")):
        with pytest.raises(ValueError, match=message):
            LatentKDE(kind(), torch.rand(20)).fit(zoo(k=20)).sample(5, seeded())


def test_a_copy_is_an_original_and_each_is_as_likely():
    theta, n = zoo(), 6000
    samples = Copy().fit(theta).sample(n, seeded())
    which = torch.cdist(samples, theta).argmin(1)
    assert torch.equal(samples, theta[which])
    assert (which.bincount(minlength=6) / n - 1 / 6).abs().max() < 4 * math.sqrt(5 / 36 / n)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.5, 1.0])
def test_interpolation_at_a_point_of_the_line(at):
    theta = zoo(3)
    want = torch.stack([torch.lerp(theta[i], theta[j], at) for i, j in itertools.permutations(range(3), 2)])
    gaps = torch.cdist(Interpolation(at).fit(theta).sample(200, seeded()).double(), want.double())
    assert gaps.amin(1).max() < 1e-4 and (at not in (0.3,) or len(gaps.argmin(1).unique()) == 6)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"at is {wrong}: expected from 0 to 1"):
            Interpolation(wrong)


def test_swag_scales_its_deviations():
    theta = zoo()
    once, half = (SWAG(scale=s).fit(theta).sample(5, seeded()) - theta.mean(0) for s in (1.0, 0.5))
    torch.testing.assert_close(half, once / 2, rtol=1e-4, atol=1e-5)
