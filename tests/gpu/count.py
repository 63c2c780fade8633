"""What a GPU would do in one step of each loop of the library, counted without one: launches, waits and copies.

    python tests/gpu/count.py [--lines NAME]

`--lines`: the lines behind the counts of one loop, for five of its steps.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from gpu.pretend import EVENTS, Pretend  # noqa: E402
from pdiff_lib import networks, zoo
from pdiff_lib.base import recipe, training
from pdiff_lib.generators import autoencoder, denoiser, diffusion, vae
from pdiff_lib.networks import subset  # noqa: E402
from pdiff_lib.tasks import data, evaluate
from pdiff_lib.zoos import population  # noqa: E402

BATCH, STEPS = 8, 5
QUIET = {"device": "cuda", "progress": False}


def images(steps: int) -> data.Images:
    """Random ones: as many as make `steps` batches."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (steps * BATCH, 1, 8, 8), generator=draw, dtype=torch.uint8)
    y = torch.arange(len(x)) % 4
    return data.Images("random", "random numbers", x, y, x, y, tuple("abcd"), 32)


def vectors() -> torch.Tensor:
    return torch.randn(12, 100, generator=torch.Generator().manual_seed(0)).to("cuda")


def _autoencoder(steps: int) -> None:
    autoencoder.fit(vectors(), recipe.Autoencoder(ae_channels=[2, 2], latent_dim=4, ae_steps=steps), progress=False)


def _denoiser(kind: str, steps: int) -> None:
    settings = recipe.Diffusion(denoiser_channels=[2, 2, 2], denoiser_kind=kind, mlp_width=8, diffusion_steps=steps)
    denoiser.fit(vectors()[:, :4], diffusion.Schedule(20), settings, progress=False)


def _vae(steps: int) -> None:
    vae.VAE(ae_channels=[2, 2], latent_dim=4, vae_steps=steps, **QUIET).fit(vectors())


def _train(steps: int, epochs: int = 1) -> None:
    zoo.train(networks.create("test_resnet", 4, 1, 32), images(steps), base_epochs=epochs, base_batch=BATCH, **QUIET)


def _collect(steps: int) -> None:
    net = networks.create("test_resnet", 4, 1, 32)
    zoo.collect(net, subset.select(net, "last_norms:2"), images(steps), k_checkpoints=steps, zoo_batch=BATCH, **QUIET)


def _population(steps: int, members: int = 3, epochs: int = 1) -> None:
    nets = [networks.create("hyperrep-cnn", 4, 1, 32, seed=i) for i in range(members)]
    population.train(nets, images(steps), range(members), base_epochs=epochs, base_batch=BATCH, **QUIET)


def _sample(sampler: str, steps: int) -> None:
    schedule = diffusion.Schedule(steps)
    net = denoiser.Denoiser(4, (2, 2, 2)).to("cuda").eval()
    diffusion.SAMPLERS[sampler](net, torch.zeros(5, 4, device="cuda"), schedule, generator=torch.Generator())


def _evaluate(steps: int) -> None:
    net, pictures = networks.create("test_resnet", 4, 1, 32), images(steps)
    sub = subset.select(net, "last_norms:2")
    theta = sub.flatten(net).expand(3, -1)
    evaluate.predict(net, sub, theta, pictures.x_test, prepare=pictures.prepare, batch_size=BATCH, device="cuda")


# Name -> what makes so many steps of it: of training, of sampling, of evaluation (a batch of images).
LOOPS: dict[str, Callable[[int], None]] = {
    "autoencoder": _autoencoder,
    "denoiser, convolutions": lambda steps: _denoiser("conv", steps),
    "denoiser, MLP": lambda steps: _denoiser("mlp", steps),
    "VAE": _vae,
    "network (zoo.train)": _train,
    "zoo (zoo.collect)": _collect,
    "population of 3": _population,
    "population of 6": lambda steps: _population(steps, 6),
    "DDPM": lambda steps: _sample("ddpm", steps),
    "DDIM": lambda steps: _sample("ddim", steps),
    "evaluation, per batch of images": _evaluate,
    "network, per epoch of one step": lambda epochs: _train(1, epochs),
    "population of 3, per epoch of one step": lambda epochs: _population(1, 3, epochs),
}


def watched(name: str, steps: int) -> Pretend:
    """The events of so many steps of a loop, with all that is done once."""
    with mock.patch.object(training, "LOOK_SECONDS", float("inf")), Pretend() as gpu:  # looks count seconds, not steps
        LOOPS[name](steps)
    return gpu


def per_step(name: str) -> dict[str, float]:
    """Events by kind in one step of a loop: those of ten steps less those of five."""
    few, many = watched(name, STEPS), watched(name, 2 * STEPS)
    return {kind: (many.count(kind) - few.count(kind)) / STEPS for kind in EVENTS}


def main() -> None:
    if "--lines" in sys.argv:
        name = sys.argv[sys.argv.index("--lines") + 1]
        few, many = watched(name, STEPS), watched(name, 2 * STEPS)
        many.events = Counter({event: n for event, n in (many.events - few.events).items() if n >= STEPS})
        print(many.table())
        return
    print(f"| per step | {' | '.join(EVENTS)} |\n|{'---|' * (len(EVENTS) + 1)}")
    for name in LOOPS:
        print(f"| {name} | {' | '.join(f'{n:g}' for n in per_step(name).values())} |", flush=True)


if __name__ == "__main__":
    main()
