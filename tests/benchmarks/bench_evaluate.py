"""Evaluating many vectors: the frozen part once and the rest per vector, where that pays; or one whole network per vector.

    python tests/benchmarks/bench_evaluate.py [network ...]

Both sides run in this process with the same threads, alternately, and count the best of their repeats in processor time: run
with OMP_NUM_THREADS=1 on a machine that others use too. Our side is the public call with everything in it (copying, the trial
on one image, capturing). The plain side runs at most 4 vectors, then scaled linearly. Random weights: time does not depend
on them. No ratio can exceed vectors / (1 + vectors * rest / whole).
"""

import sys
import time
import warnings

import torch

from pdiff_lib import networks
from pdiff_lib.networks import capture, subset
from pdiff_lib.tasks import evaluate

VECTORS = [2, 8, 50, 200]
CASES = [  # network, what is generated of it, pixels, images
    ("mobilenetv3_small_050", "last_norms:2", 224, 16), ("mobilenetv3_small_050", "last_norms:2", 64, 256),
    ("vit_tiny_patch16_224", "last_norms:2", 224, 8), ("resnet18", "last_norms:2", 64, 64), ("resnet18", "all", 32, 64),
    ("convnet-mini", "last_norms:2", 64, 16), ("convnet-mini", "last_norms:2", 64, 256), ("vit-mini", "all", 64, 128)]
PLAIN, REPEATS, LONG_ENOUGH = 4, 3, 0.5


def plain(net, sub, theta, x):
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net, sub.unflatten(v), (x,)).argmax(-1) for v in theta])


def seconds(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main(wanted):
    warnings.simplefilter("ignore", FutureWarning)
    captures, split = [], capture.split
    capture.split = lambda *how: captures.append(1) or split(*how)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, processor time")
    print(f"{'network':24}{'generated':14}{'pixels':>7}{'images':>7}{'vectors':>8}{'plain s':>9}{'ours s':>8}{'ratio':>8}"
          "  way       agree")
    for name, choice, size, images in CASES:
        if wanted and name not in wanted:
            continue
        generator, channels = torch.Generator().manual_seed(0), 1 if name.endswith("mini") else 3
        net = networks.create(name, 10, channels, size).eval()
        sub = subset.select(net, choice)
        x = torch.randn(images, channels, size, size, generator=generator)
        for vectors in VECTORS:
            centre, run = sub.flatten(net), min(vectors, PLAIN)
            theta = centre + 0.05 * torch.randn(vectors, sub.numel, generator=generator)
            captures.clear()
            once = seconds(lambda: plain(net, sub, theta[:run], x))[0]  # a warm-up, and how many repeats there is time for
            both = [(seconds(lambda: plain(net, sub, theta[:run], x)), seconds(lambda: evaluate.predict(net, sub, theta, x)))
                    for _ in range(1 + max(REPEATS if vectors <= 8 else 1, int(LONG_ENOUGH / once)))][1:]
            theirs, ours = (min(t for t, _ in side) for side in zip(*both))
            theirs *= vectors / run
            agree = (both[0][0][1] == both[0][1][1][:run]).float().mean()
            print(f"{name:24}{choice:14}{size:7}{images:7}{vectors:8}{theirs:9.3f}{ours:8.3f}{theirs / ours:7.2f}x"
                  f"  {'captured' if captures else 'whole':10}{agree:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
