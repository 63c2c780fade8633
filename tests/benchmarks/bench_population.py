"""A population trained together against one network after the other (`zoo.train`), in milliseconds per network and step.

    python tests/benchmarks/bench_population.py [network ...]

Processor time on one thread, so that other work on the machine counts as little as possible; both sides have the same
augmented batches, and end at the same networks. "vmap": all networks in one vmap whatever the device (on a CPU, `train`
does that only where there are no convolutions).
"""

import dataclasses
import sys
import time

import torch

from pdiff_lib import networks, zoo
from pdiff_lib.tasks import data
from pdiff_lib.zoos import population

NETWORKS, STEPS = 16, 3
CASES = [("hyperrep-cnn", 32, 128), ("hyperrep-cnn", 32, 32), ("mlp-mini", 64, 128), ("mlp-mini", 64, 32),
         ("convnet-mini", 64, 32)]


def milliseconds(call, count):
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start) / count / STEPS


def compare(name, side, batch):
    """Milliseconds per network and step: one by one, together, in one vmap."""
    images = data.load("digits", size=side, channels=3)
    images = dataclasses.replace(images, x_train=images.x_train[:batch * STEPS], y_train=images.y_train[:batch * STEPS])
    how = {"network": name, "base_epochs": 1, "base_batch": batch, "flip": False, "progress": False, "device": "cpu"}
    nets = [networks.create(name, images.num_classes, 3, seed=i) for i in range(NETWORKS)]
    zoo.train(nets[0], images, **how)  # warm-up
    yield milliseconds(lambda: [zoo.train(net, images, seed=i, **how) for i, net in enumerate(nets)], NETWORKS)
    yield milliseconds(lambda: population.train(nets, images, range(NETWORKS), **how), NETWORKS)
    yield milliseconds(lambda: population.train(nets, images, range(NETWORKS), at_once=NETWORKS, **how), NETWORKS)


def main(wanted):
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {NETWORKS} networks, {STEPS} steps each")
    print(f"{'network':14}{'batch':>6}{'one by one':>12}{'together':>10}{'vmap':>8}{'ratio':>9}{'vmap':>8}")
    for name, side, batch in CASES:
        if not wanted or name in wanted:
            plain, ours, vmapped = compare(name, side, batch)
            print(f"{name:14}{batch:>6}{plain:>12.1f}{ours:>10.1f}{vmapped:>8.1f}{plain / ours:>8.1f}x{plain / vmapped:>7.1f}x",
                  flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
