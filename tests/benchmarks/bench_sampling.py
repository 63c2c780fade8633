"""Sampling 200 networks together against one by one (D = 2048, the quickstart's sizes, DDIM with 50 steps)."""

import time

import torch

from pdiff_lib.generators.pdiff import PDiff

TIMED = 10  # networks timed one by one, scaled to all

theta = torch.randn(60, 2048, generator=torch.Generator().manual_seed(0))
method = PDiff(ae_channels=(16, 32, 64, 64, 16), latent_dim=64, ae_steps=2, denoiser_channels=(16, 32, 64, 32, 16),
               diffusion_steps=2, sampler="ddim", sampling_steps=50, progress=False).fit(theta)
method.sample(2)  # warm-up
together, single = [], []
for _ in range(3):
    start = time.perf_counter()
    method.sample(200)
    together.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(TIMED):
        method.sample(1)
    single.append((time.perf_counter() - start) * 200 / TIMED)
ours, plain = sorted(together)[1], sorted(single)[1]
print(f"sampling 200 networks: one by one {plain:.1f} s (scaled from {TIMED}), together {ours:.2f} s: {plain / ours:.1f}x")
