"""flow.py: its solvers against a Gaussian whose velocity is known, what a trained flow recovers, what is kept, and real networks."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from device import DEVICE
from pdiff_lib.base import runs, training
from pdiff_lib.base.runs import Store
from pdiff_lib.generators.coded import PCA, Coded
from pdiff_lib.generators.flow import SOLVERS, Flow, VelocityMLP
from pdiff_lib.measures import similarity

SMALL = {"width": 16, "blocks": 1, "steps": 6, "batch": 8, "solver_steps": 4, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(k=40, d=12, seed=0):
    """Vectors around a mean of their own, half of the numbers a hundred times as large as the others."""
    g = seeded(seed)
    scale = torch.cat([torch.full((d // 2,), 0.05), torch.full((d - d // 2,), 5.0)])
    return scale * (torch.randn(d, generator=g) + torch.randn(k, d, generator=g))


# ---------------------------------------------------------------- solvers

class GaussianVelocity:
    """E[x1 - x0 | x_t] between N(0, a^2) and N(m, s^2): x_t and x1 - x0 are jointly Gaussian, of covariance t s^2 - (1 - t) a^2.
    Its flow leads from x0 to m + s / a x0, as it keeps the order of the numbers."""

    def __init__(self, mean: float, std: float, source: float):
        self.mean, self.std, self.source = mean, std, source

    def __call__(self, x, t):
        t = t.unsqueeze(1)
        variance = (1 - t) ** 2 * self.source**2 + t**2 * self.std**2
        return self.mean + (t * self.std**2 - (1 - t) * self.source**2) / variance * (x - t * self.mean)

    def end(self, x):
        return self.mean + self.std / self.source * x


@pytest.mark.parametrize("mean, std, source", [(1.5, 0.4, 1.0), (-3.0, 2.5, 0.5)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_exact_velocity_of_a_gaussian_gives_the_gaussian(solver, mean, std, source):
    n = 5000
    velocity, x = GaussianVelocity(mean, std, source), source * torch.randn(n, 1, generator=seeded(), dtype=torch.float64)
    steps, bound = {"euler": (1000, 0.01), "midpoint": (100, 1e-5), "rk4": (50, 1e-6)}[solver]
    end = SOLVERS[solver](velocity, x, steps)
    assert float((end - velocity.end(x)).abs().max()) < bound * std
    assert float(end.mean()) == pytest.approx(mean, abs=std * (5 / n**0.5 + bound))
    assert float(end.std()) == pytest.approx(std, rel=5 / (2 * n) ** 0.5 + bound)


def squared(x, t):
    """Leads from x to 1 / (1 / x - t)."""
    return x.square()


# Between Gaussians sigma_t^3 times its second derivative is constant, which takes the leading term from the midpoint's error.
@pytest.mark.parametrize("velocity, end, orders", [
    (GaussianVelocity(2.0, 0.5, 1.0), GaussianVelocity(2.0, 0.5, 1.0).end, {"euler": 1, "midpoint": 3, "rk4": 4}),
    (squared, lambda x: 1 / (1 / x - 1), {"euler": 1, "midpoint": 2, "rk4": 4})], ids=["gaussian", "squared"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_falls_with_the_order_of_the_solver(solver, velocity, end, orders):
    x = torch.linspace(-2.1, 0.5, 9, dtype=torch.float64)[:, None]
    errors = [float((SOLVERS[solver](velocity, x, steps) - end(x)).norm()) for steps in (64, 128, 256)]
    assert [math.log2(a / b) for a, b in zip(errors, errors[1:])] == pytest.approx([orders[solver]] * 2, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_say_what_they_see_and_never_leave_the_interval(solver):
    times, remaining, seen = [], [], []

    def velocity(x, t):
        times.extend(t.tolist())
        return 3 * t.unsqueeze(1) ** 2 + 0 * x

    x = torch.zeros(2, 3, requires_grad=True)
    end = SOLVERS[solver](velocity, x, 5, lambda left, x: (remaining.append(left), seen.append(x)))
    assert remaining == [4, 3, 2, 1, 0] and torch.equal(seen[-1], end) and not end.requires_grad
    assert min(times) == 0 and max(times) == pytest.approx({"euler": 0.8, "midpoint": 0.9, "rk4": 1.0}[solver])
    assert float(end[0, 0]) == pytest.approx({"euler": 0.72, "midpoint": 0.99, "rk4": 1.0}[solver])  # of the sums by hand, x = t^3
    with pytest.raises(ValueError, match="0 solver steps: expected at least 1"):
        SOLVERS[solver](velocity, x, 0)


# ---------------------------------------------------------------- what it learns

@pytest.mark.parametrize("d", [2, 8])
def test_a_gaussian_is_recovered(d):
    """Mean and covariance of what is generated against those of what was learned from, whitened by the latter; the flow of a Gaussian
    is linear, so that noise of half the std gives half the std."""
    g = seeded(d)
    mix = torch.eye(d) + 0.5 * torch.randn(d, d, generator=g) / d**0.5
    theta = torch.randn(4000, d, generator=g) @ mix.T + 5 * torch.randn(d, generator=g)
    f = Flow(device=DEVICE, width=64, blocks=1, steps=500, lr=1e-2, solver_steps=20, progress=False).fit(theta)
    n, learned = 4000, theta.double()
    root = torch.linalg.cholesky(torch.cov(learned.T))
    for temperature in (1.0, 0.5):
        f.settings = dataclasses.replace(f.settings, temperature=temperature)
        x = f.sample(n, seeded(1)).double().cpu()
        white = torch.linalg.solve_triangular(root, (x - learned.mean(0)).T, upper=False) / temperature
        # Five standard errors of n draws, and a tenth for a short training of a small network.
        assert white.mean(1).abs().max() < 5 / n**0.5 + 0.1 / temperature
        assert (torch.cov(white) - torch.eye(d)).abs().max() < 5 * (2 / n) ** 0.5 + 0.1


def test_the_loss_is_the_squared_error_of_the_straight_velocity():
    theta, f = drawn(), Flow((6, 6), **SMALL).fit(drawn())
    v = f._standardiser(theta.to(f.device))
    g = torch.Generator(f.device).manual_seed(5)
    loss = f._loss(f.net, 0, g)
    g.manual_seed(5)
    x0, x1 = f._pairs(g)
    t = torch.rand(8, device=f.device, generator=g)
    want = [(f.net(((1 - s) * a + s * b)[None], s[None])[0] - (b - a)).square().sum() / 12 for a, b, s in zip(x0, x1, t)]
    assert float(loss) == pytest.approx(float(sum(want)) / 8, rel=1e-5)
    assert (x1[:, None] == v).all(2).any(1).all()  # the vectors, standardised


def test_the_mean_vector_is_taken_and_each_tensor_has_std_one():
    f = Flow((6, 6), **SMALL).fit(drawn())
    assert f._x1.mean(0).abs().max() < 1e-4
    assert [float(p.square().mean().sqrt()) for p in f._x1.split(6, dim=1)] == pytest.approx([1, 1], rel=1e-4)
    assert torch.equal(Flow((6, 6), standardise=False, **SMALL).fit(drawn())._x1.cpu(), drawn())


def test_in_narrow_networks_the_source_does_not_stay_in_the_samples():
    """Vectors of 100 numbers in one direction, and a network four wide."""
    theta = torch.randn(500, 1, generator=seeded()) * torch.randn(1, 100, generator=seeded(1))
    f = Flow(width=4, blocks=1, steps=400, lr=1e-2, solver_steps=20, progress=False).fit(theta)
    assert float((f.sample(200, seeded()).cpu() - theta.mean(0)).square().mean() / theta.var()) < 1.5  # 2 with the source in it
    closed = VelocityMLP(100, 4, 1).double()
    torch.nn.init.zeros_(closed.gate.weight), torch.nn.init.zeros_(closed.gate.bias)
    answers = closed(torch.randn(300, 100, generator=seeded(), dtype=torch.float64), torch.full((300,), 0.5, dtype=torch.float64))
    assert torch.linalg.matrix_rank(answers - answers.mean(0)) == 4 < torch.linalg.matrix_rank(
        VelocityMLP(100, 4, 1).double()(torch.randn(300, 100, generator=seeded(), dtype=torch.float64), torch.full((300,), 0.5).double()))


# ---------------------------------------------------------------- couplings

def pairs(coupling, seed=0, visits=60):
    """The noise that each vector was paired with, by vector, over some steps."""
    f = Flow((6, 6), coupling=coupling, generator_seed=seed, source_std=2.0, **SMALL).fit(drawn(k=5))
    found, g = {}, torch.Generator(f.device)
    for i in range(visits):
        x0, x1 = f._pairs(g.manual_seed(i))
        for own, v in zip(x0, x1):
            found.setdefault(int(torch.cdist(v[None], f._x1).argmin()), []).append(tuple(own.tolist()))
    return found


def test_fixed_noise_is_the_same_at_each_visit():
    found, again, other = pairs("fixed"), pairs("fixed"), pairs("fixed", seed=1)
    assert all(len(set(noise)) == 1 < len(noise) for noise in found.values())
    assert len({noise[0] for noise in found.values()}) == 5 and found == again != other


def test_fresh_noise_never_comes_twice_and_pooled_noise_comes_to_all():
    fresh = [noise for own in pairs("fresh").values() for noise in own]
    assert len(set(fresh)) == len(fresh) == 480
    assert float(torch.tensor(fresh).std()) == pytest.approx(2.0, rel=0.05)
    pool = pairs("pool")
    assert {len(set(noise)) for noise in pool.values()} == {5} and len({noise for own in pool.values() for noise in own}) == 5


# ---------------------------------------------------------------- what is kept

class Stop(Exception):
    """The end of a process, as far as the loop can tell."""


@pytest.mark.parametrize("changes", [{}, {"coupling": "fixed", "ema": 0.9}], ids=str)
def test_a_killed_fit_resumes_to_the_bit(tmp_path, monkeypatch, changes):
    made = {**SMALL, **changes}
    whole = Flow((6, 6), **made).fit(drawn())
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)  # after every step
    plain, steps = Flow._loss, []

    def stopping(self, net, step, g):
        steps.append(step)
        if step == 3 and len(steps) == 4:
            raise Stop
        return plain(self, net, step, g)

    monkeypatch.setattr(Flow, "_loss", stopping)
    with pytest.raises(Stop):
        Flow((6, 6), **made).fit(drawn(), Store(tmp_path))
    resumed = Flow((6, 6), **made).fit(drawn(), Store(tmp_path))
    assert steps == [0, 1, 2, 3, 3, 4, 5] and torch.equal(resumed.losses, whole.losses)
    assert torch.equal(resumed.sample(5, seeded()), whole.sample(5, seeded())) and resumed.fingerprint == whole.fingerprint


def test_solvers_train_nothing_anew_and_all_else_does(tmp_path, monkeypatch):
    trained, loop = [], training.loop
    monkeypatch.setattr(training, "loop", lambda *args, **kwargs: (trained.append(1), loop(*args, **kwargs))[1])
    first = Flow((6, 6), **SMALL).fit(drawn(), Store(tmp_path))
    for changes, again in (({"solver": "rk4"}, 0), ({"solver_steps": 9}, 0), ({"temperature": 0.5}, 0), ({"coupling": "fixed"}, 1), ({"source_std": 0.5}, 1),
                           ({"standardise": False}, 1), ({"width": 8}, 1)):
        trained.clear()
        other = Flow((6, 6), **{**SMALL, **changes}).fit(drawn(), Store(tmp_path))
        assert len(trained) == again and other.fingerprint != first.fingerprint, changes
        assert not torch.equal(other.sample(3, seeded()), first.sample(3, seeded())), changes


def test_vectors_of_another_scale_are_no_other_training_but_other_samples():
    """Powers of two change no bit of the standardised vectors."""
    one, four = (Flow((6, 6), **SMALL).fit(scale * drawn()) for scale in (1, 4))
    assert torch.equal(one.losses, four.losses) and one.fingerprint != four.fingerprint
    torch.testing.assert_close(four.sample(3, seeded()), 4 * one.sample(3, seeded()))


# ---------------------------------------------------------------- the border

def test_samples_are_decided_by_the_generator_and_lie_on_the_device():
    f, state = Flow((6, 6), device=DEVICE, **SMALL).fit(drawn()), torch.get_rng_state()
    a, b, c = (f.sample(4, seeded(s)) for s in (1, 1, 2))
    assert a.shape == (4, 12) and a.dtype == torch.float32 and a.device.type == torch.device(DEVICE).type and not a.requires_grad
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)


def test_the_trajectory_leads_from_the_source_to_the_sample():
    f = Flow((6, 6), source_std=0.3, **SMALL).fit(drawn())
    way = f.trajectory(3, 5, seeded(2))
    assert way.t == [0, 0.25, 0.5, 0.75, 1] and way.theta.shape == (5, 3, 12)
    start = f._standardiser(way.theta[0]).cpu()
    torch.testing.assert_close(start, 0.3 * torch.randn(3, 12, generator=seeded(2)), rtol=1e-3, atol=1e-4)
    assert torch.equal(way.theta[-1], f.sample(3, seeded(2)))
    assert f.trajectory(2, 2).t == [0, 1]


def test_what_is_not_finite_is_not_given():
    f = Flow((6, 6), **SMALL).fit(drawn())
    f.net.leave.bias.data[3] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity in 4 of 4 vectors"):
        f.sample(4)


@pytest.mark.parametrize("settings, message", [
    ({"solver": "heun"}, "solver is 'heun': expected one of 'euler', 'midpoint', 'rk4'"),
    ({"coupling": "optimal"}, "coupling is 'optimal': expected one of 'fresh', 'pool', 'fixed'"),
    ({"source_std": 0.0}, "source_std is 0.0: expected at least 1e-06"), ({"solver_steps": 0}, "solver_steps is 0: expected at least 1"),
    ({"temperature": -1.0}, "temperature is -1.0: expected at least 0")])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Flow(**settings)


def test_use_before_fit_is_refused_and_so_is_a_condition():
    for use in (Flow().sample, Flow().trajectory):
        with pytest.raises(ValueError, match="this Flow has not seen any vectors: call fit"):
            use(3)
    with pytest.raises(ValueError, match="Flow takes no condition"):
        Flow(**SMALL).fit(drawn(), condition=torch.zeros(40, 1))


def test_the_authors_settings_are_settings():
    s = Flow(**Flow.SIZES["DeepWeightFlow"]).settings
    assert (s.steps, s.batch, s.width, s.source_std, s.solver, s.solver_steps) == (30_000, 8, 512, 0.01, "rk4", 100)


# ---------------------------------------------------------------- real networks

def digits(k=48, steps=120, hidden=10):
    """MLPs 64-10-10 trained on scikit-learn's digits, all at once; and the accuracy of such vectors on digits they have not seen."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order, g = torch.randperm(len(x), generator=seeded()), seeded(1)
    x, y, sizes = x[order], y[order], (64 * hidden, hidden, 10 * hidden, 10)
    theta = torch.cat([(2 * torch.rand(k, size, generator=g) - 1) * bound for size, bound in zip(sizes, (0.125, 0.125, 0.3, 0.3))], dim=1)
    theta.requires_grad_()

    def logits(theta, x):
        a, b, c, d = theta.split(sizes, dim=1)
        h = (x @ a.unflatten(1, (hidden, 64)).mT + b[:, None]).relu()
        return h @ c.unflatten(1, (10, hidden)).mT + d[:, None]

    optimizer = torch.optim.Adam([theta], 1e-2)
    for _ in range(steps):
        pick = torch.randint(900, (64,), generator=g)
        loss = F.cross_entropy(logits(theta, x[pick]).flatten(0, 1), y[pick].repeat(k), reduction="sum") / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach(), lambda theta: float((logits(theta.cpu(), x[900:]).argmax(-1) == y[900:]).float().mean())


def test_in_pca_coordinates_it_generates_networks_that_work():
    theta, accuracy = digits()
    coded = Coded(Flow(width=128, blocks=2, steps=500, lr=3e-3, solver_steps=20, progress=False, device=DEVICE), PCA(47)).fit(theta)
    samples = coded.sample(100, seeded())
    assert samples.shape == (100, 760) and similarity.outside_span(samples.cpu(), theta).max() < 1e-3
    spread = float(samples.std(0).mean() / theta.std(0).mean())
    # Each number as in the originals, without what they have to do with each other.
    shuffled = torch.stack([theta[torch.randperm(len(theta), generator=seeded(i)), i] for i in range(760)], dim=1)
    assert 0.7 < spread < 1.2 and accuracy(theta) > 0.85 and accuracy(samples) > 0.6 > 0.2 > accuracy(shuffled)
