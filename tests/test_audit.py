"""audit.py: votes and frontiers against brute force over networks, images and pairs."""

import itertools
import math
from collections import Counter

import pandas as pd
import pytest
import torch
from test_experiment import experiment

from pdiff_lib import audit
from pdiff_lib.audit import ensemble_accuracy
from pdiff_lib.experiment import AVERAGE, ORIGINAL, PDIFF


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vote(ballots: list[int]) -> int:
    """The class with most votes; of equal ones that of the first voter, then the lowest. -1 is no vote."""
    counts = Counter(b for b in ballots if b != -1)
    if not counts:
        return -1
    most = [c for c in sorted(counts) if counts[c] == max(counts.values())]
    return ballots[0] if ballots[0] in most else most[0]


def drawn(predictions, y, size, draws, generator):
    """Accuracy of random votes, one image after the other."""
    shares = []
    for _ in range(draws):
        voters = torch.randperm(len(predictions), generator=generator)[:size].tolist()
        right = [vote([int(predictions[v, i]) for v in voters]) == int(y[i]) for i in range(len(y))]
        shares.append(sum(right) / len(right))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("m, size, draws", [(7, 1, 5), (7, 2, 5), (7, 3, 5), (7, 4, 8), (7, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_vote_is_that_of_every_image_counted_by_hand(m, size, draws, dtype):
    y = torch.randint(3, (60,), generator=seeded(1))
    predictions = torch.where(torch.rand(m, 60, generator=seeded(2)) < 0.4, y, torch.randint(4, (m, 60), generator=seeded(3)))
    found = ensemble_accuracy(predictions.to(dtype), y, size, draws, seeded(4))
    assert found == pytest.approx(drawn(predictions, y, size, draws, seeded(4)), abs=1e-12)
    assert found == ensemble_accuracy(predictions.to(dtype), y, size, draws, seeded(4))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_who_has_no_class_has_no_vote(size, dtype):
    y = torch.randint(3, (60,), generator=seeded(1))
    predictions = torch.randint(-1, 3, (7, 60), generator=seeded(2))
    predictions[:, :5] = -1  # nobody votes: wrong, also where the class is 0
    y[:5] = 0
    found = ensemble_accuracy(predictions.to(dtype), y, size, 6, seeded(4))
    assert found == pytest.approx(drawn(predictions, y, size, 6 if size < 7 else 1, seeded(4)), abs=1e-12)
    assert ensemble_accuracy(torch.full((7, 60), -1), torch.zeros(60, dtype=torch.int64), size) == 0.0


def test_votes_are_drawn_where_the_generator_lives(unchecked, monkeypatch):
    """A CUDA generator cannot be made here: whoever draws must ask for its device, and bring the numbers back."""
    class Cuda:
        device = torch.device("cuda", 1)

    asked, draw = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, generator, device: asked.append(device) or draw(n))
    ensemble_accuracy(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 2, 5, Cuda())
    assert asked == [Cuda.device] * 5


def test_of_two_voters_the_first_decides():
    """Each of two is right on its own half: by the first voter's word the pair is right on one half, whichever comes first."""
    y = torch.zeros(8, dtype=torch.int64)
    halves = torch.tensor([[0] * 4 + [1] * 4, [2] * 4 + [0] * 4])
    assert ensemble_accuracy(halves, y, 2, generator=seeded()) == 0.5
    others = torch.tensor([[2, 2], [1, 0], [0, 1]])  # three ways each: the first voter's word, not the lowest class
    first = int(torch.randperm(3, generator=seeded())[0])
    assert ensemble_accuracy(others, others[first].long(), 3, generator=seeded()) == 1.0


def test_one_voter_is_the_mean_network_and_too_few_are_no_number():
    y, predictions = torch.arange(3), torch.tensor([[0, 1, 2], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert ensemble_accuracy(predictions, y, 1, 4000, seeded()) == pytest.approx((1 + 2 / 3 + 1 / 3 + 1 / 3) / 4, abs=0.02)
    assert math.isnan(ensemble_accuracy(predictions, y, 5))


def mixtures(pairs, weights=401):
    """(accuracy, similarity) of what two methods reach together, each giving a share of the networks."""
    shares = [i / (weights - 1) for i in range(weights)]
    return [(w * a[0] + (1 - w) * b[0], w * a[1] + (1 - w) * b[1]) for a, b in itertools.combinations(pairs, 2) for w in shares]


def beats(a, b):
    """(accuracy, similarity): no worse in either, better in one by more than rounding."""
    return a[0] >= b[0] - 1e-9 and a[1] <= b[1] + 1e-9 and (a[0] > b[0] + 1e-9 or a[1] < b[1] - 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_the_frontier_holds_what_neither_another_nor_a_mixture_beats(seed):
    points = torch.randint(5, (2, 8), generator=seeded(seed)).double() / 8  # few values: many ties, some equals
    pairs = list(zip(*points.tolist()))
    found = audit.frontier(*points)
    assert sorted(found) == [i for i, p in enumerate(pairs) if not any(beats(q, p) for q in (*pairs, *mixtures(pairs)))]
    assert [pairs[i][1] for i in found] == sorted(pairs[i][1] for i in found)


@pytest.mark.parametrize("seed", range(4))
def test_above_is_the_distance_to_the_best_mixture_that_is_no_more_similar(seed):
    accuracy, similar = torch.randint(6, (2, 7), generator=seeded(seed)).double() / 8
    pairs = list(zip(accuracy.tolist(), similar.tolist()))
    for a, s in itertools.product((0.1, 0.5), (-0.1, 0.0, 0.375, 0.75)):
        fair = [x for x, y in (*pairs, *mixtures(pairs)) if y <= s]
        want = a - max(fair) if fair else math.nan
        assert audit.above(a, s, accuracy, similar) == pytest.approx(want, abs=1e-2, nan_ok=True)
        assert not fair or audit.above(a, s, accuracy, similar) <= want + 1e-9  # the grid of shares finds less than there is


def test_place_compares_each_with_the_simple_others():
    summary = pd.DataFrame({"mean": [0.9, 0.8, 0.7, 0.85, 0.6, 0.85], "max_similarity": [0.99, 0.9, 0.5, 0.9, 0.4, 0.9]},
                           index=pd.Index(["original", "noise", "gaussian", "p-diff", "far", "twin"], name="method"))
    found = audit.place(summary, ["noise", "gaussian"])
    assert list(found.index) == ["noise", "gaussian", "p-diff", "far", "twin"] and found.index.name == "method"
    assert found.above.to_dict() == pytest.approx(
        {"noise": 0.1, "gaussian": math.nan, "p-diff": 0.05, "far": math.nan, "twin": 0.05}, nan_ok=True)
    assert found.on_frontier.to_dict() == {"noise": False, "gaussian": True, "p-diff": True, "far": True, "twin": True}


def test_the_table_is_the_summary_and_what_votes_and_pairs_give(tmp_path):
    e = experiment(tmp_path)
    names = [ORIGINAL, AVERAGE, PDIFF]
    table, summary = audit.table(e, names), e.summary(names)
    pd.testing.assert_frame_equal(table[summary.columns], summary)
    assert table.index.name == "method" and list(table.index) == names
    y = e.task.images.y_test
    for name, row in table.iterrows():
        wrong, predictions = e.wrong(name), e.predictions(name)
        pairs = [float((a & b).sum() / (a | b).sum()) for a, b in itertools.combinations(wrong, 2)]
        assert row.pairwise == pytest.approx(sum(pairs) / len(pairs) if pairs else 1.0, abs=1e-6)
        for size in (1, 2, 5, 10, 50):
            draws = 20 if size < len(wrong) else 1
            want = drawn(predictions, y, size, draws, e.generator(f"bag {size}")) if size <= len(wrong) else math.nan
            assert row[f"bag_{size}"] == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert table.loc[ORIGINAL, ["fit_seconds", "sample_seconds"]].isna().all()
    assert table.loc[PDIFF, "fit_seconds"] == e.seconds[PDIFF]["fit"] and (table.sample_seconds.dropna() > 0).all()
