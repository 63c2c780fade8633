"""Images of noise by many UNets at once: what can be shared is computed once, or the whole network per vector.

    python tests/benchmarks/bench_images.py

20 vectors x 16 noises; both sides in this process with the same threads, alternately, the best of three in processor time. The plain side runs 4
vectors, scaled. Random weights. One step is at equal inputs, where all that is before the last convolution is the same for all vectors; in later
steps the images differ, and only that they are one batch is left. `bound`: what is spared if the shared part is all of the work.
"""

import time
import warnings

import torch

from pdiff_lib.base.recipe import Recipe
from pdiff_lib.networks import subset
from pdiff_lib.tasks import image_generation, task

VECTORS, NOISES, PLAIN, REPEATS = 20, 16, 4, 3
CASES = [("unet-16-32-64", "unet.conv_out.*", 1), ("unet-16-32-64", "unet.conv_out.*", 10), ("unet-16-32-64", "unet.conv_norm_out.*", 10)]


@torch.no_grad()
def plain(net, sub, theta, noises, steps):
    ddim, made = image_generation.scheduler(steps), []
    for v in theta:
        x = noises
        for t in ddim.timesteps:
            x = ddim.step(torch.func.functional_call(net, sub.unflatten(v), (x, t)), t, x).prev_sample
        made.append(x)
    return torch.stack(made)


def seconds(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main():
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, processor time; {VECTORS} vectors x {NOISES} noises of 28 px")
    print(f"{'network':16}{'generated':24}{'steps':>6}{'plain s':>9}{'ours s':>8}{'ratio':>8}{'bound':>8}  apart")
    for name, choice, steps in CASES:
        recipe = Recipe.of(task="image_generation", dataset="digits", image_size=28, test_images=NOISES, network=name, pretrained=False, crop_scale=1.0)
        judge = task.of(recipe.data)
        net = judge.network(recipe.base).eval()
        sub = subset.select(net, choice)
        theta = sub.flatten(net) + 0.05 * torch.randn(VECTORS, sub.numel, generator=torch.Generator().manual_seed(0))
        both = [(seconds(lambda: plain(net, sub, theta[:PLAIN], judge.x_test, steps)),
                 seconds(lambda: judge.made(net, sub, theta, judge.x_test, torch.device("cpu"), steps=steps))) for _ in range(REPEATS)]
        theirs, own = (min(t for t, _ in side) for side in zip(*both))
        theirs *= VECTORS / PLAIN
        apart = float((both[0][0][1] - both[0][1][1][:PLAIN]).abs().max())
        bound = VECTORS * steps / (1 + VECTORS * (steps - 1)) if "conv_out" in choice and "norm" not in choice else 1
        print(f"{name:16}{choice:24}{steps:6}{theirs:9.2f}{own:8.2f}{theirs / own:7.1f}x{bound:7.1f}x  {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
