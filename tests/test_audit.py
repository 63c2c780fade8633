"""audit.py: votes and frontiers against brute force over networks, images and pairs."""

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from test_arena import K, HELD, SETTINGS, Twins
from test_experiment import SMALL, experiment

from device import DEVICE
from pdiff_lib import audit
from pdiff_lib.arena import HELD_OUT
from pdiff_lib.audit import Audited, ensemble_accuracy
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import AVERAGE, ORIGINAL, PDIFF
from pdiff_lib.measures import novelty, similarity
from pdiff_lib.networks import symmetry
from pdiff_lib.study import Study


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


def test_the_frontier_of_nobody_and_of_who_has_no_accuracy_is_no_number():
    none = torch.empty(0, dtype=torch.float64)
    assert math.isnan(audit.above(0.5, 0.5, none, none)) and math.isnan(audit.above(0.5, 0.5, torch.tensor([math.nan]), torch.tensor([0.1])))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("audited"))


def audited(store, settings=SETTINGS, **changes) -> Audited:
    return Audited(Recipe.of(**{**settings, **changes}), store, DEVICE, False, held_out=HELD)


@pytest.fixture(scope="module")
def independent(store) -> Audited:
    e = audited(store)
    e.add("twins", Twins(symmetry.groups(e._initial, e.subset)))
    return e


@pytest.fixture(scope="module")
def part(store) -> Audited:
    """Two norm layers of a network, saves of one training."""
    return audited(store, SMALL, k_checkpoints=K)


def test_methods_learn_from_what_is_not_held_out(independent, part):
    for e, held in ((independent, list(range(K, K + HELD))), (part, [round(i * (K + HELD - 1) / (HELD - 1)) for i in range(HELD)])):
        whole = e.arena.experiment.zoo.theta
        assert torch.equal(e.theta(HELD_OUT), whole[held])
        assert torch.equal(e.theta(ORIGINAL), whole[[i for i in range(K + HELD) if i not in held]])
        assert torch.equal(e.learned_from, e.theta(ORIGINAL)) and e.k == K
        assert torch.equal(e.theta(AVERAGE)[0], e.theta(ORIGINAL).mean(dim=0))
    aligned = audited(independent.store, alignment="reference")
    whole = symmetry.align(independent.arena.experiment.zoo.theta, independent.arena.experiment.zoo.theta[0], aligned._symmetry)
    assert torch.equal(aligned.theta(ORIGINAL), whole[:K]) and torch.equal(aligned.theta(HELD_OUT), whole[K:])


def in_every_order(theta, groups):
    """[orders M D] the same networks with the units of their one group in each order."""
    orders = itertools.permutations(range(len(groups[0])))
    return torch.stack([symmetry.permute(theta, groups, [torch.tensor(o).repeat(len(theta), 1)]) for o in orders])


def test_distances_are_those_of_the_best_of_all_orders(independent):
    e, groups = independent, independent.arena.units
    originals = e.arena.canonical(e.theta(ORIGINAL)).double()
    own = torch.stack([torch.cdist(o.double(), originals) for o in in_every_order(originals.float(), groups)]).amin(dim=0)
    unit = own.fill_diagonal_(torch.inf).amin(dim=1).quantile(0.5)
    frame = e.frame([ORIGINAL, HELD_OUT, "gaussian", "twins"])
    for name, rows in frame.groupby("method", sort=False):
        theta = e.arena.canonical(e.theta(name))
        pairs = torch.stack([torch.cdist(o.double(), originals) for o in in_every_order(theta, groups)]).amin(dim=0)
        want = (own if name == ORIGINAL else pairs).amin(dim=1) / unit
        np.testing.assert_allclose(rows.relative_distance, want, atol=2e-3)
    assert frame[frame.method == ORIGINAL].relative_distance.median() == pytest.approx(1, abs=1e-3)
    assert (frame[frame.method == "twins"].relative_distance < 1e-3).all() and (frame[frame.method == "twins"].distance > 0.01).any()


def test_of_a_part_of_a_network_they_are_as_they_are(part):
    assert part.arena.units is None
    originals = part.theta(ORIGINAL)
    unit = similarity.distance(originals, originals, exclude_self=True).quantile(0.5)
    for name in (HELD_OUT, AVERAGE, "noise 0.5"):
        want = similarity.distance(part.theta(name), originals) / unit
        np.testing.assert_allclose(part.frame([name]).relative_distance, want, rtol=1e-4)


def test_the_table_has_the_yardstick_of_the_arena(independent):
    e, names = independent, [ORIGINAL, HELD_OUT, "gaussian", "twins", AVERAGE]
    table, frame = audit.table(e, names), e.frame(names)
    assert list(table.index) == names
    bar = frame[frame.method == ORIGINAL].accuracy.quantile(0.1)
    held = torch.tensor(frame[frame.method == HELD_OUT].relative_distance.to_numpy())
    for name, row in table.iterrows():
        rows = frame[frame.method == name]
        assert row.relative_distance == pytest.approx(rows.relative_distance.median(), abs=1e-5)
        assert row.mean_distance == pytest.approx(rows.relative_distance.mean(), abs=1e-5)
        for c in novelty.NOVEL:
            assert row[f"np_{c:g}"] == pytest.approx(((rows.accuracy >= bar) & (rows.relative_distance >= c * (1 - 1e-6))).mean(), abs=1e-9)
        if name != AVERAGE:
            z = novelty.data_copying(torch.tensor(rows.relative_distance.to_numpy()), held)
            assert row.z_u == pytest.approx(z, abs=1e-6)
            theta, originals = (e.arena.canonical(e.theta(m)).double().var(dim=0).mean().sqrt() for m in (name, ORIGINAL))
            assert row.spread == pytest.approx(float(theta / originals), rel=1e-4)
    assert table.spread[AVERAGE] == pytest.approx(0, abs=1e-6) and table.z_u["twins"] == table.z_u.min() < -2 and table.z_u[HELD_OUT] == 0
    plain = audit.table(experiment(None), [ORIGINAL])
    assert {*table.columns} - {*plain.columns} == {"relative_distance", "mean_distance", "np_0.5", "np_0.75", "np_1", "np_2", "z_u", "spread"}


def test_no_network_is_measured_twice(store, monkeypatch):
    e, seen, measure = audited(store), [], similarity.outside_span
    monkeypatch.setattr(similarity, "outside_span", lambda theta, originals: seen.append(len(theta)) or measure(theta, originals))
    first = e.frame([HELD_OUT, "gaussian"])
    first["accuracy"] = -1.0  # what somebody does to a frame is his own
    audit.table(e, [ORIGINAL, HELD_OUT, "gaussian"])
    again = e.frame(["gaussian", HELD_OUT])
    assert sorted(seen) == sorted([HELD, e.recipe.comparison.samples, K]) and (again.accuracy >= 0).all()
    pd.testing.assert_frame_equal(again, audited(store).frame(["gaussian", HELD_OUT]))


def test_files_of_a_users_own_hold_none_out(tmp_path):
    for name in "ab":
        torch.save({}, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="checkpoints .* with held_out = 6: expected none"):
        audited(Store(None), SMALL, checkpoints=str(tmp_path))


def test_a_study_makes_what_it_is_asked_for(store):
    s = Study(Recipe.of(**SETTINGS), {"raw": {}, "aligned": {"alignment": "reference"}}, (0, 1), store=store, device=DEVICE, progress=False,
              kind=lambda *a: Audited(*a, held_out=HELD))
    assert [type(e) for _, _, e in s] == [Audited] * 4 and all(e.arena.held_out == HELD for _, _, e in s)
    assert {"row", "seed", "relative_distance"} <= {*s.frame([HELD_OUT]).columns}


def test_beyond_is_above_the_best_mixture_at_equal_similarity_and_at_equal_distance():
    generator = np.random.default_rng(0)
    means = {"original": (0.9, 0.9, 0.1), "near": (0.9, 0.8, 0.5), "far": (0.5, 0.4, 2.0), "own": (0.8, 0.6, 1.5), "beyond": (0.3, 0.1, 3.0)}
    rows = [{"method": m, "accuracy": a + da, "max_similarity": s + ds, "relative_distance": d + dd}
            for m, (a, s, d) in means.items() for da, ds, dd in 0.02 * generator.standard_normal((30, 3))]
    frame = pd.DataFrame(rows)
    found = audit.beyond(frame, ["near", "far"])
    assert list(found.index) == ["near", "far", "own", "beyond"] and found.index.name == "method"
    mean = frame.groupby("method").mean()
    for axis, column, sign in (("similarity", "max_similarity", 1), ("distance", "relative_distance", -1)):
        place = audit.place(mean.assign(mean=mean.accuracy, max_similarity=sign * mean[column]), ["near", "far"])
        pd.testing.assert_series_equal(found[axis], place.above[found.index], check_names=False)
        own = found.loc["own"]
        assert own[f"{axis}_low"] < own[axis] < own[f"{axis}_high"]
        assert 0.01 < own[f"{axis}_high"] - own[f"{axis}_low"] < 0.05  # of a mean of 30 networks, each +- 0.02, and of the baselines' means
        assert found.loc["beyond", [axis, f"{axis}_low", f"{axis}_high"]].isna().all()
    assert found.similarity["own"] == pytest.approx(0.1, abs=0.02) and found.distance["own"] == pytest.approx(0.8 - 0.5 - 0.4 / 3, abs=0.02)
    for wrong, message in ((frame.drop(columns="relative_distance"), "without relative_distance"), (frame[frame.method != "far"], "without far")):
        with pytest.raises(ValueError, match=message):
            audit.beyond(wrong, ["near", "far"])
