"""Chamfer distances of 100 x 60 clouds of 2,048 points, and MMD, coverage and 1-NNA from them, against the plain loops.

Clouds: scikit-learn's digits as bodies, points drawn by brightness, anywhere within the pixel and within a fixed thickness. The loop
takes a pair of clouds at a time and all distances of their points by one matrix product (`distChamfer` of PointFlow's code, as in
PVD's and HyperDiffusion's); it is timed on 24 pairs spread over all, and scaled. The measures' loop goes shape by shape. Processor
times: the ratio holds on a busy machine, too.

Then the surface of a body on a grid of 48^3, by marching cubes, against a loop over the grid's edges, which finds the same vertices
(and no triangles yet).
"""

import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from pdiff_lib.measures import shapes
from pdiff_lib.networks import surfaces

GENERATED, REFERENCES, POINTS, DEPTH = 100, 60, 2048, 2.0
SIDE, LEVEL = 48, 0.5

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

ink = F.interpolate(torch.as_tensor(load_digits().images[:1, None]).float() / 16, size=(SIDE, SIDE), mode="bilinear")[0, 0]
body = ink[:, :, None] * (1 - torch.linspace(-1, 1, SIDE).abs())


def by_edges():
    values, places = body.tolist(), []
    for i in range(SIDE):
        for j in range(SIDE):
            for k in range(SIDE):
                a = values[i][j][k]
                for axis, (x, y, z) in enumerate(((i + 1, j, k), (i, j + 1, k), (i, j, k + 1))):
                    if x < SIDE and y < SIDE and z < SIDE and (a > LEVEL) != (values[x][y][z] > LEVEL):
                        place = [i, j, k]
                        place[axis] += (LEVEL - a) / (values[x][y][z] - a)
                        places.append(place)
    return (torch.tensor(places) + 0.5) * (2 / SIDE) - 1


found, told = zip(*(seconds(lambda: surfaces.marching_cubes(body, LEVEL)) for _ in range(5)))
want, looped = seconds(by_edges)
vertices = found[0][0]
off = float(torch.cdist(want.double(), vertices.double()).amin(dim=1).max())
print(f"surface of {SIDE}^3: loop over edges {1e3 * looped:.0f} ms for {len(want):,} vertices, marching cubes {1e3 * sorted(told)[2]:.1f} ms for "
      f"{len(vertices):,} and {len(found[0][1]):,} triangles: {looped / sorted(told)[2]:.0f}x; farthest of the loop's from the nearest {off:.1e}")
