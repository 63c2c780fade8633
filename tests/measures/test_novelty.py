"""novelty.py: distances equal a search through all orders of hidden units, and the measures on them equal plain loops."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import nn

from pdiff_lib import networks
from pdiff_lib.measures import novelty
from pdiff_lib.networks import subset, symmetry


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def groups_of(*sizes):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    net.input_shape = (sizes[0],)
    return symmetry.groups(net, subset.select(net, "all"))


def shuffled(theta, groups, seed=0):
    return symmetry.permute(theta, groups, symmetry.random(groups, len(theta), seeded(seed)))


@pytest.fixture(scope="module")
def digits():
    """160 MLPs 64-10-10 trained on the first 900 digits: vectors, accuracies on the others, groups."""
    x, y = load_digits(return_X_y=True)
    x, y, k, g = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), 160, seeded()
    net = [(2 * torch.rand(k, *shape, generator=g) - 1) / 8 for shape in ((10, 64), (1, 10), (10, 10), (1, 10))]

    def outputs(images):
        return (images @ net[0].mT + net[1]).relu() @ net[2].mT + net[3]

    optimizer = torch.optim.Adam([p.requires_grad_() for p in net], 1e-2)
    for _ in range(80):
        batch = torch.randint(900, (k, 64), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs(x[batch]).flatten(0, 1), y[batch].flatten(), reduction="sum").backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (outputs(x[900:]).argmax(dim=2) == y[900:]).float().mean(dim=1)
    assert accuracy.mean() > 0.75
    return torch.cat([p.detach().flatten(1) for p in net], dim=1), accuracy, groups_of(64, 10, 10)


def all_orders(theta, groups):
    """Every version of one network [versions D]."""
    return torch.cat([symmetry.permute(theta[None], groups, [torch.tensor([p]) for p in orders])
                      for orders in itertools.product(*(itertools.permutations(range(len(g))) for g in groups))])


def search(theta, originals, groups):
    """Distances [M K] of the nearest among all versions, in float64."""
    versions = [all_orders(t, groups).double() for t in theta]
    return torch.stack([torch.stack([(v - o.double()).norm(dim=1).min() for o in originals]) for v in versions])


def hungarian(theta, originals, group):
    """Distances [M K] of one group, an assignment for each pair in turn."""
    rest = np.setdiff1d(np.arange(theta.shape[1]), group.flatten().numpy())
    table = np.empty((len(theta), len(originals)))
    for (i, a), (j, b) in itertools.product(enumerate(theta.double().numpy()), enumerate(originals.double().numpy())):
        cost = ((a[group][:, None] - b[group][None]) ** 2).sum(axis=2)
        table[i, j] = np.sqrt(cost[linear_sum_assignment(cost)].sum() + ((a[rest] - b[rest]) ** 2).sum())
    return table


# ---------------------------------------------------------------- distances

@pytest.mark.parametrize("block", [1, 300, 2**22])
def test_one_group_equals_a_search_through_all_orders_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(novelty, "BLOCK", block)
    groups, theta, originals = groups_of(3, 4, 2), random(5, 26), random(40, 26, seed=1)
    table = search(theta, originals, groups)
    distance, nearest = novelty.matched_distances(theta, originals, groups)
    torch.testing.assert_close(distance, table.amin(1).float())
    assert torch.equal(nearest, table.argmin(1))
    found = novelty.matched(theta, originals[:5], groups)
    torch.testing.assert_close((found - originals[:5]).norm(dim=1), table.diagonal().float())


def test_trained_networks_equal_the_double_loop(digits):
    theta, _, groups = digits
    table = hungarian(theta, theta, groups[0])
    distance, nearest = novelty.matched_distances(theta[:20], theta[20:], groups)
    np.testing.assert_allclose(distance.numpy(), table[:20, 20:].min(1), rtol=1e-6)
    assert nearest.tolist() == table[:20, 20:].argmin(1).tolist()
    np.fill_diagonal(table, np.inf)
    distance, nearest = novelty.matched_distances(theta, theta, groups, exclude_self=True)
    np.testing.assert_allclose(distance.numpy(), table.min(1), rtol=1e-6)
    assert nearest.tolist() == table.argmin(1).tolist()
    assert novelty.leave_one_out(theta, groups) == pytest.approx(np.median(table.min(1)), rel=1e-6)
    some = torch.randperm(160, generator=seeded(3))[:30]
    assert novelty.leave_one_out(theta, groups, 30, seeded(3)) == pytest.approx(np.median(table.min(1)[some]), rel=1e-6)
    assert novelty.leave_one_out(theta, groups, 30) == novelty.leave_one_out(theta, groups, 30)


def test_matching_is_solved_for_few_pairs_only(digits, monkeypatch):
    theta, _, groups = digits
    solved, plain = [], novelty.matched
    monkeypatch.setattr(novelty, "matched", lambda a, b, g: solved.append(len(a)) or plain(a, b, g))
    novelty.matched_distances(theta[:20], theta[20:], groups)
    assert sum(solved) <= 20 * 2 * novelty.CANDIDATES  # of 20 x 140 pairs


@pytest.mark.parametrize("sizes", [(64, 10, 10), (8, 6, 6, 3), (8, 5, 6, 4, 3)])
def test_copies_in_another_order_are_at_distance_zero(sizes, digits):
    groups = groups_of(*sizes)
    originals = digits[0] if sizes == (64, 10, 10) else random(30, sum(a * b + b for a, b in itertools.pairwise(sizes)))
    copies = shuffled(originals[[7, 3, 20]], groups, 5)
    distance, nearest = novelty.matched_distances(copies, originals, groups)
    assert distance.tolist() == [0, 0, 0] and nearest.tolist() == [7, 3, 20]
    assert (novelty.matched_distances(copies, originals)[0] > 1).all()
    assert torch.equal(novelty.matched(copies, originals[[7, 3, 20]], groups), originals[[7, 3, 20]])


@pytest.mark.parametrize("seed", range(4))
def test_of_several_groups_the_bound_is_below_and_the_distance_above_all_orders(seed):
    groups, theta, originals = groups_of(3, 3, 4, 2), random(4, 38, seed=seed), random(25, 38, seed=10 + seed)
    table = search(theta, originals, groups)
    (rows, columns, bound), = novelty._bounds(theta, originals, groups, None)
    assert bound.shape == table.shape and (bound <= table**2 + 1e-9).all() and (bound > 0.3 * table**2).all()
    distance, nearest = novelty.matched_distances(theta, originals, groups)
    assert (distance >= table.amin(1) - 1e-5).all() and (distance >= table.gather(1, nearest[:, None])[:, 0] - 1e-5).all()
    assert (distance <= 1.1 * table.amin(1)).all()  # a local optimum, which is near
    others = originals[:4]
    moved = novelty.matched(theta, others, groups)
    assert ((moved - others).norm(dim=1) < (theta - others).norm(dim=1)).all()
    for a, b, start in zip(moved, others, theta):
        assert any(torch.equal(a, version) for version in all_orders(start, groups))
        assert (a - b).norm() <= (symmetry.align(start[None], b, groups)[0] - b).norm() + 1e-5
        for g in groups:  # no group alone can come nearer
            torch.testing.assert_close(search(a[None], b[None], (g,))[0, 0].float(), (a - b).norm())


@pytest.mark.parametrize("name, side", [("vit-mini", 64), ("resnet-mini", 64), ("convnext-mini", 64), ("hyperrep-cnn", 32)])
def test_copies_of_other_networks_are_found_and_their_bound_is_none(name, side, monkeypatch):
    """Heads of attention have groups within them, residual layers share one order."""
    net = networks.create(name, 10, 3)
    sub = subset.select(net, "all")
    groups = symmetry.groups(net, sub)
    originals = random(6, sub.numel)
    copies = shuffled(originals, groups, 3)
    monkeypatch.setattr(novelty, "BLOCK", 2**25)
    (_, _, bound), = novelty._bounds(copies, originals, groups, None)
    assert (bound.diagonal() < 1e-6).all() and (bound + 1e5 * torch.eye(6)).amin() > 100
    distance, nearest = novelty.matched_distances(copies, originals, groups)
    assert distance.tolist() == [0] * 6 and nearest.tolist() == list(range(6))


def test_several_groups_find_the_same_in_small_blocks(monkeypatch):
    groups = groups_of(8, 6, 6, 3)
    originals = random(60, sum(g.numel() for g in groups) - 36 + 3)
    theta = shuffled(originals[:9], groups) + 0.05 * random(9, originals.shape[1], seed=1)
    whole = novelty.matched_distances(theta, originals, groups)
    monkeypatch.setattr(novelty, "BLOCK", 40 * 36)  # two blocks of originals, one network at a time
    parts = novelty.matched_distances(theta, originals, groups)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1]) and whole[1].tolist() == list(range(9))


@pytest.mark.parametrize("exclude_self", [False, True])
def test_without_groups_distances_are_as_given_far_from_zero(exclude_self):
    originals = random(9, 30) * 1e-3 + 10
    theta = originals if exclude_self else random(4, 30, seed=1) * 1e-3 + 10
    table = np.sqrt(((theta.double().numpy()[:, None] - originals.double().numpy()) ** 2).sum(axis=2))
    if exclude_self:
        np.fill_diagonal(table, np.inf)
    distance, nearest = novelty.matched_distances(theta, originals, exclude_self=exclude_self)
    np.testing.assert_allclose(distance.numpy(), table.min(1), rtol=1e-6)
    assert nearest.tolist() == table.argmin(1).tolist()


def test_wrong_input_is_refused(unchecked):
    groups, theta, ok = groups_of(3, 4, 2), random(5, 26), torch.rand(5)
    for call, message in [
            (lambda: novelty.matched_distances(theta / 0, theta), "in 5 of 5 vectors"),
            (lambda: novelty.matched_distances(theta, theta * torch.nan), "in 5 of 5 vectors"),
            (lambda: novelty.matched_distances(theta[:, 1:], theta), r"shape \[5, 25\]: expected \[vectors, 26\]"),
            (lambda: novelty.matched_distances(theta[:, 3:], theta[:, 3:], groups), "at least 24 numbers: expected 23"),
            (lambda: novelty.matched_distances(theta[:2], theta, exclude_self=True), "2 networks and 5 originals"),
            (lambda: novelty.matched(theta, theta[:2], groups), "5 networks and 2 others"),
            (lambda: novelty.leave_one_out(theta[:1]), "1 vectors: expected at least 2"),
            (lambda: novelty.leave_one_out(theta, at_most=0), "at_most is 0"),
            (lambda: novelty.leave_one_out(shuffled(theta[[0, 0, 0]], groups), groups), "among 3 originals is 0"),
            (lambda: novelty.spread(theta[:1], theta), "1 vectors: expected at least 2"),
            (lambda: novelty.novel_and_performant(ok, ok, 0.5, 1.0, better="more"), "better is 'more'"),
            (lambda: novelty.above_frontier(ok, ok, []), "0 baselines with finite scores"),
            (lambda: novelty.above_frontier(ok, ok, [(ok, ok / 0)]), "0 baselines with finite scores"),
            (lambda: novelty.above_frontier(ok, ok[1:], [(ok, ok)]), r"\[\(4, 5\), \(5, 5\)\]"),
            (lambda: novelty.above_frontier(ok, ok, [(ok, ok)], bootstrap=0), "0 draws"),
            (lambda: novelty.Reference.of(theta, theta, ok[1:]), "of 5 originals: expected a finite one each"),
            (lambda: novelty.Reference.of(theta, theta, ok * torch.nan), "of 5 originals: expected a finite one each"),
            (lambda: novelty.Reference.of(theta, theta, ok, better="best"), "better is 'best'"),
            (lambda: novelty.Reference.of(theta, theta + 1, ok).measure(theta, ok[1:]), "4 scores and 5 distances of 5")]:
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- measures on distances

@pytest.mark.parametrize("better", ["higher", "lower"])
def test_novel_and_performant_counts_networks_that_are_both(better):
    score, distance = random(200), random(200, seed=1).abs()
    score[:3], score[3] = torch.tensor([torch.nan, torch.inf, -torch.inf]), 0.25  # the last is at the bar itself
    found = novelty.novel_and_performant(score, distance, 0.25, 0.8, better=better)
    for c in (0.5, 0.75, 1, 2):
        good = [i for i, s in enumerate(score.tolist()) if math.isfinite(s) and (s >= 0.25 if better == "higher" else s <= 0.25)]
        assert found[c] == pytest.approx(sum(float(distance[i]) >= c * 0.8 for i in good) / 200)
    assert found.keys() == {0.5, 0.75, 1, 2}


@pytest.mark.parametrize("m, n, shift, digits_kept", [(30, 20, 0.0, 9), (7, 90, -1.0, 9), (40, 40, 0.5, 1), (25, 60, -0.3, 0)])
def test_data_copying_equals_a_double_loop_and_scipy(m, n, shift, digits_kept):
    generated, held_out = (random(m, seed=m) + shift).round(decimals=digits_kept), random(n, seed=n).round(decimals=digits_kept)
    u = sum((g > h) + 0.5 * (g == h) for g in generated.tolist() for h in held_out.tolist())
    ties = np.unique(torch.cat([generated, held_out]).numpy(), return_counts=True)[1]
    sigma = math.sqrt(m * n / 12 * (m + n + 1 - (ties**3 - ties).sum() / ((m + n) * (m + n - 1))))
    z = novelty.data_copying(generated, held_out)
    assert z == pytest.approx((u - m * n / 2) / sigma, rel=1e-9, abs=1e-9)
    theirs = scipy.stats.mannwhitneyu(generated, held_out, use_continuity=False, method="asymptotic")
    assert theirs.statistic == u and theirs.pvalue == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-6)


def test_data_copying_of_copies_and_of_nothing_to_tell():
    assert novelty.data_copying(torch.zeros(50), torch.rand(60, generator=seeded()) + 1) < -8
    assert novelty.data_copying(torch.ones(5), torch.ones(4)) == 0
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            novelty.data_copying(torch.tensor([1.0, bad]), torch.ones(4))


def test_spread_equals_numpy():
    theta, originals = random(40, 6) * 0.5 + 3, random(70, 6, seed=1) * torch.arange(1.0, 7)
    want = math.sqrt(theta.double().numpy().var(axis=0, ddof=1).mean() / originals.double().numpy().var(axis=0, ddof=1).mean())
    assert novelty.spread(theta, originals) == pytest.approx(want, rel=1e-9)
    assert novelty.spread(originals * 0.25 + 7, originals) == pytest.approx(0.25, rel=1e-6)


# ---------------------------------------------------------------- the frontier

def best_at(x, points):
    """The best score at distance x or more, over mixtures of two points on a fine grid of shares."""
    shares = np.linspace(0, 1, 20_001)
    reached = [-np.inf]
    for (d, s), (e, t) in itertools.product(points, points):
        reached.extend([np.max((s + shares * (t - s))[d + shares * (e - d) >= x - 1e-12], initial=-np.inf)])
    return max(reached)


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_the_best_mixture_at_least_as_far(seed, better):
    sign = 1 if better == "higher" else -1
    baselines = [(random(n, seed=seed + n).abs() * n / 10, random(n, seed=seed + n + 50)) for n in (3, 7, 12, 20)]
    points = [(float(d.double().mean()), sign * float(s.double().mean())) for d, s in baselines]
    for x in np.linspace(0.05, 0.99, 7) * max(d for d, _ in points):
        score = random(5, seed=seed)
        found = novelty.above_frontier(score, torch.full((5,), float(x)), baselines, 20, better=better).value
        assert found == pytest.approx(sign * float(score.mean()) - best_at(float(torch.tensor(x).float()), points), abs=1e-3)


def test_beyond_all_baselines_there_is_nothing_to_compare_with():
    near = (torch.tensor([0.4, 0.6]), torch.tensor([0.9, 0.7]))
    alone = novelty.above_frontier(torch.tensor([0.8]), torch.tensor([0.61]), [near])
    assert all(math.isnan(v) for v in alone)
    assert novelty.above_frontier(torch.tensor([0.8]), torch.tensor([0.2]), [near], 500).value == pytest.approx(0, abs=1e-6)
    sick = (torch.tensor([5.0, 5.0]), torch.tensor([0.99, torch.nan]))  # a baseline that is far, with a network that has no score
    assert math.isnan(novelty.above_frontier(torch.tensor([0.8]), torch.tensor([0.61]), [near, sick]).value)
    ill = novelty.above_frontier(torch.tensor([0.8, torch.nan]), torch.tensor([0.2, 0.2]), [near])
    assert all(math.isnan(v) for v in ill)


def test_the_interval_is_that_of_a_plain_bootstrap():
    score, distance = 0.8 + 0.05 * random(60), 1 + 0.1 * random(60, seed=1)
    baselines = [(d + 0.1 * random(80, seed=s), m + 0.05 * random(80, seed=s + 9)) for s, (d, m) in enumerate([(0.7, 0.85), (1.4, 0.6)])]
    found = novelty.above_frontier(score, distance, baselines, 4000, seeded(1))
    rng, draws = np.random.default_rng(0), []
    for _ in range(4000):
        x, y = _together(rng, distance, score)
        (a, p), (b, q) = (_together(rng, *baseline) for baseline in baselines)
        draws.append(y - (p + (x - a) / (b - a) * (q - p)))
    np.testing.assert_allclose(found[1:], np.quantile(draws, [0.025, 0.975]), atol=1.5e-3)
    assert found.low < found.value < found.high and found == novelty.above_frontier(score, distance, baselines, 4000, seeded(1))


def _together(rng, distance, score):
    drawn = rng.integers(len(score), size=len(score))
    return distance.numpy()[drawn].mean(), score.numpy()[drawn].mean()


# ---------------------------------------------------------------- all of it

def test_the_yardstick_tells_copies_noise_and_new_networks_apart(digits):
    theta, accuracy, groups = digits
    originals, held_out, new = theta[:80], theta[80:120], theta[120:]  # new: as the originals' own training makes more of them
    reference = novelty.Reference.of(originals, held_out, accuracy[:80], groups)
    table = hungarian(originals, originals, groups[0]) + np.diag(np.full(80, np.inf))
    assert reference.unit == pytest.approx(np.median(table.min(1)), rel=1e-6)
    assert reference.bar == pytest.approx(np.quantile(accuracy[:80].double().numpy(), 0.1), rel=1e-6)
    copies = reference.measure(shuffled(originals, groups), accuracy[:80])
    fresh = reference.measure(new, accuracy[120:])
    scores = torch.where(torch.arange(80) < 8, torch.nan, 0.1)
    noise = reference.measure(originals + 3 * random(80, 760), scores)
    assert copies["distance"] == copies["distance_mean"] == copies["np_0.5"] == 0 and copies["z_u"] < -7
    assert fresh["np_0.5"] == pytest.approx(float((accuracy[120:] >= reference.bar).double().mean())) and fresh["np_0.5"] > 0.7
    assert abs(fresh["z_u"]) < 3 and fresh["distance"] == pytest.approx(1, abs=0.1) and fresh["spread"] == pytest.approx(1, abs=0.1)
    assert noise["np_0.5"] == noise["np_2"] == 0 and noise["distance"] > 2 and noise["z_u"] > 7 and noise["spread"] > 2
    assert noise["not_finite"] == pytest.approx(0.1) and noise["score"] == pytest.approx(0.1) and noise["score_std"] == pytest.approx(0)
    distance = hungarian(new, originals, groups[0]).min(1) / reference.unit
    assert fresh["distance"] == pytest.approx(np.median(distance), rel=1e-5)
    assert fresh["distance_mean"] == pytest.approx(distance.mean(), rel=1e-5)
    known, _ = novelty.matched_distances(new, originals, groups)
    assert reference.measure(new, accuracy[120:], known) == fresh
    loss = novelty.Reference.of(originals, held_out, -accuracy[:80], groups, better="lower").measure(new, -accuracy[120:])
    assert [loss[f"np_{c}"] for c in ("0.5", "0.75", "1", "2")] == [fresh[f"np_{c}"] for c in ("0.5", "0.75", "1", "2")]
