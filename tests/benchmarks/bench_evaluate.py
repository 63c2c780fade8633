"""Evaluating many vectors: the frozen part once and the rest per vector, against one whole network per vector.

    python tests/benchmarks/bench_evaluate.py [network ...]

Both sides run in this process with the same threads, alternately, and count the median of their repeats. Our side is
the public call with everything in it (copying, capturing, the trial on one image). Random weights: time does not
depend on them. The second ratio is of processor time: on a machine that others use too, run with OMP_NUM_THREADS=1
and read that one. No ratio can exceed vectors / (1 + vectors * rest / whole).
"""

import statistics
import sys
import time
import warnings

import timm
import torch

from pdiff_lib.networks import capture, subset
from pdiff_lib.tasks import evaluate

IMAGES, SIZE = 64, 224
CASES = [("resnet18", 20, 12), ("vit_tiny_patch16_224", 20, 12), ("resnet50", 20, 20), ("resnet18", 200, 16)]
PLAIN = {"resnet18": 6, "vit_tiny_patch16_224": 6, "resnet50": 3}  # vectors that the plain side runs; then scaled


def plain(net, sub, theta, x):
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net, sub.unflatten(v), (x,)).argmax(-1) for v in theta])


def seconds(call):
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - wall, time.process_time() - processor, result


def main(wanted):
    warnings.simplefilter("ignore", FutureWarning)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {IMAGES} images of {SIZE} px, last_norms:2")
    heads = zip(("plain s", "ours s", "capture s", "ratio", "CPU", "target"), (10, 9, 11, 8, 8, 8))
    print(f"{'network':22}{'vectors':>8}" + "".join(f"{head:>{width}}" for head, width in heads) + "  agree")
    for name, vectors, target in CASES:
        if wanted and name not in wanted:
            continue
        generator = torch.Generator().manual_seed(0)
        net = timm.create_model(name, num_classes=10).eval()
        sub = subset.select(net, "last_norms:2")
        theta = sub.flatten(net) + 0.05 * torch.randn(vectors, sub.numel, generator=generator)
        x = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
        plain(net, sub, theta[:1], x)
        evaluate.predict(net, sub, theta[:2], x)
        run, repeats = PLAIN[name], 3 if vectors < 100 else 1
        both = [(seconds(lambda: plain(net, sub, theta[:run], x)),
                 seconds(lambda: evaluate.predict(net, sub, theta, x)),
                 seconds(lambda: capture.split(net, sub.names, x)))
                for _ in range(repeats)]
        theirs, ours, cutting = (statistics.median(t for t, *_ in side) for side in zip(*both))
        cpu_theirs, cpu_ours, _ = (statistics.median(t for _, t, _ in side) for side in zip(*both))
        scale = vectors / run
        agree = (both[0][0][2] == both[0][1][2][:run]).float().mean()
        note = f"  (plain: {run} vectors, scaled linearly)" if run < vectors else ""
        times = f"{theirs * scale:10.2f}{ours:9.2f}{cutting:11.2f}{theirs * scale / ours:7.1f}x"
        print(f"{name:22}{vectors:8}{times}{cpu_theirs * scale / cpu_ours:7.1f}x{target:7}x  {agree:.4f}{note}",
              flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
