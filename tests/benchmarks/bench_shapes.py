"""Chamfer distances of 100 x 60 clouds of 2,048 points, and MMD, coverage and 1-NNA from them, against the plain loops.

Clouds: scikit-learn's digits as bodies, points drawn by brightness, anywhere within the pixel and within a fixed thickness. The loop
takes a pair of clouds at a time and all distances of their points by one matrix product (`distChamfer` of PointFlow's code, as in
PVD's and HyperDiffusion's); it is timed on 24 pairs spread over all, and scaled. The measures' loop goes shape by shape. Processor
times: the ratio holds on a busy machine, too.
"""

import time

import torch
from sklearn.datasets import load_digits

from pdiff_lib.measures import shapes

GENERATED, REFERENCES, POINTS, DEPTH = 100, 60, 2048, 2.0

g = torch.Generator().manual_seed(0)
brightness = torch.as_tensor(load_digits().data[:GENERATED + REFERENCES])
pixel = torch.multinomial(brightness, POINTS, replacement=True, generator=g)
place = torch.stack([pixel % 8, pixel // 8], dim=2) + torch.rand(*pixel.shape, 2, generator=g)
clouds = torch.cat([place, DEPTH * torch.rand(*pixel.shape, 1, generator=g)], dim=2)
clouds = clouds / 4 - 1
generated, references = clouds[:GENERATED], clouds[GENERATED:]


def seconds(call):
    start = time.process_time()
    return call(), time.process_time() - start


def pair(a, b):
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return float(squares.amin(dim=1).mean() + squares.amin(dim=0).mean())


def ours():
    return shapes.minimum_matching_distance(between), shapes.coverage(between), shapes.one_nearest_neighbour(among, between, apart)


def by_loops():
    whole = torch.cat([torch.cat([among, between], dim=1), torch.cat([between.T, apart], dim=1)])
    mmd = sum(min(float(between[i, j]) for i in range(GENERATED)) for j in range(REFERENCES)) / REFERENCES
    covered = {min(range(REFERENCES), key=lambda j: float(between[i, j])) for i in range(GENERATED)}
    right = 0
    for i in range(len(whole)):
        nearest = min((j for j in range(len(whole)) if j != i), key=lambda j: float(whole[i, j]))
        right += (nearest < GENERATED) == (i < GENERATED)
    return mmd, len(covered) / REFERENCES, right / len(whole)


shapes.chamfer(generated[:2], references[:2])  # warm-up
between, tree = seconds(lambda: shapes.chamfer(generated, references))
some = [(i, j) for i in range(0, GENERATED, 17) for j in range(0, REFERENCES, 15)]
loop, plain = seconds(lambda: {(i, j): pair(generated[i], references[j]) for i, j in some})
plain *= GENERATED * REFERENCES / len(loop)
difference = max(abs(value - float(between[i, j])) for (i, j), value in loop.items())
print(f"Chamfer distances {GENERATED} x {REFERENCES} clouds of {POINTS} points: pair by pair {plain:.0f} s (scaled from {len(loop)} pairs), "
      f"ours {tree:.1f} s: {plain / tree:.1f}x; largest difference {difference:.1e}")

among, apart = (shapes.chamfer(c[:, ::16], c[:, ::16]) for c in (generated, references))  # 128 points of each are enough here
between = shapes.chamfer(generated[:, ::16], references[:, ::16])
found, told = zip(*(seconds(ours) for _ in range(5)))
want, looped = seconds(by_loops)
difference = max(abs(a - b) for a, b in zip(found[0], want))
print(f"MMD, COV and 1-NNA of {GENERATED} generated and {REFERENCES} references: loops {looped:.2f} s, ours {1e3 * sorted(told)[2]:.2f} ms: "
      f"{looped / sorted(told)[2]:.0f}x; largest difference {difference:.1e}")
