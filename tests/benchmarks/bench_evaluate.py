"""Evaluating many vectors: the frozen part once and the rest per vector, against one whole network per vector.

    python tests/benchmarks/bench_evaluate.py [network ...]

Both sides run in this process with the same threads, alternately, and count the median of their repeats. Our side is
the public call with everything in it (copying, capturing, the trial on one image). Random weights: time does not
depend on them.
"""

import statistics
import sys
import time
import warnings

import timm
import torch

from pdiff_lib import evaluate, subset

IMAGES, SIZE, REPEATS = 64, 224, 3
CASES = [("resnet18", 20, 12), ("vit_tiny_patch16_224", 20, 12), ("resnet50", 20, 20), ("resnet18", 200, 16)]
PLAIN = {"resnet18": 20, "vit_tiny_patch16_224": 20, "resnet50": 5}  # vectors that the plain side runs; then scaled


def plain(net, sub, theta, x):
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net, sub.unflatten(v), (x,)).argmax(-1) for v in theta])


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main(wanted):
    warnings.simplefilter("ignore", FutureWarning)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {IMAGES} images of {SIZE} px, last_norms:2")
    print(f"{'network':22}{'vectors':>8}{'plain s':>10}{'ours s':>9}{'capture s':>11}{'ratio':>8}{'target':>8}  agree")
    for name, vectors, target in CASES:
        if wanted and name not in wanted:
            continue
        generator = torch.Generator().manual_seed(0)
        net = timm.create_model(name, num_classes=10).eval()
        sub = subset.select(net, "last_norms:2")
        theta = sub.flatten(net) + 0.05 * torch.randn(vectors, sub.numel, generator=generator)
        x = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
        plain(net, sub, theta[:1], x)
        evaluate.predict(net, sub, theta[:1], x)
        run = PLAIN[name]
        both = [(seconds(lambda: plain(net, sub, theta[:run], x)),
                 seconds(lambda: evaluate.predict(net, sub, theta, x)),
                 seconds(lambda: evaluate.split(net, sub.names, x)))
                for _ in range(REPEATS if vectors < 100 else 1)]
        theirs, ours, capture = (statistics.median(t for t, _ in side) for side in zip(*both))
        theirs *= vectors / run
        agree = (both[0][0][1] == both[0][1][1][:run]).float().mean()
        note = f" (plain: {run} vectors, scaled linearly)" if run < vectors else ""
        times = f"{theirs:10.2f}{ours:9.2f}{capture:11.2f}{theirs / ours:7.1f}x{target:7}x"
        print(f"{name:22}{vectors:8}{times}  {agree:.4f}{note}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
