"""Canonical order of 8,192 networks (64-10-10, ReLU) at once against one network after the other.

    python tests/benchmarks/bench_symmetry.py

1,024 networks trained on scikit-learn's digits, each in 8 random orders and scales of its hidden units: all 8 must come out the
same. One by one, the same work (balance, then `align` to the reference of each of the three rounds, which it is given) is done for
64 networks and scaled to all of them: each costs the same. Processor time on one thread.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from pdiff_lib.networks import canonical, subset, symmetry

NETWORKS, ORDERS, TIMED, ROUNDS, STEPS = 1024, 8, 64, 3, 100


def trained(sub, count, generator):
    """Networks trained together, all of them in each matrix product."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[:900] / 16).float(), torch.tensor(digits.target[:900])
    theta = (0.25 * torch.rand(count, sub.numel, generator=generator) - 0.125).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.02)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (64,), generator=generator)
        w1, b1, w2, b2 = (p.view(count, *shape) for p, shape in zip(theta.split(sub.sizes, 1), sub.shapes))
        hidden = torch.baddbmm(b1[:, None], x[batch].expand(count, -1, -1), w1.mT).relu()
        scores = torch.baddbmm(b2[:, None], hidden, w2.mT)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores.flatten(0, 1), y[batch].repeat(count), reduction="sum").backward()
        optimizer.step()
    return theta.detach()


def seconds(call):
    start = time.process_time()
    return call(), time.process_time() - start


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    net.input_shape = (64,)
    sub = subset.select(net, "all")
    groups, scalings = symmetry.groups(net, sub), symmetry.scalings(net, sub)
    theta = trained(sub, NETWORKS, generator).repeat(ORDERS, 1)
    theta = symmetry.permute(theta, groups, symmetry.random(groups, len(theta), generator))
    for scaling in scalings:
        theta = canonical.scaled(theta, scaling, torch.randn(len(theta), len(scaling[0]), generator=generator).exp())

    canonical.canonical(theta[:64], groups, scalings)  # warm-up
    runs = [seconds(lambda: canonical.canonical(theta, groups, scalings, rounds=ROUNDS)) for _ in range(3)]
    found, ours = runs[0][0], sorted(run[1] for run in runs)[1]
    balanced = canonical.balance(theta, scalings)
    references = [canonical.centre(balanced, groups, rounds=r) for r in range(1, ROUNDS + 1)]

    def one_by_one(vector):
        vector = canonical.balance(vector[None], scalings)
        for reference in references:
            vector = symmetry.align(vector, reference, groups)
        return vector[0]

    some = range(0, len(theta), len(theta) // TIMED)
    loop, plain = seconds(lambda: torch.stack([one_by_one(theta[i]) for i in some]))
    plain *= len(theta) / len(some)
    orders = found.view(ORDERS, NETWORKS, -1)
    print(f"torch {torch.__version__}, 1 thread; {len(theta)} networks of {sub.numel} numbers, {ROUNDS} rounds")
    print(f"one by one {plain:.1f} s (scaled from {len(some)} networks), ours {ours:.2f} s: {plain / ours:.1f}x")
    print(f"largest difference to one by one {(loop - found[list(some)]).abs().max():.1e}, between the orders of a network "
          f"{(orders - orders[0]).abs().max():.1e}, of numbers up to {found.abs().max():.1f}")


if __name__ == "__main__":
    main()
