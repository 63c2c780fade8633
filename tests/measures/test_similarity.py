"""similarity.py: IoU equals brute force, copies score 1, distances and shares outside the span equal NumPy's."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from pdiff_lib.measures import similarity


def brute_force(a, b):
    """Eq. 7 with sets."""
    table = np.empty((len(a), len(b)))
    for i, row in enumerate(a):
        for j, other in enumerate(b):
            mine, yours = set(np.flatnonzero(row)), set(np.flatnonzero(other))
            table[i, j] = len(mine & yours) / len(mine | yours) if mine | yours else 1.0
    return table


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wrong(m, n, share=0.3, seed=0):
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < share


@st.composite
def pairs(draw):
    images = draw(st.integers(1, 20))
    a, b = (draw(hnp.arrays(bool, (draw(st.integers(1, 5)), images))) for _ in range(2))
    if draw(st.booleans()):
        a[0] = False
    if draw(st.booleans()):
        b[-1] = False
    return a, b, draw(st.integers(1, images))


@given(pairs())
def test_iou_equals_brute_force_whatever_the_chunks(case):
    a, b, columns = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "COLUMNS", columns)
        got = similarity.iou(torch.from_numpy(a), torch.from_numpy(b))
        back = similarity.iou(torch.from_numpy(b), torch.from_numpy(a))
        own = similarity.iou(torch.from_numpy(a), torch.from_numpy(a))
    np.testing.assert_allclose(got.numpy(), brute_force(a, b), rtol=1e-6)
    assert torch.equal(back, got.T) and (own.diag() == 1).all()


def test_iou_is_exact_over_many_images():
    w = wrong(3, 150_000, 0.9)  # more than two chunks
    np.testing.assert_array_equal(similarity.iou(w, w).numpy(), brute_force(w.numpy(), w.numpy()).astype(np.float32))


@pytest.mark.parametrize("exclude_self", [False, True])
def test_maximum_and_nearest_equal_brute_force(exclude_self):
    w = wrong(7, 40)
    table = brute_force(w.numpy(), w.numpy())
    if exclude_self:
        np.fill_diagonal(table, -1)
    score, index = similarity.nearest(w, w, exclude_self)
    np.testing.assert_allclose(score.numpy(), table.max(1), rtol=1e-6)
    assert index.tolist() == table.argmax(1).tolist() and torch.equal(similarity.maximum(w, w, exclude_self), score)


def test_a_generator_that_copies_the_zoo_scores_one():
    w = wrong(6, 50)
    assert similarity.maximum(w[[3, 3, 0]], w).tolist() == [1, 1, 1]
    assert similarity.nearest(w[[3, 3, 0]], w)[1].tolist() == [3, 3, 0]
    assert (similarity.maximum(wrong(4, 50, seed=1), w) < 1).all()


@pytest.mark.parametrize("a, b, message", [
    (torch.zeros(2, 3), torch.zeros(2, 3), r"wrong predictions are torch.float32 \[2, 3\]: expected bool"),
    (wrong(1, 3)[0], wrong(2, 3), r"torch.bool \[3\]: expected bool \[models, images\]"),
    (wrong(2, 3), wrong(2, 4), "over 3 and 4 images: expected the same images")])
def test_other_predictions_are_refused(unchecked, a, b, message):
    for use in (similarity.iou, similarity.maximum, similarity.nearest):
        with pytest.raises(ValueError, match=message):
            use(a, b)


@pytest.mark.parametrize("m, k", [(1, 1), (2, 3)])
def test_excluding_oneself_needs_the_originals_themselves(m, k):
    with pytest.raises(ValueError, match=f"exclude_self with {m} networks and {k} originals"):
        similarity.maximum(wrong(m, 9), wrong(k, 9), exclude_self=True)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_distance_equals_numpy_far_from_zero(exclude_self):
    originals = random(6, 30) * 1e-3 + 10  # float32 squares of these would leave nothing of the differences
    theta = originals if exclude_self else random(4, 30, seed=1) * 1e-3 + 10
    a, b = theta.numpy().astype(np.float64), originals.numpy().astype(np.float64)
    table = np.sqrt(((a[:, None] - b) ** 2).sum(2))
    if exclude_self:
        np.fill_diagonal(table, np.inf)
    np.testing.assert_allclose(similarity.distance(theta, originals, exclude_self).numpy(), table.min(1), rtol=1e-3)


def test_copies_are_at_distance_zero():
    originals = random(5, 12)
    assert similarity.distance(originals[[2, 4]], originals).tolist() == [0, 0]


@pytest.mark.parametrize("measure", [similarity.distance, similarity.outside_span])
def test_both_measures_take_all_floats_and_refuse_the_rest(unchecked, measure):
    theta, originals = random(4, 12).bfloat16().half().float(), random(6, 12, seed=1).bfloat16().half().float()
    kinds = [torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.numpy, lambda t: nn.Parameter(t)]
    want = measure(theta, originals)
    for change, other in itertools.product(kinds, kinds):
        found = measure(change(theta), other(originals))
        assert torch.equal(found, want) and found.dtype == torch.float32 and not found.requires_grad
    for a, b, message in ((theta.long(), originals, "torch.int64"), (theta, originals.long(), "torch.int64"),
                          (theta[0], originals, "a single vector is theta.None."), (theta / 0, originals, "in 4 of 4 vectors"),
                          (theta, originals / 0, "in 6 of 6 vectors"), (theta.tolist(), originals, "a list"),
                          (theta[:, 1:], originals, r"shape \[4, 11\]: expected \[vectors, 12\]")):
        with pytest.raises(ValueError, match=message):
            measure(a, b)


@pytest.mark.parametrize("m, k", [(1, 1), (2, 3), (3, 2)])
def test_excluding_oneself_from_distances_needs_the_originals_themselves(m, k):
    with pytest.raises(ValueError, match=f"exclude_self with {m} networks and {k} originals"):
        similarity.distance(random(m, 5), random(k, 5), exclude_self=True)


# ---------------------------------------------------------------- outside the span

ORIGINALS = torch.cat([random(5, 8) + 3, torch.full((5, 4), 2.0)], dim=1)  # constant along the last four axes


def affine(n, seed=2):
    weights = random(n, 5, seed=seed)
    return (weights + (1 - weights.sum(1, keepdim=True)) / 5) @ ORIGINALS


@pytest.mark.parametrize("theta", [affine(6), ORIGINALS, ORIGINALS.mean(0, keepdim=True), ORIGINALS[:2].mean(0)[None]],
                         ids=["affine", "copies", "mean", "average"])
def test_affine_combinations_lie_in_the_span(theta):
    assert (similarity.outside_span(theta, ORIGINALS) < 1e-4).all()


def test_directions_that_no_original_has_lie_outside():
    extra = torch.zeros(3, 12)
    extra[:, 8:] = random(3, 4, seed=3)
    share = similarity.outside_span(ORIGINALS.mean(0) + extra, ORIGINALS)
    np.testing.assert_allclose(share.numpy(), 1, rtol=1e-5)


def test_originals_that_are_all_the_same_span_nothing():
    """Their mean differs from them by rounding, which is no direction."""
    originals = torch.full((7, 12), 0.1)
    assert similarity.outside_span(originals + torch.linspace(1, 2, 12), originals).tolist() == [1] * 7


@pytest.mark.parametrize("ratio", [0.1, 1.0, 3.0])
def test_a_mixture_has_the_share_of_its_lengths(ratio):
    inside = ORIGINALS[1] - ORIGINALS.mean(0)
    across = torch.zeros(12)
    across[9] = ratio * inside.norm()
    share = similarity.outside_span((ORIGINALS[1] + across)[None], ORIGINALS)
    assert float(share) == pytest.approx(ratio / (1 + ratio**2) ** 0.5, rel=1e-4)


def test_outside_span_equals_least_squares():
    theta = random(6, 12, seed=4)
    mean = ORIGINALS.numpy().astype(np.float64).mean(0)
    directions, deviation = ORIGINALS.numpy() - mean, theta.numpy() - mean
    rest = deviation - np.linalg.lstsq(directions.T, deviation.T, rcond=None)[0].T @ directions
    want = np.linalg.norm(rest, axis=1) / np.linalg.norm(deviation, axis=1)
    np.testing.assert_allclose(similarity.outside_span(theta, ORIGINALS).numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("keep, decompositions", [(similarity.KEEP, 3), (0, 4)])
def test_directions_are_kept_for_the_same_originals_alone(monkeypatch, keep, decompositions):
    made, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: made.append(1) or svd(*a, **k))
    monkeypatch.setattr(similarity, "KEEP", keep)
    monkeypatch.setattr(similarity, "_kept", {})
    theta, originals = random(6, 12, seed=4), ORIGINALS.clone()
    first, again = (similarity.outside_span(theta, originals) for _ in range(2))
    other = similarity.outside_span(theta, originals.roll(3, 1))
    originals[0, 11] += 1
    changed = similarity.outside_span(theta, originals)
    assert torch.equal(first, again) and len(made) == decompositions
    assert not torch.allclose(first, other) and not torch.allclose(first, changed)


# ---------------------------------------------------------------- among the generated

@pytest.mark.parametrize("m, n", [(2, 5), (3, 1), (7, 40), (20, 3)])
def test_pairwise_is_the_mean_over_all_pairs(m, n):
    wrong = random(m, n, seed=m) > 0.4
    sets = [{i for i, w in enumerate(row) if w} for row in wrong.tolist()]
    pairs = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in itertools.combinations(sets, 2)]
    assert similarity.pairwise(wrong) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_pairwise_of_copies_of_one_and_of_none_in_common():
    one = torch.tensor([[True, False, True]])
    assert similarity.pairwise(one.expand(5, -1).contiguous()) == similarity.pairwise(one) == 1.0
    assert similarity.pairwise(torch.eye(4, dtype=torch.bool)) == 0.0
