"""sane.py and kde.py: draws against SciPy and scikit-learn, what the released fixed seed gives, and real networks of the digits."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.datasets import load_digits
from sklearn.neighbors import KernelDensity
from torch import nn

from pdiff_lib.base.runs import Store
from pdiff_lib.generators import kde
from pdiff_lib.generators.coded import Coded
from pdiff_lib.generators.sane import SANE, HyperRep, masked_mse, nt_xent, permuted
from pdiff_lib.networks import subset, symmetry
from resumed import killed_and_resumed

SHAPES = ((10, 64), (10,), (10, 10), (10,))  # an MLP 64-10-10
UNITS = torch.stack([torch.cat([torch.arange(64) + 64 * u, torch.tensor([640 + u]), 650 + 10 * torch.arange(10) + u]) for u in range(10)])
SMALL = {"steps": 4, "batch": 8, "width": 16, "heads": 2, "layers": 1, "latent": 6}
TRAINED = {"steps": 200, "batch": 16, "layers": 1, "lr": 3e-3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


@functools.cache
def zoo(k=200, steps=150):
    """MLPs, each trained by itself on the same 900 images, all in the same products."""
    g, (pixels, labels) = seeded(), digits()
    weights = [torch.randn(k, *shape, generator=g) / shape[-1] ** 0.5 if len(shape) > 1 else torch.zeros(k, *shape) for shape in SHAPES]
    optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], 1e-2)
    for _ in range(steps):
        pick = torch.randint(900, (64,), generator=g)
        losses = nn.functional.cross_entropy(logits(pixels[pick], *weights).flatten(0, 1), labels[pick].repeat(k), reduction="sum") / 64
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    return torch.cat([w.detach().flatten(1) for w in weights], dim=1)


def logits(x, w, b, v, c):
    hidden = torch.relu((x @ w.flatten(0, 1).T).unflatten(1, w.shape[:2]).transpose(0, 1) + b[:, None])
    return torch.baddbmm(c[:, None], hidden, v.transpose(1, 2))


def accuracy(theta, images=slice(900, 1300)):
    """Of images that no network was trained on: those a judge may see, by default."""
    pixels, labels = digits()
    parts = (t.unflatten(1, shape) for t, shape in zip(theta.cpu().split([math.prod(s) for s in SHAPES], dim=1), SHAPES))
    return (logits(pixels[images], *parts).argmax(dim=2) == labels[images]).float().mean(dim=1)


TEST = slice(1300, None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("stages"))


def trained(kind, store, **changes):
    """Trained once: how it is sampled does not matter to the training."""
    return kind(SHAPES, (UNITS,), accuracy, progress=False, **{**TRAINED, **changes}).fit(zoo(), store)


def made(kind=SANE, groups=(UNITS,), **changes):
    return kind(SHAPES, groups, progress=False, **{**SMALL, **changes})


# Densities


@pytest.mark.parametrize("dimensions", ["independent", "fixed"])
def test_each_dimension_is_a_kernel_density(dimensions):
    z, n, h = torch.randn(12, 3, generator=seeded(1)) * torch.tensor([0.1, 1.0, 3.0]), 4000, 0.2
    drawn, points = kde.draw(z, n, h, dimensions, seeded()).numpy().astype(np.float64), z.numpy().astype(np.float64)
    for i in range(3):
        spread = math.sqrt(points[:, i].var() + h**2)
        assert abs(drawn[:, i].mean() - points[:, i].mean()) < 4 * spread / math.sqrt(n)
        assert drawn[:, i].std() == pytest.approx(spread, rel=4 / math.sqrt(2 * n))
        assert kstest(drawn[:, i], lambda x, i=i: norm.cdf((x[:, None] - points[:, i]) / h).mean(1)).pvalue > 1e-3
        other = KernelDensity(bandwidth=h).fit(points[:, [i]]).sample(n, random_state=0)[:, 0]
        assert kstest(drawn[:, i], other).pvalue > 1e-3
    found, of_the_points = (np.abs(np.corrcoef(x, rowvar=False) - np.eye(3)).max() for x in (drawn, points))
    assert (found < 4.5 / math.sqrt(n)) == (dimensions == "independent") and of_the_points > 0.2


def shifts(drawn, z):
    """Each sample's distance to each latent, dimension by dimension: how far it is from being the same in all, at least, and what
    it is there."""
    away = drawn[:, None] - z
    spread, parent = (away - away.mean(2, keepdim=True)).abs().amax(2).min(1)
    return spread, parent, away[torch.arange(len(drawn)), parent].mean(1)


def test_with_a_fixed_seed_a_sample_is_one_latent_and_one_offset_as_with_scikit_learns():
    z, h, n = torch.randn(30, 16, generator=seeded(1), dtype=torch.float64), 0.2, 1500
    spread, parent, shift = shifts(kde.draw(z, n, h, "fixed", seeded()), z)
    assert spread.max() < 1e-5
    assert kstest(shift.numpy(), norm(scale=h).cdf).pvalue > 1e-3
    assert (parent.bincount(minlength=30) / n - 1 / 30).abs().max() < 4 * math.sqrt(1 / 30 / n)
    assert shifts(kde.draw(z, n, h, "independent", seeded()), z)[0].min() > 0.3
    released = [KernelDensity(bandwidth=h).fit(z[:, [i]]).sample(n, random_state=42) for i in range(16)]
    spread, _, shift = shifts(torch.tensor(np.concatenate(released, axis=1)), z)
    assert spread.max() < 1e-9 and kstest(shift.numpy(), norm(scale=h).cdf).pvalue > 1e-3


def test_the_fixed_seed_copies_a_toy_of_200_latents():
    z, h, n = torch.randn(200, 64, generator=seeded(5)), 0.002, 2000
    nearest = {d: torch.cdist(kde.draw(z, n, h, d, seeded()).double(), z.double()).amin(1).median() for d in ("fixed", "independent")}
    originals = torch.cdist(z, z).fill_diagonal_(torch.inf).amin(1).median()
    assert nearest["fixed"] == pytest.approx(h * 8 * norm.ppf(0.75), rel=0.1)  # of 64 times the same |N(0, h^2)|: .011
    assert nearest["independent"] == pytest.approx(8.9, abs=0.2) and originals == pytest.approx(8.9, abs=0.2)


def toy():
    """Latents of 5 numbers, twice as many parameters, and who is near 2 is good."""
    basis = torch.randn(5, 10, generator=seeded(8))
    return torch.randn(40, 5, generator=seeded(9)), lambda z: z @ basis, lambda v: -(v @ torch.linalg.pinv(basis) - 2).square().sum(1)


@pytest.mark.parametrize("dimensions", ["independent", "fixed"])
def test_sub_keeps_the_best_of_what_was_drawn(dimensions):
    z, decode, judge = toy()
    found = kde.sample(z, 7, kde.Sampling("SUB", dimensions, candidates=90), decode, judge, seeded())  # more than are judged at once
    everything = decode(kde.draw(z, 7 * 90, 0.2, dimensions, seeded()))
    score = judge(everything)
    assert found.shape == (7, 10) and torch.allclose(judge(found), score.sort(descending=True).values[:7], atol=1e-4)
    assert judge(found).min() > score.quantile(0.98)


def test_boot_draws_anew_around_what_was_best():
    z, decode, judge = toy()
    mean = {}
    for rounds in (1, 2, 4):
        settings = kde.Sampling("BOOT", candidates=20, rounds=rounds, share=0.1)
        found, g, pool = kde.sample(z, 6, settings, decode, judge, seeded()), seeded(), z
        for _ in range(rounds):
            drawn = kde.draw(pool, 120, 0.2, "independent", g)
            order = judge(decode(drawn)).numpy().argsort()[::-1]
            pool = drawn[order[:12].copy()]
        torch.testing.assert_close(found, decode(pool[:6]), rtol=1e-4, atol=1e-4)
        mean[rounds] = float(judge(found).mean())
    assert mean[1] < mean[2] - 0.1 and mean[2] < mean[4] - 0.1
    sub = kde.sample(z, 6, kde.Sampling("SUB", candidates=20), decode, judge, seeded())
    assert torch.equal(sub, kde.sample(z, 6, kde.Sampling("BOOT", candidates=20, rounds=1), decode, judge, seeded()))


# Losses and views


def test_the_contrastive_loss_is_that_of_a_double_loop():
    a, b = torch.randn(5, 7, generator=seeded(1)), torch.randn(5, 7, generator=seeded(2))
    rows, total = torch.cat([a, b]).double(), 0.0
    for i in range(10):
        partner = (i + 5) % 10
        terms = {j: math.exp(float(torch.cosine_similarity(rows[i], rows[j], dim=0)) / 0.3) for j in range(10) if j != i}
        total -= math.log(terms[partner] / sum(terms.values())) / 10
    assert float(nt_xent(a, b, 0.3)) == pytest.approx(total, rel=1e-5)
    assert nt_xent(a, a, 0.1) < nt_xent(a, b, 0.1)


def test_the_squared_error_is_of_what_is_no_padding():
    x, y = (torch.randn(3, 4, 5, generator=seeded(i)) for i in (1, 2))
    mask = torch.rand(4, 5, generator=seeded(3)) > 0.4
    want = ((x - y)[:, mask] ** 2).mean()
    assert float(masked_mse(y, x, mask)) == pytest.approx(float(want), rel=1e-5)
    assert torch.equal(masked_mse(y.masked_fill(~mask, torch.nan), x.masked_fill(~mask, 1e9), mask), masked_mse(y, x, mask))


def test_a_permuted_view_is_another_vector_of_the_same_function():
    """Two layers of hidden units: weights between them belong to both."""
    first = torch.stack([torch.cat([torch.arange(3) + 3 * u, torch.tensor([12 + u]), 16 + 4 * torch.arange(5) + u]) for u in range(4)])
    second = torch.stack([torch.cat([16 + 4 * u + torch.arange(4), torch.tensor([36 + u, 41 + u, 46 + u])]) for u in range(5)])
    v, x = torch.randn(64, 53, generator=seeded(1)), torch.randn(9, 3, generator=seeded(2))

    def outputs(vector):
        w1, b1, w2, b2, w3, b3 = vector.split([12, 4, 20, 5, 10, 2])
        return torch.relu(torch.relu(x @ w1.view(4, 3).T + b1) @ w2.view(5, 4).T + b2) @ w3.view(2, 5).T + b3

    moved = permuted(v, (first, second), seeded(3))
    for before, after in zip(v, moved):
        torch.testing.assert_close(outputs(after), outputs(before), rtol=1e-4, atol=1e-5)
    at = (moved[:, None, 12:16] == v[:, 12:16, None]).long().argmax(1)  # where the biases of the first layer came from
    assert len(at.unique(dim=0)) > 12 and at.float().mean(0).sub(1.5).abs().max() < 4 * 1.12 / 8  # orders of their own, uniform
    assert torch.equal(permuted(v, (first, second), seeded(3)), moved) and not torch.equal(permuted(v, (first, second), seeded(4)), moved)


class Watching(nn.Module):
    """What a training step shows the network."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head, self.seen = net, net.head, []

    def encode(self, x, at):
        self.seen.append((x, at))
        return self.net.encode(x, at)

    def decode(self, z, at):
        return self.net.decode(z, at)


def prepared(**changes):
    sane = made(device="cpu", **changes)
    sane._prepare(zoo()[:12])
    return sane, Watching(sane._build())


def test_the_loss_is_both_weighted():
    (sane, net), found = prepared(), {}
    for contrast in (0.0, 0.05, 1.0):
        sane.settings = dataclasses.replace(sane.settings, contrast=contrast)
        found[contrast] = float(sane._loss(net, 0, seeded()).detach())
    x, at = net.seen[0]
    with torch.no_grad():
        error = float(((net.decode(net.encode(x, at), at) - x)[:, sane.tokens.mask] ** 2).mean())
        contrastive = float(nt_xent(*net.head(net.encode(x, at)).chunk(2), 0.1))
    assert found == pytest.approx({0.0: error, 0.05: 0.05 * contrastive + 0.95 * error, 1.0: contrastive}, rel=1e-4)
    assert abs(error - contrastive) > 0.1


def test_a_step_sees_a_permuted_view_and_the_network_as_it_is():
    sane, net = prepared(view_noise=0.0)
    for step in range(4):
        sane._loss(net, step, seeded(step))
        x, at = net.seen[-1]
        assert torch.equal(at, torch.arange(20)) and x.shape == (16, 20, 65)
        first, second = (sane.tokens.decode(view) for view in x.chunk(2))
        came_from = torch.cdist(second, sane.v).min(1)
        assert came_from.values.max() == 0 and len(came_from.indices.unique()) == 8  # no network is its own counterexample
        raw = [sane.standardise.inverse(view) for view in (first, second)]
        assert not torch.equal(*raw) and torch.equal(*(accuracy(view) for view in raw))
    plain, net = prepared(view_noise=0.0, groups=None)
    plain._loss(net, 0, seeded())
    assert torch.equal(*net.seen[0][0].chunk(2))
    noisy, net = prepared(groups=None, view_noise=0.05)
    noisy._loss(net, 0, seeded())
    a, b = (noisy.tokens.decode(view) for view in net.seen[0][0].chunk(2))
    assert float((a / b - 1).std()) == pytest.approx(0.05 * 2**0.5, rel=0.1)


def test_long_sequences_are_seen_through_windows():
    sane, net = prepared(window=6, contrast=0.0)
    losses = [float(sane._loss(net, step, seeded(step)).detach()) for step in range(150)]
    for loss, (x, at) in zip(losses[:9], net.seen):  # rows of both lengths
        error = (net.decode(net.net.encode(x, at), at) - x).detach()[:, sane.tokens.mask[at]]
        assert loss == pytest.approx(float((error**2).mean()), rel=1e-4)
    starts = torch.stack([at for _, at in net.seen])
    assert torch.equal(starts - starts[:, :1], torch.arange(6).expand(150, 6)) and starts[:, 0].unique().tolist() == list(range(15))
    assert net.seen[0][0].shape == (16, 6, 65)
    sane = made(window=6).fit(zoo()[:12])
    theta = zoo()[:2]
    z = sane.encode(theta)
    assert z.shape == (2, 20, 6) and sane.decode(z).shape == theta.shape
    for place, reaches in ((64 * 7, range(6, 12)), (700, range(12, 20))):  # in tokens 7 and 15; the last window is 14 to 19
        other = theta.clone()
        other[:, place] += 1
        assert (sane.encode(other) != z).any(dim=2).all(dim=0).nonzero()[:, 0].tolist() == list(reaches)


@pytest.mark.parametrize("kind", [SANE, HyperRep])
def test_padding_neither_teaches_nor_shows(kind):
    model = made(kind, token_length=70, device="cpu")  # 5 numbers of each token are padding, and more of the last layer's
    model._prepare(zoo()[:12])
    net = model._build()
    loss = model._loss(net, 0, seeded())
    loss.backward()
    assert (net.leave.weight.grad[65:] == 0).all() and (net.leave.bias.grad[65:] == 0).all() and (net.enter.weight.grad[:, 65:] == 0).all()
    assert (net.leave.weight.grad[:65] != 0).all()
    model.net, model.numel = net, 760
    before, z = model.decode(model.encode(zoo()[:3])), model.encode(zoo()[:3])
    with torch.no_grad():
        for weight in (net.enter.weight[:, 65:], net.leave.weight[65:], net.leave.bias[65:]):
            weight.fill_(1e3)
    assert torch.equal(model.encode(zoo()[:3]), z) and torch.equal(model.decode(z), before)
    assert torch.equal(model._loss(net, 0, seeded()), loss)


def test_tokens_are_rows_with_their_bias_and_a_layer_has_one_scale():
    assert made().tokens.positions.shape == (20, 65)  # the longest row of this network
    assert SANE(((4, 600), (4,)), progress=False).tokens.positions.shape == (12, 289)
    sane, _ = prepared()
    layers = torch.tensor([650, 110])
    assert [len(torch.unique(part)) for part in sane.standardise.std.split(layers.tolist())] == [1, 1]
    for part in sane.v.split(layers.tolist(), dim=1):
        assert abs(part.mean()) < 1e-5 and float(part.std(dim=1, correction=0).mean()) == pytest.approx(1, rel=1e-4)


# Trained on real networks


@pytest.mark.parametrize("kind, bar, right", [(SANE, 0.85, 0.75), (HyperRep, 0.65, 0.55)])
def test_networks_are_rebuilt(kind, bar, right, store):
    model, theta = trained(kind, store), zoo()
    rebuilt = model.decode(model.encode(theta)).cpu()
    tokens = [model.tokens.encode(model.standardise(x)) for x in (rebuilt, theta, theta.mean(0).expand_as(theta))]
    error, of_the_mean = ((t - tokens[1]).square().sum() for t in (tokens[0], tokens[2]))
    assert 1 - float(error / of_the_mean) > bar
    assert accuracy(theta, TEST).mean() > 0.85 > right
    assert accuracy(rebuilt, TEST).mean() > right > 0.3 > accuracy(theta.mean(0, keepdim=True), TEST).mean()


@pytest.mark.parametrize("kind", [SANE, HyperRep])
def test_one_seed_for_all_dimensions_gives_rebuilt_originals(kind, store):
    fixed, independent = (trained(kind, store, dimensions=d) for d in ("fixed", "independent"))
    assert torch.equal(fixed.z, independent.z) and fixed.fingerprint != independent.fingerprint
    copies, mixed = (model.sample(40, seeded()) for model in (fixed, independent))
    rebuilt = fixed._decode(fixed.z)
    relative = [float(torch.cdist(x, rebuilt).amin(1).median() / torch.cdist(rebuilt, rebuilt).fill_diagonal_(torch.inf).amin(1).median())
                for x in (copies, mixed)]
    assert relative[0] < 0.15 and relative[0] < relative[1] / 3
    assert accuracy(copies, TEST).mean() > accuracy(mixed, TEST).mean() + 0.2
    assert torch.equal(fixed.sample(40, seeded()), copies) and not torch.equal(fixed.sample(40, seeded(1)), copies)


def test_the_judge_chooses_originals_and_samples(store):
    model = trained(SANE, store)
    best = accuracy(zoo()).numpy().argsort(kind="stable")[::-1][:60]
    assert set(accuracy(zoo())[model.kept.cpu()].tolist()) == set(accuracy(zoo())[best.copy()].tolist()) and model.z.shape == (60, 20 * 32)
    torch.testing.assert_close(model.z, model.encode(zoo()[model.kept.cpu()]).flatten(1))
    plain, sub, boot = (accuracy(trained(SANE, store, sampling=s, candidates=30, rounds=2).sample(6, seeded())).mean()
                        for s in ("KDE30", "SUB", "BOOT"))
    assert sub > plain + 0.05 and boot > plain + 0.05
    alone = made(steps=2).fit(zoo())
    assert alone.z.shape == (200, 20 * 6) and alone.kept.tolist() == list(range(200))


def test_one_training_serves_every_way_of_sampling(tmp_path):
    theta, kept = zoo()[:12], Store(tmp_path)
    first = made().fit(theta, kept)
    for changes in ({"sampling": "SUB", "judge": accuracy}, {"dimensions": "fixed"}, {"bandwidth": 0.1}, {"share": 0.5}):
        again = SANE(SHAPES, (UNITS,), progress=False, **{**SMALL, **changes}).fit(theta, kept)
        assert torch.equal(again.losses, first.losses) and again.fingerprint != first.fingerprint
    assert len(list((tmp_path / "SANE").glob("*.safetensors"))) == 1
    made(groups=None).fit(theta, kept)
    made(latent=5).fit(theta, kept)
    made(HyperRep).fit(theta, kept)
    assert len(list((tmp_path / "SANE").glob("*.safetensors"))) == 3 and len(list((tmp_path / "HyperRep").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("kind", [SANE, HyperRep])
def test_a_killed_training_resumes_to_the_bit(kind, tmp_path, monkeypatch):
    theta, changes = zoo()[:12], {"steps": 7, "ema": 0.9}
    want = made(kind, **changes).fit(theta)
    resumed, steps = killed_and_resumed(lambda: made(kind, **changes).fit(theta, Store(tmp_path)), monkeypatch, at=3)
    assert steps == [3, 4, 5, 6] and torch.equal(resumed.losses, want.losses) and resumed.fingerprint == want.fingerprint
    assert torch.equal(resumed.sample(3, seeded()), want.sample(3, seeded()))


def test_hidden_units_are_brought_to_one_order_by_a_step_before():
    net = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    net.input_shape = (64,)
    groups = symmetry.groups(net, subset.select(net, "all"))
    assert [sorted(row) for row in groups[0].tolist()] == UNITS.tolist()
    seen = []

    def judge(theta):
        seen.append(theta.cpu())
        return accuracy(theta)

    theta = zoo()[:40]
    coded = Coded(SANE(SHAPES, groups, judge, progress=False, **SMALL), symmetry.Canonical(net)).fit(theta)
    aligned = coded.steps[0].encode(theta)
    assert torch.equal(seen[0], aligned.cpu()) and not torch.equal(seen[0], theta)
    assert torch.isfinite(coded.sample(3, seeded())).all() and len(coded.generator.z) == 12


def test_what_makes_no_sense_is_refused_before_training(unchecked):
    for message, make in (
            ("unknown setting 'windows'", lambda: made(windows=3)), ("unknown setting 'window'", lambda: made(HyperRep, window=3)),
            ("sampling is 'BOTH'", lambda: made(sampling="BOTH")), ("dimensions is 'some'", lambda: made(dimensions="some")),
            ("share is 0.0", lambda: made(share=0.0)),
            ("width is 20 with 4 heads: expected a multiple of 8", lambda: made(width=20, heads=4)),
            ("sampling is 'SUB' and judge is None", lambda: made(sampling="SUB")),
            ("group 0 of hidden units is torch.int64", lambda: made(groups=(UNITS + 11,))),
            ("group 0 of hidden units is torch.float32", lambda: made(groups=(UNITS.float(),))),
            ("dimensions is 'both'", lambda: kde.draw(torch.zeros(2, 2), 1, 0.1, "both")),
            ("judge is None", lambda: kde.sample(torch.zeros(2, 2), 1, kde.Sampling("BOOT"), lambda z: z))):
        with pytest.raises(ValueError, match=message):
            make()
    fails = (("2 of 12 scores are NaN or infinite", torch.tensor([math.nan, math.inf, *range(10)])),
             (r"the judge gave shape \[11\] for 12 vectors", torch.zeros(11)))
    for message, given in fails:
        model = SANE(SHAPES, None, lambda theta, given=given: given, progress=False, **SMALL)
        with pytest.raises(ValueError, match=message):
            model.fit(zoo()[:12])
        assert not hasattr(model, "net")
    model = made()
    for early in (lambda: model.encode(zoo()[:2]), lambda: model.decode(torch.zeros(1, 20, 6)), lambda: model.sample(1)):
        with pytest.raises(ValueError, match="call fit"):
            early()
    with pytest.raises(ValueError, match="sizes add up to 760: expected 759"):
        model.fit(zoo()[:12, 1:])
    with pytest.raises(ValueError, match="takes no condition"):
        model.fit(zoo()[:12], condition=torch.zeros(12, 1))
    model.fit(zoo()[:12])
    with pytest.raises(ValueError, match=r"shape \[1, 60\]: expected \[vectors, 120\]"):
        model.decode(torch.zeros(1, 10, 6))
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.decode(torch.full((1, 20, 6), math.nan))


def test_sizes_by_name_are_settings():
    for sizes in SANE.SIZES.values():
        assert dataclasses.asdict(SANE(SHAPES, progress=False, **sizes).settings).items() >= sizes.items()
