"""Training steps with the optimizer of `training.optimizer`, fused where it can be, against PyTorch's plain form of the same.

    python tests/benchmarks/bench_training.py

Milliseconds of processor time per step on one thread, both sides alternately, the best of three times `STEPS`; random inputs.
"""

import time

import torch
from torch import nn

from pdiff_lib import networks
from pdiff_lib.base import training
from pdiff_lib.generators import autoencoder, denoiser

STEPS, REPEATS = 10, 3
# name: network, input, what is done with both
CASES = {
    "resnet18, 50 x 32 px": (lambda: networks.create("resnet18", 10, 1, 32), (50, 1, 32, 32), nn.Module.__call__),
    "convnet-mini, 50 x 64 px": (lambda: networks.create("convnet-mini", 10, 3, 64), (50, 3, 64, 64), nn.Module.__call__),
    "vit-mini, 50 x 64 px": (lambda: networks.create("vit-mini", 10, 3, 64), (50, 3, 64, 64), nn.Module.__call__),
    "MLP of 8 x 256, 128": (lambda: nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(256, 256), nn.SiLU())]), (128, 256), nn.Module.__call__),
    "autoencoder, 32 x 2,048": (lambda: autoencoder.Autoencoder(2048, 64, (16, 32, 64, 64, 16)), (32, 2048), lambda net, x: net.decode(net.encode(x))),
    "denoiser, 64 x 64": (lambda: denoiser.Denoiser(64, (16, 32, 64, 32, 16)), (64, 64), lambda net, x: net(x, torch.zeros(len(x), dtype=torch.long))),
}


def milliseconds(output, optimizer, steps=STEPS):
    start = time.process_time()
    for _ in range(steps):
        loss = output().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return 1e3 * (time.process_time() - start) / steps


def main():
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, AdamW")
    print(f"{'network':28}{'numbers':>12}{'plain ms':>10}{'ours ms':>10}{'ratio':>8}")
    for name, (make, shape, run) in CASES.items():
        net, x = make().train(), torch.randn(shape)
        sides = (training.OPTIMIZERS["adamw"](net.parameters(), lr=1e-5, weight_decay=0.0, fused=False),
                 training.optimizer("adamw", net.parameters(), 1e-5))
        for side in sides:
            milliseconds(lambda: run(net, x), side, steps=1)  # makes AdamW's moments
        plain, ours = (min(times) for times in zip(*[[milliseconds(lambda: run(net, x), side) for side in sides] for _ in range(REPEATS)]))
        print(f"{name:28}{sum(p.numel() for p in net.parameters()):>12,}{plain:>10.1f}{ours:>10.1f}{plain / ours:>7.2f}x", flush=True)


if __name__ == "__main__":
    main()
