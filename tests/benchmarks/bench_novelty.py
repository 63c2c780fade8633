"""Matched distances of 300 networks 64-10-10 (D = 760) to the nearest of 8,192: lower bounds first against the double loop.

Trained networks: 512 on scikit-learn's digits; each original is one of them with 10 % of noise and its hidden units in a random
order, each of the 300 is midway between two of them. The loop solves an assignment per pair; it is timed on some 1,200 pairs spread
over all, and scaled (each pair costs it the same). Processor times: the ratio holds on a busy machine, too.
"""

import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import nn

from pdiff_lib.measures import novelty
from pdiff_lib.networks import subset, symmetry

GENERATED, ORIGINALS, TRAINED, STEPS = 300, 8192, 512, 60

g = torch.Generator().manual_seed(0)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = (x / 16).float()
net = [((2 * torch.rand(TRAINED, *shape, generator=g) - 1) / 8).requires_grad_() for shape in ((10, 64), (1, 10), (10, 10), (1, 10))]
optimizer = torch.optim.Adam(net, 1e-2)
for _ in range(STEPS):
    batch = torch.randint(len(x), (TRAINED, 32), generator=g)
    out = (x[batch] @ net[0].mT + net[1]).relu() @ net[2].mT + net[3]
    optimizer.zero_grad()
    nn.functional.cross_entropy(out.flatten(0, 1), y[batch].flatten(), reduction="sum").backward()
    optimizer.step()
trained = torch.cat([p.detach().flatten(1) for p in net], dim=1)
layers = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
layers.input_shape = (64,)
groups = symmetry.groups(layers, subset.select(layers, "all"))
originals = trained.repeat(ORIGINALS // TRAINED, 1)
originals = originals + 0.1 * originals.std() * torch.randn(originals.shape, generator=g)
originals = symmetry.permute(originals, groups, symmetry.random(groups, ORIGINALS, g))
theta = (trained[:GENERATED] + trained[-GENERATED:]) / 2

novelty.matched_distances(theta[:4], originals[:100], groups)  # warm-up
ours = []
for _ in range(3):
    start = time.process_time()
    distance, nearest = novelty.matched_distances(theta, originals, groups)
    ours.append(time.process_time() - start)

rows, columns = range(0, GENERATED, GENERATED // 30), range(0, ORIGINALS, ORIGINALS // 40)
units, rest = groups[0].numpy(), np.setdiff1d(np.arange(theta.shape[1]), groups[0].numpy())
a, b, loop = theta.double().numpy(), originals.double().numpy(), {}


def pair(i, j):
    gain = a[i][units] @ b[j][units].T
    found = linear_sum_assignment(gain, maximize=True)
    fixed = (a[i][units] ** 2).sum() + (b[j][units] ** 2).sum() + ((a[i][rest] - b[j][rest]) ** 2).sum()
    return np.sqrt(fixed - 2 * gain[found].sum())


start = time.process_time()
for i in rows:
    for j in columns:
        loop[i, j] = pair(i, j)
plain = (time.process_time() - start) * GENERATED * ORIGINALS / len(loop)
nearer = sum(value < float(distance[i]) - 1e-5 for (i, j), value in loop.items())
difference = max(abs(pair(i, int(nearest[i])) - float(distance[i])) for i in range(GENERATED))
print(f"matched distances {GENERATED} x {ORIGINALS} networks, D = {theta.shape[1]}, 10 units: double loop {plain:.0f} s (scaled from "
      f"{len(loop)} pairs), ours {sorted(ours)[1]:.1f} s: {plain / sorted(ours)[1]:.1f}x; nearer ones that were missed {nearer}, "
      f"largest difference {difference:.1e}")
