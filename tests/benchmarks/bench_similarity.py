"""IoU of wrong predictions, all pairs of 1,400 models over 10,000 images: matrix products against the double loop.

The loop is timed on 40 x 40 pairs spread over the models, and scaled to all pairs (it visits each pair once, at the same
cost): run whole, it would take most of an hour.
"""

import time

import torch

from pdiff_lib.measures import similarity

MODELS, IMAGES, TIMED = 1400, 10_000, 40

wrong = torch.rand(MODELS, IMAGES, generator=torch.Generator().manual_seed(0)) < 0.25
similarity.iou(wrong[:50], wrong[:50])  # warm-up
ours = []
for _ in range(3):
    start = time.perf_counter()
    all_pairs = similarity.iou(wrong, wrong)
    ours.append(time.perf_counter() - start)

some = range(0, MODELS, MODELS // TIMED)
start = time.perf_counter()
loop = {(i, j): float((wrong[i] & wrong[j]).sum() / (wrong[i] | wrong[j]).sum()) for i in some for j in some}
plain = (time.perf_counter() - start) * MODELS**2 / len(loop)

difference = max(abs(float(all_pairs[i, j]) - value) for (i, j), value in loop.items())
print(f"IoU {MODELS} x {MODELS} models, {IMAGES} images: double loop {plain:.1f} s (scaled from {len(loop)} pairs), "
      f"ours {sorted(ours)[1]:.2f} s: {plain / sorted(ours)[1]:.0f}x (target 200x); largest difference {difference:.1e}")
