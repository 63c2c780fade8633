"""gpt.py: tokens, scalars and pairs by hand, samplers with networks that know the answer, and real training paths of digits MLPs."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare, spearmanr
from sklearn.datasets import load_digits
from torch import nn

from device import DEVICE
from pdiff_lib.base import training
from pdiff_lib.base.runs import Store
from pdiff_lib.generators import gpt
from pdiff_lib.generators.gpt import GPT, Transformer
from pdiff_lib.generators.tokens import Tokens
from resumed import killed_and_resumed

SMALL = {"steps": 4, "batch": 8, "width": 8, "layers": 1, "heads": 2, "token_length": 3, "T": 20, "sampler": "ddpm",
         "sampling_steps": 0}
DIGITS = (640, 10, 100, 10)  # 64-10-10


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def made(**changes):
    return GPT((4, 3), progress=False, **{**SMALL, **changes})


def paths(r=6, s=5, d=7, seed=0):
    """[r s d] and losses [r s]: random walks."""
    return torch.randn(r, s, d, generator=seeded(seed)).cumsum(1), torch.rand(r, s, generator=seeded(seed + 1))


def rows(theta, loss):
    """The same as `fit` takes them."""
    r = torch.arange(len(theta)).float().repeat_interleave(theta.shape[1])
    return theta.flatten(0, 1), torch.stack([r, loss.flatten()], dim=1)


# ---------------------------------------------------------------- the network

def test_features_are_sines_cosines_and_the_scalar():
    found = gpt.features(torch.tensor([[0.3, 999.0], [-1.7, 0.0]]))
    assert found.shape == (2, 2, 257)
    for i, j, x in ((0, 0, 0.3), (0, 1, 999.0), (1, 0, -1.7), (1, 1, 0.0)):
        angles = [torch.tensor(x).item() * 2 ** (14 * k / 127) for k in range(128)]
        want = [*map(math.sin, angles), *map(math.cos, angles), x]
        assert found[i, j].tolist() == pytest.approx(want, abs=1e-6)


def random_net(sizes=(4, 3), length=3, width=8):
    """A network whose weights are all random, decoders and positions too."""
    with training.seeded(0):
        net = Transformer(Tokens.cut(sizes, length), width, 2, 2).eval()
        for p in net.parameters():
            nn.init.normal_(p, std=0.5)
    return net


def inputs(b=5, d=7):
    x, start = torch.randn(2, b, d, generator=seeded(1))
    start_loss, asked = torch.rand(2, b, generator=seeded(2))
    return x, torch.randint(1000, (b,), generator=seeded(3)), start, start_loss, asked


@torch.no_grad()
def test_the_sequence_has_each_token_encoded_by_its_own_weights_in_order():
    net, (x, t, start, start_loss, asked) = random_net(), inputs()
    seen = []
    net.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.blocks.register_forward_hook(lambda _, args, out: args[0])  # nothing in between: what is decoded is what was encoded
    found = net(x, t, start, start_loss, asked)
    cut = ((0, 3), (3, 4), (4, 7))  # tensors of 4 and 3 numbers in tokens of 3
    contents = [v[:, a:b] for v in (x, start) for a, b in cut]
    contents += [gpt.features(s[:, None].float())[:, 0] for s in (t, asked - start_loss, asked, start_loss)]
    weights = [*net.encoders, *net.scalars]
    want = [F.layer_norm(c @ w[:c.shape[1]], (8,), net.norm.weight, net.norm.bias) + p
            for c, w, p in zip(contents, weights, net.positions, strict=True)]
    torch.testing.assert_close(seen[0], torch.stack(want, dim=1), rtol=1e-4, atol=1e-4)
    answer = torch.cat([h @ w[:, :b - a] for h, w, (a, b) in zip(want[:3], net.decoders, cut, strict=True)], dim=1)
    torch.testing.assert_close(found, start + answer, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_are_told_apart_and_follow_their_weights():
    net, (x, t, start, *losses) = random_net((3, 3)), inputs(d=6)
    swapped = torch.tensor([3, 4, 5, 0, 1, 2])
    a, b = net(x, t, start, *losses), net(x[:, swapped], t, start[:, swapped], *losses)
    assert (b[:, swapped] - a).abs().max() > 0.1
    for weights, order in ((net.encoders, [1, 0, 3, 2]), (net.decoders, [1, 0]), (net.positions, [1, 0, 3, 2, 4, 5, 6, 7])):
        weights.copy_(weights[order])
    torch.testing.assert_close(net(x[:, swapped], t, start[:, swapped], *losses)[:, swapped], a, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_answer_depends_on_everything_that_is_given():
    net, given = random_net(), inputs()
    for i, other in enumerate((given[0] + 1, (given[1] + 1) % 1000, None, given[3] + 0.1, given[4] + 0.1)):
        if other is not None:
            changed = [*given[:i], other, *given[i + 1:]]
            assert (net(*changed) - net(*given)).abs().amax(dim=1).min() > 1e-4, i
    moved = net(*given[:2], given[2] + 1, *given[3:]) - 1  # beyond what is carried over
    assert (moved - net(*given)).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("sampler, steps", [("ddpm", 0), ("ddim", 5)])
def test_an_untrained_network_answers_with_the_start(sampler, steps):
    method = made(sampler=sampler, sampling_steps=steps).fit_paths(*paths())
    x, t, start, *losses = (x.to(DEVICE) for x in inputs())
    fresh = method._build().to(DEVICE).eval()
    assert torch.equal(fresh(x, t, start, *losses), start) and not torch.equal(method.net(x, t, start, *losses), start)
    method.net = fresh
    torch.testing.assert_close(method.step(start, *losses, seeded()), start, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- pairs, and orders of hidden units

def test_pairs_have_a_uniform_run_then_a_uniform_spacing_then_a_uniform_start():
    moments, n = torch.tensor([2, 6, 4]), 60_000
    run, first, later = gpt.pairs(moments, n, seeded())
    assert chisquare(run.bincount(minlength=3)).pvalue > 1e-3
    for r, s in enumerate(moments.tolist()):
        mine = run == r
        spacing = (later - first)[mine]
        counts = spacing.bincount(minlength=s)
        assert len(counts) == s and counts[0] == 0 and (s == 2 or chisquare(counts[1:]).pvalue > 1e-3)
        for k in range(1, s):
            starts = first[mine][spacing == k].bincount(minlength=s - k)
            assert len(starts) == s - k and (s - k == 1 or chisquare(starts).pvalue > 1e-3)


class Spy(nn.Module):
    """Keeps what it is asked, and answers with the start and a shift."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift, self.seen = shift, []

    def forward(self, x, t, start, start_loss, asked_loss):
        self.seen.append((start, start_loss, asked_loss))
        return start + self.shift


def test_training_pairs_are_an_earlier_and_a_later_moment_of_one_run():
    moments = {3: 2, -7: 5, 12: 4}  # runs of different lengths, under any numbers, in any order of rows
    table = torch.tensor([(r, m) for r, s in moments.items() for m in range(s)])
    order = torch.tensor([2, 0, 7, 3, 4, 8, 1, 9, 5, 10, 6])  # mixes runs, keeps each one's order of time
    table = table[order]
    for r, s in moments.items():
        assert table[table[:, 0] == r, 1].tolist() == list(range(s))
    theta = torch.cat([table, table, table[:, :1] ** 2, table], dim=1).float()
    condition = torch.stack([table[:, 0].float(), table[:, 0] + table[:, 1] / 10], dim=1)
    method, spy, found = made(batch=400), Spy(), set()
    method.fit(theta, condition=condition)
    loss = method._loss(spy, 0, seeded(5, DEVICE))
    ((start, start_loss, asked),) = spy.seen
    start, start_loss, asked = (start / method.scale).cpu(), start_loss.cpu(), asked.cpu()
    torch.testing.assert_close(start[:, 0] + start[:, 1] / 10, start_loss, rtol=1e-4, atol=1e-4)
    steps = ((asked - start_loss) * 10).round().int().tolist()
    for r, m, k in zip(start[:, 0].round().int().tolist(), start[:, 1].round().int().tolist(), steps):
        assert 0 <= m < m + k < moments[r]
        found.add((r, m, k))
    assert len(found) == sum(s * (s - 1) // 2 for s in moments.values())  # every pair there is
    # the answer was the start, so that what is left is the distance between the moments: 3 of 7 numbers hold them
    want = method.scale**2 * torch.tensor(steps).float().square().mean() * 3 / 7
    assert float(loss) == pytest.approx(float(want), rel=1e-3)


def two_layers():
    """A 3-5-4-2 MLP as a function of vectors of 54 numbers, and its groups: each unit's inputs, bias and outputs."""
    sizes, shapes = (15, 5, 20, 4, 8, 2), ((5, 3), (5,), (4, 5), (4,), (2, 4), (2,))
    at = [p.view(shape) for p, shape in zip(torch.arange(54).split(sizes), shapes)]
    groups = (torch.cat([at[0], at[1][:, None], at[2].T], dim=1), torch.cat([at[2], at[3][:, None], at[4].T], dim=1))

    def function(theta, x):
        w1, b1, w2, b2, w3, b3 = (p.view(shape) for p, shape in zip(theta.split(sizes), shapes))
        return F.linear(F.linear(F.linear(x, w1, b1).tanh(), w2, b2).tanh(), w3, b3)

    return function, groups


def test_orders_of_hidden_units_leave_the_functions_as_they_are():
    function, groups = two_layers()
    theta, x = torch.randn(6, 54, generator=seeded(1)), torch.randn(9, 3, generator=seeded(2))
    places = gpt.orders(groups, 54, 6, seeded(3))
    assert places.sort(dim=1).values.equal(torch.arange(54).expand(6, 54)) and len(places.unique(dim=0)) == 6
    moved = theta.gather(1, places)
    assert (moved != theta).float().mean() > 0.5
    for a, b in zip(theta, moved):
        torch.testing.assert_close(function(a, x), function(b, x))


def test_orders_are_uniform():
    places = gpt.orders((torch.tensor([[0], [2], [1]]),), 4, 12_000, seeded())
    counts = [int((places[:, :3] == torch.tensor(p)).all(dim=1).sum()) for p in itertools.permutations(range(3))]
    assert sum(counts) == 12_000 and (places[:, 3] == 3).all() and chisquare(counts).pvalue > 1e-3


def test_both_members_of_a_pair_are_in_the_same_order():
    _, groups = two_layers()
    theta = torch.randn(5, 1, 54, generator=seeded(1)) + torch.arange(2).view(1, 2, 1)  # the later moment: 1 more everywhere
    method = GPT((54,), progress=False, groups=groups, **SMALL).fit_paths(theta, torch.rand(5, 2, generator=seeded(2)))
    spy = Spy(method.scale)
    assert float(method._loss(spy, 0, seeded(3, DEVICE))) < 1e-9
    start = (spy.seen[0][0] / method.scale).cpu()
    distance = torch.cdist(start, theta[:, 0])
    assert distance.min() > 1  # none is as it came, each has the numbers of one that came
    assert torch.cdist(start.sort(dim=1).values, theta[:, 0].sort(dim=1).values).min(dim=1).values.max() < 1e-4


# ---------------------------------------------------------------- sampling

def test_parameters_are_scaled_by_one_number():
    theta, loss = paths()
    method = made().fit_paths(3 + 40 * theta, loss)
    assert float((method.scale * (3 + 40 * theta)).std()) == pytest.approx(0.538, rel=1e-4)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 0), ("ddpm", 7), ("ddim", 3)])
def test_a_network_that_knows_the_target_is_led_to_it(sampler, steps):
    method = made(T=1000, sampler=sampler, sampling_steps=steps).fit_paths(*paths())
    start, target = torch.randn(2, 6, 7, generator=seeded(1)).to(DEVICE)
    seen = []

    class Knows(nn.Module):
        def forward(self, x, t, *given):
            seen.append(given)
            return method.scale * target

    method.net, asked = Knows(), torch.rand(6, generator=seeded(2)).to(DEVICE)
    torch.testing.assert_close(method.step(start, 1.5, asked, seeded()), target, rtol=1e-3, atol=1e-3)
    assert len(seen) == (steps or 1000)
    for given in seen:
        for found, want in zip(given, (method.scale * start, torch.full_like(asked, 1.5), asked), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_the_exact_answer_for_a_gaussian_gives_its_mean_and_spread():
    method, mean, std = made(T=1000).fit_paths(*paths()), 0.4, 0.3
    bars = method.schedule.alpha_bar.float().to(DEVICE)

    class Exact(nn.Module):  # E[x0 | x_t] of N(start + mean, std^2), in scaled units
        def forward(self, x, t, start, start_loss, asked):
            bar, m = bars[t, None], start + mean
            return m + std**2 * bar.sqrt() / (bar * std**2 + 1 - bar) * (x - bar.sqrt() * m)

    method.net = Exact()
    start = torch.randn(1, 7, generator=seeded(1)).to(DEVICE)
    moved = method.scale * (method.step(start.expand(3000, -1), 1.0, 0.5, seeded(2)) - start)  # more than one pass
    assert moved.mean(dim=0).cpu().tolist() == pytest.approx([mean] * 7, abs=5 * std / 3000**0.5)
    assert float(moved.std()) == pytest.approx(std, rel=0.025)


def test_samples_are_decided_by_the_generator_and_training_by_its_seed():
    state = torch.get_rng_state()
    (theta, loss), start = paths(), torch.randn(4, 7, generator=seeded(9))
    fitted, again, other = (made(generator_seed=s, ema=0.5).fit_paths(theta, loss) for s in (0, 0, 1))
    a, b, c = (fitted.step(start, 1.0, 0.2, seeded(s)) for s in (1, 1, 2))
    assert a.shape == (4, 7) and a.dtype == torch.float32 and not a.requires_grad and not fitted.net.training
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(again.step(start, 1.0, 0.2, seeded(1)), a) and not torch.equal(other.step(start, 1.0, 0.2, seeded(1)), a)
    assert again.fingerprint == fitted.fingerprint != other.fingerprint and torch.equal(state, torch.get_rng_state())
    condition = torch.cat([start, torch.tensor([1.0, 0.2]).expand(4, 2)], dim=1)
    assert torch.equal(fitted.sample(4, seeded(1), condition), a)
    direct = made(ema=0.5).fit(*(lambda theta, condition: (theta, None, condition))(*rows(theta, loss)))
    assert direct.fingerprint == fitted.fingerprint


def test_recursion_steps_from_its_own_output_and_the_loss_measured_there():
    method, start = made().fit_paths(*paths()), torch.randn(3, 7, generator=seeded(4)).to(DEVICE)
    asked = torch.tensor([0.1, 0.2, 0.3])
    found = method.recurse(start, lambda theta: theta.square().mean(dim=1), asked, 3, seeded(6))
    g, theta = seeded(6), start
    for i in range(4):
        torch.testing.assert_close(found.theta[i], theta, rtol=0, atol=0)
        torch.testing.assert_close(found.loss[i], theta.square().mean(dim=1), rtol=0, atol=0)
        theta = method.step(theta, theta.square().mean(dim=1), asked, g)
    assert found.theta.shape == (4, 3, 7) and found.loss.shape == (4, 3)


# ---------------------------------------------------------------- real training paths

def outputs(theta, x):
    """[M n 10] of M digits MLPs at once."""
    w1, b1, w2, b2 = theta.split(DIGITS, dim=1)
    h = torch.baddbmm(b1[:, None], x.expand(len(theta), -1, -1), w1.unflatten(1, (10, 64)).mT).relu()
    return torch.baddbmm(b2[:, None], h, w2.unflatten(1, (10, 10)).mT)


def cross_entropy(theta, x, y):
    """[M]"""
    return F.cross_entropy(outputs(theta, x).flatten(0, 1), y.repeat(len(theta)), reduction="none").unflatten(0, (len(theta), -1)).mean(1)


@pytest.fixture(scope="module")
def digits():
    """Training paths [32 16 760] of MLPs 64-10-10, and a measure of losses on other images."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=seeded())
    x, y = (torch.tensor(data.data, dtype=torch.float32) / 16)[order], torch.tensor(data.target)[order]
    bound = torch.tensor([1 / 8] * 650 + [10**-0.5] * 110)
    g = seeded(1)
    theta = ((2 * torch.rand(32, 760, generator=g) - 1) * bound).requires_grad_()
    optimizer, kept = torch.optim.Adam([theta], 0.01), []
    for i in range(151):
        if i % 10 == 0:
            kept.append(theta.detach().clone())
        pick = torch.randint(900, (64,), generator=g)
        optimizer.zero_grad()
        cross_entropy(theta, x[pick], y[pick]).sum().backward()
        optimizer.step()
    return torch.stack(kept, dim=1), lambda theta: cross_entropy(theta.cpu(), x[900:], y[900:])


@pytest.fixture(scope="module")
def trained(digits):
    theta, loss_of = digits
    loss = loss_of(theta.flatten(0, 1)).unflatten(0, (32, 16))
    return GPT(DIGITS, progress=False, steps=400, batch=32, lr=2e-3, ema=0.98, width=64, layers=2).fit_paths(theta, loss), loss


def test_the_achieved_loss_follows_the_asked_one(digits, trained):
    """From initialisations it has seen: those of 32 runs say little about others."""
    (theta, loss_of), (method, loss) = digits, trained
    assert loss[:, 0].mean() > 2.2 and loss[:, -1].mean() < 0.5
    asked = torch.linspace(0.3, 2.1, 7).repeat(16)
    start, start_loss = theta[:16, 0].repeat_interleave(7, dim=0), loss[:16, 0].repeat_interleave(7)
    achieved = loss_of(method.step(start, start_loss, asked, seeded(3)))
    assert spearmanr(asked, achieved).statistic > 0.75  # .89 to .91 with three seeds
    by_asked = achieved.unflatten(0, (16, 7)).mean(dim=0)
    assert by_asked[0] < 1.3 and by_asked[-1] - by_asked[0] > 0.7
    assert method.losses[-50:].mean() < 0.45 * method.losses[:10].mean()


# ---------------------------------------------------------------- what is kept, and what is refused

def test_a_killed_training_resumes_to_the_bit(tmp_path, monkeypatch):
    def fit(store=None):
        groups = (torch.tensor([[0, 4], [1, 5], [2, 6]]),)
        return made(steps=9, ema=0.9, groups=groups).fit_paths(*paths(), store)

    want = fit()
    resumed, steps = killed_and_resumed(lambda: fit(Store(tmp_path)), monkeypatch, at=4)
    assert steps == [4, 5, 6, 7, 8] and torch.equal(resumed.losses, want.losses)
    for name, tensor in want.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], tensor), name


@pytest.mark.parametrize("change, trainings", [
    ({"sampler": "ddim"}, 1), ({"sampling_steps": 5}, 1), ({"width": 10}, 2), ({"ema": 0.5}, 2),
    ({"groups": (torch.tensor([[0], [1]]),)}, 2)], ids=str)
def test_only_what_changes_the_network_trains_anew(tmp_path, change, trainings):
    for changes in ({}, change):
        made(**changes).fit_paths(*paths(), Store(tmp_path))
    theta, loss = paths()
    assert len(list((tmp_path / "GPT").glob("*.safetensors"))) == trainings
    made().fit_paths(theta, loss + 0.1, Store(tmp_path))  # losses are part of what is learned
    assert len(list((tmp_path / "GPT").glob("*.safetensors"))) == trainings + 1


@pytest.mark.parametrize("settings, message", [
    ({"depth": 3}, "unknown setting 'depth'"), ({"layers": 0}, "layers is 0: expected at least 1"),
    ({"width": 9}, "width is 9 with 2 heads: expected a multiple"), ({"sampling_steps": 21}, "21 sampling steps: expected at most T=20"),
    ({"sampler": "heun"}, "sampler is 'heun': expected one of")])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_what_are_no_paths_is_refused_before_training(unchecked, monkeypatch):
    monkeypatch.setattr(training, "loop", None)
    theta, condition = rows(*paths())
    bad = [(None, r"condition is None: expected \[30, 2\]"), (condition[:, :1], r"condition is \[30, 1\]: expected \[30, 2\]"),
           (condition + 0.5, "expected whole numbers"), (condition * 1e8, "expected whole numbers"),
           (condition.where(torch.arange(30)[:, None] != 29, torch.tensor([9.0, 0.1])), "run 9 has 1 moment: expected at least two"),
           (condition[:-1], "the condition has 29 rows"), (condition / torch.tensor([1.0, 0.0]), "NaN")]
    for given, message in bad:
        with pytest.raises(ValueError, match=message):
            made().fit(theta, condition=given)
    for group in (torch.tensor([[0, 7]]), torch.tensor([[-1]]), torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="expected places from 0 to 6, each at most once"):
            made(groups=(group,)).fit(theta, condition=condition)
    with pytest.raises(ValueError, match=r"theta \[6, 5, 7\] and loss \[6, 4\]: expected \[R S D\] and \[R S\]"):
        made().fit_paths(paths()[0], paths(s=4)[1])


def test_what_cannot_be_a_step_is_refused(unchecked):
    start = torch.zeros(3, 7)
    with pytest.raises(ValueError, match="call fit"):
        made().step(start, 1.0, 0.5)
    method = made().fit_paths(*paths())
    for given in (None, torch.zeros(3, 7), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match=r"expected \[3, 9\], parameters to start from"):
            method.sample(3, condition=given)
    for losses, message in [((torch.zeros(2), 0.5), r"start_loss has shape \[2\].*expected \[3\]"),
                            ((1.0, float("nan")), "asked_loss.*1 of them NaN"), ((1.0, torch.full((3,), torch.inf)), "3 of them NaN")]:
        with pytest.raises(ValueError, match=message):
            method.step(start, *losses)
    with pytest.raises(ValueError, match=r"theta has shape \[3, 6\]: expected \[vectors, 7\]"):
        method.step(torch.zeros(3, 6), 1.0, 0.5)
    with pytest.raises(ValueError, match="times is 0: expected at least 1"):
        method.recurse(start, lambda theta: theta.sum(1), 0.5, 0)
    for measured in (lambda theta: theta.sum(), lambda theta: theta.sum(1) * torch.nan):
        with pytest.raises(ValueError, match="what loss_of gave"):
            method.recurse(start, measured, 0.5, 1)
