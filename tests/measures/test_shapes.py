"""shapes.py: distances and measures equal plain loops on digits, and give what is known of copies, collapse and sets that lie apart."""

import itertools
import math

import numpy as np
import pytest
import torch
from gpu.pretend import Pretend
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_digits

from pdiff_lib.measures import novelty, shapes

IMAGES, DIGIT = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
INSIDE = IMAGES > 8  # brightness is 0 to 16


def points(which, count=40, d=2, seed=0):
    """Of each of these digits so many points of its bright pixels, anywhere within the pixel; a third number is the brightness."""
    g = torch.Generator().manual_seed(seed)
    pixel = torch.multinomial(INSIDE[which].double(), count, replacement=True, generator=g)
    place = torch.stack([pixel % 8, pixel // 8], dim=2) + torch.rand(*pixel.shape, 2, generator=g)
    height = IMAGES[which].gather(1, pixel)[:, :, None] / 16
    return torch.cat([place, height, height.square()], dim=2)[:, :, :d].float()


def loop_chamfer(a, b):
    """Pair by pair, point by point, in float64."""
    table = np.empty((len(a), len(b)))
    for (i, x), (j, y) in itertools.product(enumerate(a.double().numpy()), enumerate(b.double().numpy())):
        there = [min(((p - q) ** 2).sum() for q in y) for p in x]
        back = [min(((p - q) ** 2).sum() for p in x) for q in y]
        table[i, j] = sum(there) / len(x) + sum(back) / len(y)
    return table


def loop_one_nearest(generated, between, reference):
    """Shape by shape: what share of those at the least distance is of its own kind."""
    (m, n), right = between.shape, []
    generated, between, reference = (t.tolist() for t in (generated, between, reference))
    for i in range(m + n):
        others = {j: (generated[i][j] if j < m else between[i][j - m]) if i < m else (between[j][i - m] if j < m else reference[i - m][j - m])
                  for j in range(m + n) if j != i}
        least = min(others.values())
        tied = [j for j, value in others.items() if value == least]
        right.append(sum((j < m) == (i < m) for j in tied) / len(tied))
    return sum(right) / len(right)


def loop_coverage(between):
    covered = {min(range(len(row)), key=lambda j: (row[j], j)) for row in between.tolist()}
    return len(covered) / between.shape[1]


# ---------------------------------------------------------------- point sets

@pytest.mark.parametrize("block", [1, 70, 2**22])
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_chamfer_equals_the_double_loop_by_trees_and_by_pairs_whatever_the_blocks(d, block, monkeypatch):
    monkeypatch.setattr(shapes, "BLOCK", block)
    a, b = points(range(4), 12, d), points(range(10, 15), 9, d, seed=1)
    table = loop_chamfer(a, b)
    found = shapes.chamfer(a, b)
    assert found.dtype == torch.float32 and found.shape == (4, 5)
    np.testing.assert_allclose(found.numpy(), table, rtol=1e-5)
    monkeypatch.setattr(shapes, "_by_tree", shapes._by_pairs)
    np.testing.assert_allclose(shapes.chamfer(a, b).numpy(), table, rtol=1e-5)


def test_chamfer_on_a_pretended_gpu_is_that_on_the_cpu():
    a, b = points(range(4)), points(range(10, 13), seed=1)
    with Pretend(devices=2) as gpu:
        found = shapes.chamfer(a.to("cuda:1"), b)
        assert found.device == torch.device("cuda:1")
        one_nn = shapes.one_nearest_neighbour(shapes.chamfer(*[a.to("cuda:1")] * 2), found, shapes.chamfer(*[b.to("cuda:1")] * 2))
        distance, index = shapes.nearest(found)
        found, distance, index = found.cpu(), distance.cpu(), index.cpu()
    assert gpu.count("launch") > 0
    plain = shapes.chamfer(a, b)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)
    assert one_nn == shapes.one_nearest_neighbour(shapes.chamfer(a, a), plain, shapes.chamfer(b, b))
    assert torch.equal(distance, found.amin(dim=1)) and torch.equal(index, plain.argmin(dim=1))


def test_chamfer_is_squared_and_adds_both_means():
    one, two = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    assert shapes.chamfer(one, one + torch.tensor([3.0, 4.0])).item() == 50  # 25 there, 25 back: neither 10 nor 25
    assert shapes.chamfer(one, two).item() == shapes.chamfer(two, one).item() == 1 + (25 + 1) / 2
    assert shapes.chamfer(10 * one, 10 * two).item() == pytest.approx(100 * 14)


def test_copies_in_any_order_are_at_zero_and_the_sets_themselves_need_one_way(monkeypatch):
    a = points(range(12)) + 100
    ways, one_way = [], shapes._one_way
    monkeypatch.setattr(shapes, "_one_way", lambda *sets: ways.append(sets) or one_way(*sets))
    own = shapes.chamfer(a, a)
    assert len(ways) == 1 and torch.equal(own, own.T) and torch.equal(own, shapes.chamfer(a, a.clone())) and len(ways) == 3
    assert own.diagonal().tolist() == [0] * 12 and (own + torch.eye(12)).min() > 0.01
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([a, a[:, order]], dim=1)  # each point once more: the same set
    assert shapes.chamfer(a, twice).diagonal().tolist() == [0] * 12
    torch.testing.assert_close(shapes.chamfer(a, twice), own)


def test_chamfer_takes_arrays_and_other_floats():
    a, b = points(range(3)), points(range(10, 14))
    plain = shapes.chamfer(a, b)
    assert torch.equal(shapes.chamfer(a.numpy(), b.double().numpy()), plain)
    assert torch.equal(shapes.chamfer(a.clone().requires_grad_(), b), plain) and not plain.requires_grad
    torch.testing.assert_close(shapes.chamfer(a.half(), b.bfloat16()), plain, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("way", ["_by_tree", "_by_pairs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_set_that_is_not_finite_has_no_distance_and_the_others_keep_theirs(bad, way, monkeypatch):
    monkeypatch.setattr(shapes, "_by_tree", getattr(shapes, way))
    a, b = points(range(4)), points(range(10, 15))
    plain = shapes.chamfer(a, b)
    a[2, 7, 1], b[0, 0, 0] = bad, bad
    found = shapes.chamfer(a, b)
    lost = torch.zeros(4, 5, dtype=torch.bool)
    lost[2], lost[:, 0] = True, True
    assert torch.equal(found.isnan(), lost) and torch.equal(found[~lost], plain[~lost])
    own = shapes.chamfer(a, a)
    assert own.isnan().sum() == 7 and torch.isnan(own[2]).all()


# ---------------------------------------------------------------- matrices of distances

@pytest.fixture(scope="module")
def drawn():
    """80 digits that stand for generated ones and 80 references, from one shuffle, so that nothing tells them apart: the sets, and
    distances among the generated, between, among the references."""
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))
    a, b = points(order[:80]), points(order[80:160], seed=1)
    return a, b, (shapes.chamfer(a, a), shapes.chamfer(a, b), shapes.chamfer(b, b))


def test_measures_of_digits_equal_the_loops(drawn):
    generated, between, reference = drawn[2]
    distance = between.double().numpy()
    assert shapes.minimum_matching_distance(between) == pytest.approx(sum(min(column) for column in distance.T) / 80, rel=1e-12)
    assert shapes.coverage(between) == loop_coverage(between)
    assert shapes.one_nearest_neighbour(generated, between, reference) == pytest.approx(loop_one_nearest(*drawn[2]), rel=1e-12)


def whole(*shape):
    """Matrices of few different distances: full of ties."""
    return hnp.arrays(np.float32, shape, elements=st.integers(0, 3).map(float))


@given(st.integers(1, 5).flatmap(lambda m: st.integers(1, 5).flatmap(lambda n: st.tuples(whole(m, m), whole(m, n), whole(n, n)))))
def test_measures_equal_the_loops_where_distances_are_tied(tables):
    generated, between, reference = (torch.from_numpy(t) for t in tables)
    given_, index = between.clone(), torch.tensor([min(range(len(row)), key=lambda j: (row[j], j)) for row in between.tolist()])
    assert shapes.coverage(between) == loop_coverage(between)
    assert shapes.one_nearest_neighbour(generated, between, reference) == pytest.approx(loop_one_nearest(*tables))
    assert torch.equal(shapes.nearest(between)[1], index) and torch.equal(between, given_)


def test_what_nothing_tells_apart_is_near_a_half_and_the_order_of_shapes_is_nothing(drawn):
    generated, between, reference = drawn[2]
    accuracy = shapes.one_nearest_neighbour(generated, between, reference)
    assert abs(accuracy - 0.5) < 3 * math.sqrt(0.25 / 160)  # three standard deviations of so many coins
    assert 0.4 < shapes.coverage(between) < 0.8  # of so many draws with replacement: 63 %
    i, j = (torch.randperm(80, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    mixed = generated[i][:, i], between[i][:, j], reference[j][:, j]
    assert shapes.one_nearest_neighbour(*mixed) == accuracy and shapes.coverage(mixed[1]) == shapes.coverage(between)
    swapped = reference, between.T, generated
    assert shapes.one_nearest_neighbour(*swapped) == pytest.approx(accuracy)


def test_copies_of_the_references_a_single_one_repeated_and_another_digit(drawn):
    reference = drawn[2][2]
    assert shapes.minimum_matching_distance(reference) == 0 and shapes.coverage(reference) == 1
    assert shapes.one_nearest_neighbour(reference, reference, reference) == 0  # each has its twin in the other set
    same = reference[:1].expand(80, -1)
    assert shapes.coverage(same) == 1 / 80 and shapes.minimum_matching_distance(same) == pytest.approx(float(reference[0].double().mean()))
    assert shapes.one_nearest_neighbour(torch.zeros(80, 80), same, reference) > 0.95  # all of the one kind, most of the other
    zeros, ones = (points((DIGIT == digit).nonzero()[:30, 0]) for digit in (0, 1))
    between = shapes.chamfer(zeros, ones)
    assert 0.9 < shapes.one_nearest_neighbour(shapes.chamfer(zeros, zeros), between, shapes.chamfer(ones, ones)) < 1  # a few look alike
    between = shapes.chamfer(zeros, ones + 20)
    assert shapes.one_nearest_neighbour(shapes.chamfer(zeros, zeros), between, shapes.chamfer(ones, ones)) == 1


def test_shapes_at_the_same_distance():
    assert shapes.coverage(torch.tensor([[2.0, 1.0, 1.0], [3.0, 3.0, 3.0]])) == 2 / 3  # the second and, of three, the first
    # Two copies of the first of two references: each of these three has one twin of either kind, the second reference has ties only.
    generated, between, reference = torch.zeros(2, 2), torch.tensor([[0.0, 4.0], [0.0, 4.0]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    assert shapes.one_nearest_neighbour(generated, between, reference) == pytest.approx((0.5 + 0.5 + 0 + 1 / 3) / 4)
    chance = (2 * 1 + 3 * 2) / (5 * 4)  # as the docstring has it
    assert shapes.one_nearest_neighbour(torch.ones(2, 2), torch.ones(2, 3), torch.ones(3, 3)) == pytest.approx(chance)


def test_diagonals_are_not_looked_at(drawn):
    generated, between, reference = drawn[2]
    nothing = [d.clone().fill_diagonal_(torch.nan) for d in (generated, reference)]
    assert shapes.one_nearest_neighbour(nothing[0], between, nothing[1]) == shapes.one_nearest_neighbour(generated, between, reference)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_nearest_equals_a_loop_and_what_is_broken_never_wins(drawn, exclude_self):
    distance = drawn[2][0].clone()
    distance[3], distance[:, 5], distance[7, 9], distance[8, 20:] = torch.nan, torch.nan, -torch.inf, torch.inf
    before = distance.clone()
    value, index = shapes.nearest(distance, exclude_self)
    for i, row in enumerate(distance.tolist()):
        known = {j: v for j, v in enumerate(row) if math.isfinite(v) and not (exclude_self and i == j)}
        if i == 3:
            assert not known and math.isnan(value[i]) and index[i] == 80
        else:
            assert value[i] == min(known.values()) and index[i] == min(known, key=known.get)
    assert torch.equal(distance.nan_to_num(-1), before.nan_to_num(-1))
    assert (value[[0, 1, 2]] > 0).all() if exclude_self else value[:3].tolist() == [0, 0, 0]


def test_copies_of_training_digits_are_told_from_new_ones():
    """`novelty.data_copying` with these distances: a copy is a training digit with other points drawn from it."""
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(3))
    training, held_out, fresh = points(order[:60], 100), points(order[60:90], 100, seed=1), points(order[90:120], 100, seed=2)
    copies = points(order[:30], 100, seed=4)
    copies[0, 0, 0] = torch.nan
    distance, index = shapes.nearest(shapes.chamfer(copies, training))
    assert index[0] == 60 and (index[1:] == torch.arange(1, 30)).double().mean() > 0.9
    apart = shapes.nearest(shapes.chamfer(held_out, training))[0]
    assert novelty.data_copying(distance[distance.isfinite()], apart) < -5
    assert abs(novelty.data_copying(shapes.nearest(shapes.chamfer(fresh, training))[0], apart)) < 3


# ---------------------------------------------------------------- fields

def test_iou_of_digits_equals_the_loop():
    a, b = INSIDE[:9].clone(), INSIDE[20:35].clone()
    a[3], b[[2, 5]] = False, False
    found = shapes.iou(a, b)
    for i, j in itertools.product(range(9), range(15)):
        mine, yours = (set(np.flatnonzero(o)) for o in (a[i], b[j]))
        assert float(found[i, j]) == pytest.approx(len(mine & yours) / len(mine | yours) if mine | yours else 1, rel=1e-6)
    assert found[3, 2] == 1 and found[3, 0] == 0 and (shapes.iou(a, a).diagonal() == 1).all()


def test_psnr_equals_the_loop():
    images = (IMAGES[:20] / 16).float()
    blurred = images.view(20, 8, 8).cumsum(2).view(20, 64) / 8
    for peak in (1.0, 16.0):
        found = shapes.psnr(peak * blurred, peak * images, peak)
        want = [10 * math.log10(1 / (sum((p - q) ** 2 for p, q in zip(x, y)) / 64)) for x, y in zip(blurred.tolist(), images.tolist())]
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-5)
    assert shapes.psnr(images + 0.1, images).tolist() == pytest.approx([20] * 20, abs=1e-4)  # a tenth of the peak
    blurred[1, 3], blurred[2, 0], blurred[3] = torch.nan, torch.inf, images[3]
    found = shapes.psnr(blurred, images)
    assert found.isnan().nonzero().flatten().tolist() == [1, 2] and found[3] == torch.inf


def test_fields_that_are_empty_full_or_broken_are_counted_before_any_is_dropped():
    brightness = (IMAGES[:50] / 16).float()
    brightness[4], brightness[[7, 8]], brightness[9, 5], brightness[10] = 0.1, 0.9, torch.nan, 0.0
    brightness[10, 63], brightness[11], brightness[12, 0] = torch.inf, torch.nan, -torch.inf
    found = shapes.outcomes(brightness, 0.5)
    for i, row in enumerate(brightness.tolist()):
        broken = not all(map(math.isfinite, row))
        inside = sum(v >= 0.5 for v in row)
        assert (bool(found.broken[i]), bool(found.empty[i]), bool(found.full[i])) == (
            broken, not broken and inside == 0, not broken and inside == 64)
        assert bool(found.whole[i]) == (not broken and 0 < inside < 64)
    assert shapes.emptiness(brightness, 0.5) == {"empty": 1 / 50, "full": 2 / 50, "broken": 4 / 50}
    logits = torch.logit(brightness.clamp(0.01, 0.99))  # NaN stays, infinity does not
    assert shapes.emptiness(logits, 0.0) == {"empty": 1 / 50, "full": 2 / 50, "broken": 2 / 50}
    assert shapes.emptiness(torch.full((3, 4), 0.5), 0.5)["full"] == 1  # the level itself is inside
    dark = torch.cat([INSIDE[:4], torch.zeros(3, 64, dtype=torch.bool), torch.ones(1, 64, dtype=torch.bool)])
    assert shapes.emptiness(dark) == {"empty": 3 / 8, "full": 1 / 8, "broken": 0}


# ---------------------------------------------------------------- errors

def test_wrong_input_is_refused(unchecked):
    ok, sets, o = torch.ones(3, 4), torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    hole = ok.clone()
    hole[1, 2], hole[2, 0] = torch.nan, torch.inf
    three, four = torch.ones(3, 3), torch.ones(4, 4)
    for call, message in [
            (lambda: shapes.chamfer(sets[:, :0], sets), r"torch.float32 \[2, 0, 3\]: expected floats \[sets, points, dimensions\]"),
            (lambda: shapes.chamfer(sets, sets[:, :, :0]), r"\[2, 5, 0\]: expected floats"),
            (lambda: shapes.chamfer(sets[:0], sets), r"\[0, 5, 3\]: expected floats"),
            (lambda: shapes.chamfer(sets[0], sets), r"\[5, 3\]: expected floats"),
            (lambda: shapes.chamfer(sets.long(), sets), r"torch.int64 \[2, 5, 3\]: expected floats"),
            (lambda: shapes.chamfer(sets, sets[:, :, 1:]), "points of 3 and 2 dimensions"),
            (lambda: shapes.minimum_matching_distance(hole), r"2 of 12 distances are NaN or infinite, first in row and column \[1, 2\]"),
            (lambda: shapes.coverage(hole), "2 of 12 distances are NaN or infinite"),
            (lambda: shapes.one_nearest_neighbour(three, hole, four), "4 of 49 distances are NaN or infinite"),
            (lambda: shapes.one_nearest_neighbour(hole[:, :3], ok, four), r"2 of 49 distances are NaN or infinite"),
            (lambda: shapes.one_nearest_neighbour(four, ok, four), r"\[4, 4\] among the generated.*expected \[3, 3\] and \[4, 4\]"),
            (lambda: shapes.one_nearest_neighbour(three, ok, three), r"\[3, 3\] among the references"),
            (lambda: shapes.one_nearest_neighbour(three, ok[:, :0], three), r"distances are torch.float32 \[3, 0\]"),
            (lambda: shapes.coverage(ok[:0]), r"distances are torch.float32 \[0, 4\]: expected floats \[shapes, shapes\]"),
            (lambda: shapes.minimum_matching_distance(ok.long()), r"distances are torch.int64 \[3, 4\]"),
            (lambda: shapes.nearest(ok[0]), r"distances are torch.float32 \[4\]"),
            (lambda: shapes.nearest(ok, exclude_self=True), r"exclude_self with distances \[3, 4\]"),
            (lambda: shapes.nearest(ok[:1, :1], exclude_self=True), r"exclude_self with distances \[1, 1\]"),
            (lambda: shapes.iou(o, ok[:2]), r"torch.float32 \[2, 4\]: expected bool \[fields, points\]"),
            (lambda: shapes.iou(o[0], o), r"torch.bool \[5\]: expected bool"),
            (lambda: shapes.iou(o[:, :0], o[:, :0]), r"torch.bool \[2, 0\]: expected bool"),
            (lambda: shapes.iou(o, o[:, 1:]), "at 5 and 4 points: expected the same points"),
            (lambda: shapes.psnr(ok, ok[:, 1:]), r"values \[3, 4\], targets \[3, 3\]"),
            (lambda: shapes.psnr(ok, ok[:1]), r"targets \[1, 4\]"),
            (lambda: shapes.psnr(ok[:, :0], ok[:, :0]), r"values \[3, 0\]"),
            (lambda: shapes.psnr(ok, ok, 0.0), "peak 0.0: expected"),
            (lambda: shapes.psnr(ok, ok, math.nan), "peak nan: expected"),
            (lambda: shapes.emptiness(ok), "level is None for occupancy of torch.float32: expected a finite one for floats"),
            (lambda: shapes.emptiness(o, 0.5), "level is 0.5 for occupancy of torch.bool"),
            (lambda: shapes.outcomes(ok, math.nan), "level is nan"),
            (lambda: shapes.emptiness(ok[:0], 0.5), r"occupancy is torch.float32 \[0, 4\]"),
            (lambda: shapes.emptiness(o[:, :0]), r"occupancy is torch.bool \[2, 0\]"),
            (lambda: shapes.emptiness(o.long()), r"occupancy is torch.int64 \[2, 5\]")]:
        with pytest.raises(ValueError, match=message):
            call()
