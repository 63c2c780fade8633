"""A population trained together against one network after the other (`zoo.train`), in milliseconds per network and step.

    python tests/benchmarks/bench_population.py [network ...]

Processor time on one thread, so that other work on the machine counts as little as possible; both sides have the same
batches, and end at the same networks. Small ones without convolutions share a vmap of up to 512; the last but one column puts 16 of any kind
into one (on a CPU `train` does not with convolutions).
"""

import dataclasses
import sys
import time

import torch

from pdiff_lib import networks, zoo
from pdiff_lib.tasks import data
from pdiff_lib.zoos import population

STEPS, EPOCHS = 3, 4  # in an epoch
# network, side, channels, batch, networks (of which at most 16 are trained one by one)
CASES = [("mlp-10", 8, 1, 32, 8192), ("mlp-16", 28, 1, 128, 256), ("hyperrep-cnn", 32, 3, 128, 16), ("hyperrep-cnn", 32, 3, 32, 16), ("mlp-mini", 64, 3, 128, 16),
         ("mlp-mini", 64, 3, 32, 16), ("convnet-mini", 64, 3, 32, 16)]


def milliseconds(call, count):
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start) / count / STEPS / EPOCHS


def compare(name, side, channels, batch, networks_together):
    """Milliseconds per network and step: one by one, together, in one vmap."""
    images = data.load("digits", size=side, channels=channels)
    images = dataclasses.replace(images, x_train=images.x_train[:batch * STEPS], y_train=images.y_train[:batch * STEPS])
    augmentation = {} if name.startswith("mlp-1") else {"crop_scale": 0.08}
    how = {"network": name, "base_epochs": EPOCHS, "base_batch": batch, "flip": False, "crop_scale": 1.0, "progress": False, "device": "cpu", **augmentation}
    nets = [networks.create(name, images.num_classes, channels, side, seed=i) for i in range(networks_together)]
    zoo.train(nets[0], images, **how)  # warm-up
    few = nets[:16]
    yield milliseconds(lambda: [zoo.train(net, images, seed=i, **how) for i, net in enumerate(few)], len(few))
    chunks = [nets[i:i + 512] for i in range(0, len(nets), 512)]
    yield milliseconds(lambda: [population.train(part, images, range(len(part)), **how) for part in chunks], len(nets))
    yield milliseconds(lambda: population.train(few, images, range(len(few)), at_once=len(few), **how), len(few))


def main(wanted):
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {STEPS * EPOCHS} steps each")
    print(f"{'network':14}{'batch':>6}{'networks':>10}{'one by one':>12}{'together':>10}{'16 in a vmap':>14}{'ratio':>9}")
    for case in CASES:
        if not wanted or case[0] in wanted:
            plain, ours, vmapped = compare(*case)
            print(f"{case[0]:14}{case[3]:>6}{case[4]:>10}{plain:>12.3f}{ours:>10.3f}{vmapped:>14.3f}{plain / ours:>8.1f}x", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
