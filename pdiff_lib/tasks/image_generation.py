"""Image generation: denoising UNets, trained as DDPM's are, and judged by how near the images that they make of noise are to real ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff_lib import networks
from pdiff_lib.base import recipe, training, vectors
from pdiff_lib.base.extras import extra
from pdiff_lib.base.runs import Store
from pdiff_lib.base.score import Score
from pdiff_lib.networks import denoisers
from pdiff_lib.networks.modes import evaluating
from pdiff_lib.networks.subset import Subset
from pdiff_lib.tasks import data as sets, features, order
from pdiff_lib.tasks.features import FEATURES, frechet, kid
from pdiff_lib.tasks.squares import OnSquares
from pdiff_lib.tasks.task import Judged, Predictor, Task

T = 1000  # steps of the diffusion; beta from 1e-4 to 2e-2, linear (DDPM's)
AT_ONCE = 256  # images that are denoised together, of one network or of several


class ImageGeneration(OnSquares):
    """Images of noise, as many as there are real test images to compare them with; the same noise for every network.

    The score is the **Frechet distance** between both, on 32 features of a small classifier that is trained here, on the same training images.
    It is no FID, whose features are those of one Inception network: distances of different data sets, or numbers of images, do not compare. No
    image is "wrong": networks are alike as far as they make the same image of the same noise (`alike`).

    Images are made by DDIM without noise of its own (eta 0) in `image_steps` steps.

    Args:
        data: `dataset`, labelled images as `data.load` takes them; `image_size`, `image_steps`.
        store: keeps the classifier.

    Attributes:
        x_train: images, brought to the size.
        x_test: the noises.
        y_test: real images, which no network has seen.
        shape: (C, s, s).

    Raises:
        ValueError: scenes, fewer than two test images, or diffusers is not installed.

    Source: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), both by diffusers. The paper's Table 12 reports FID on CIFAR-10.
    """

    score = Score("Frechet distance", better="lower", similarity="correlation of the images made of the same noise")

    def __init__(self, data: recipe.Data, store: Store | None = None):
        scheduler(1)  # or diffusers is not there
        images = sets.load(data.dataset, size=data.image_size, channels=data.image_channels or None, train_images=data.train_images,
                           test_images=data.test_images, seed=data.data_seed)
        if not isinstance(images, sets.Images):
            raise ValueError(f"dataset {images.name!r} has several objects in an image: expected labelled images with task 'image_generation'")
        if len(images.x_test) < 2:
            raise ValueError(f"test_images is {data.test_images}: expected at least 2, as many as images are made and compared with them")
        self.name, self.classes, self.shape = recipe.short(images.name), images.classes, (images.channels, images.size, images.size)
        self.x_train, self.y_train, self.y_test = _resized(images.x_train, images.size), images.y_train, _resized(images.x_test, images.size)
        self._labels, self._store, self.steps = images.y_test, store, data.image_steps
        self.x_test = torch.randn(len(self.y_test), *self.shape, generator=torch.Generator().manual_seed(data.data_seed))

    @property
    def code(self) -> tuple[Any, ...]:
        return ImageGeneration.loss, ImageGeneration.prepared, ImageGeneration.criterion, scheduler, denoisers, Task.batches, order, training

    @property
    def judging(self) -> tuple[Any, ...]:
        return ImageGeneration.predictor, ImageGeneration.made, ImageGeneration.prepared, scheduler, _noise_in, denoisers, features

    @cached_property
    def digest(self) -> str:
        return f"{super().digest}-{self.steps}"

    def network(self, base: recipe.Base) -> nn.Module:
        """See `denoisers.create`."""
        self.uncropped(base)
        with training.seeded(base.seed):
            return denoisers.create(base.network, *self.shape[:2], base.pretrained, base.weights)

    def check(self, net: nn.Module) -> None:
        x = self.example.to(next(net.parameters()).device)
        try:
            with torch.no_grad(), evaluating(net):
                shape = net(x, torch.zeros(1, dtype=torch.int64, device=x.device)).shape
        except Exception as error:  # whatever a network of a user's own raises
            raise ValueError(f"{type(net).__name__} does not take images of {list(self.shape)} and their times: {type(error).__name__}: "
                             f"{error}") from error
        if shape != x.shape:
            raise ValueError(f"{type(net).__name__} gives {list(shape)} for images {list(x.shape)}: expected the noise in them, of the same shape")

    def prepared(self, items: UInt8[Tensor, "n C s s"]) -> Float[Tensor, "n C s s"]:
        """From -1 to 1."""
        return items.float() / 127.5 - 1

    def criterion(self, outputs: Float[Tensor, "B C s s"], wanted: Float[Tensor, "B C s s"]) -> Float[Tensor, ""]:
        """Squared error of the noise (DDPM, Eq. 14)."""
        return F.mse_loss(outputs, wanted)

    def loss(self, net: nn.Module, batch: int, base: recipe.Base, device: torch.device,
             stream: str) -> tuple[Callable[[int], Tensor], int]:
        """As of any task; times and noise come from the step, and images are mirrored at random where `base.flip`."""
        batch_of, per_epoch = self.batches([base.seed], batch, base, device, stream)
        diffusion = scheduler(1)

        def loss_at(i: int) -> Tensor:
            (x,), _ = batch_of(i, slice(0, 1))
            generator = torch.Generator(device).manual_seed(training.seed_for(base.seed, stream, i))
            x, mirrored = self.prepared(x), torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
            x = torch.where(mirrored, x.flip(3), x) if base.flip else x
            t = torch.randint(T, (len(x),), generator=generator, device=device)
            eps = torch.randn(x.shape, generator=generator, device=device)
            return self.criterion(net(diffusion.add_noise(x, eps, t), t), eps)

        return loss_at, per_epoch

    @torch.no_grad()
    def made(self, net: nn.Module, sub: Subset, theta: Float[vectors.Array, "M D"], noises: Float[Tensor, "n C s s"],
             device: torch.device, progress: bool = False, steps: int | None = None) -> Float[Tensor, "M n C s s"]:
        """The images that the networks of some vectors make of any noises, about -1 to 1, on the CPU; `net` is on the device.

        Where the vectors hold the module that gives the network's output (the paper's: the last convolution), what is before it is the same network
        for all: in the first step, where all have the same noise before them, it runs once for all vectors; later, when their images differ,
        on the images of several as one batch. Otherwise the whole network runs for every vector.
        """
        theta, ddim = vectors.vectors(theta, sub.numel, device=device), scheduler(steps or self.steps)
        at_once, columns = max(1, AT_ONCE // len(noises)), []
        bar = tqdm(total=-(-len(theta) // at_once) * -(-len(noises) // AT_ONCE) * len(ddim.timesteps), desc="denoising images", unit="step",
                   leave=False, disable=not progress)
        with bar, evaluating(net), training.precision(device):
            noise_in = _noise_in(net, sub, noises[:1].to(device))
            for start in noises.to(device).split(AT_ONCE):
                rows = []
                for part in theta.split(at_once):
                    x = start
                    for t in ddim.timesteps:
                        x = ddim.step(noise_in(part, x, t.to(device)), t, x).prev_sample
                        bar.update()
                    rows.append(x.cpu())
                columns.append(torch.cat(rows))
        return torch.cat(columns, dim=1)

    def predictor(self, net: nn.Module, sub: Subset, device: torch.device, progress: bool = False) -> Predictor:
        """Of each noise [M N F + C s s]: the classifier's features of the image made of it, and the image."""
        net, classifier = networks.copied(net).to(device), self.classifier

        def of(theta: Float[Tensor, "M D"]) -> Float[Tensor, "M N q"]:
            images = self.made(net, sub, theta, self.x_test, device, progress)
            return torch.cat([torch.stack([classifier.seen(each) for each in images]), images.flatten(2)], dim=2)

        return of

    def rehearse(self, net: nn.Module, sub: Subset, device: torch.device) -> None:
        self.made(networks.copied(net).to(device), sub, sub.flatten(net).expand(2, -1), self.x_test[:2], device, steps=1)

    @cached_property
    def classifier(self) -> features.Classifier:
        """What sees features in images, trained on the same images (stage "image classifier")."""
        made = features.Classifier(self.shape, len(self.classes))

        def compute(checkpoint):
            made.learn(self.prepared(self.x_train), self.y_train, checkpoint)
            return made.state_dict()

        if self._store is None:
            compute(None)
        else:
            key = {"images": self.training_digest, "classes": len(self.classes)}
            made.load_state_dict(self._store.stage("image classifier", key, compute, code=(features, order, training)))
        return made.eval()

    @cached_property
    def accuracy(self) -> float:
        """Share of the real test images that this classifier gets right."""
        return (self.classifier(self.prepared(self.y_test)).argmax(dim=1) == self._labels).double().mean().item()

    @cached_property
    def _real(self) -> Float[Tensor, "N F"]:
        return self.classifier.seen(self.prepared(self.y_test))

    @cached_property
    def real(self) -> tuple[float, float]:
        """Frechet distance and KID of as many real training images as there are noises: what images that cannot be told from real ones have."""
        pick = torch.randperm(len(self.x_train), generator=torch.Generator().manual_seed(0))[:len(self.x_test)]
        features = self.classifier.seen(self.prepared(self.x_train[pick]))[None]
        return frechet(features, self._real).item(), kid(features, self._real).item()

    def pictures(self, outputs: Float[Tensor, "M N q"]) -> Float[Tensor, "M N C s s"]:
        """Of what `predictor` gives."""
        return outputs[..., FEATURES:].unflatten(2, self.shape)

    def kid(self, outputs: Float[Tensor, "M N q"]) -> Float64[Tensor, "M"]:
        """KID's estimate on the same features, beside the score; NaN where images are not finite."""
        return kid(outputs[..., :FEATURES], self._real)

    def judged(self, outputs: Float[Tensor, "M N q"], originals: Tensor | None = None, items: Int64[Tensor, "n"] | None = None) -> Judged:
        """Frechet distance of the images made of these noises to all real ones."""
        return Judged(frechet(outputs[:, slice(None) if items is None else items, :FEATURES], self._real), None)

    def alike(self, outputs: Float[Tensor, "M N q"], others: Float[Tensor, "K N q"]) -> Float[Tensor, "M K"]:
        """Correlation over the pixels of the images that two networks make of the same noise, the mean over the noises: 1 for the same images.
        An image without contrast correlates with none; NaN where images are not finite."""
        a, b = (_standardised(each[..., FEATURES:]).flatten(1) for each in (outputs, others))
        return a @ b.T / outputs.shape[1]


def scheduler(steps: int) -> Any:
    """The diffusion of images, by diffusers, set to DDIM in so many steps, the first of which is at the noisy end."""
    ddim = extra("diffusers.schedulers.scheduling_ddim", "diffusers", "image generation needs", "vision").DDIMScheduler(
        T, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    return ddim


def _noise_in(net: nn.Module, sub: Subset, example: Float[Tensor, "1 C s s"]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(vectors [m D], images [n C s s] that are the same for all, or [m n C s s]; t) -> the noise [m n C s s] that their networks see."""
    cut = denoisers.before_last(net, sub.names, example, torch.zeros((), dtype=torch.int64, device=example.device))
    if cut is None:
        def whole(theta: Tensor, x: Tensor, t: Tensor) -> Tensor:
            own = x if x.ndim == 5 else x.expand(len(theta), *x.shape)
            return torch.stack([torch.func.functional_call(net, sub.unflatten(v), (each, t)) for v, each in zip(theta, own)])

        return whole
    trunk, name = cut
    last = net.get_submodule(name)

    def of_last(vector: Tensor, h: Tensor) -> Tensor:
        return torch.func.functional_call(last, {n.removeprefix(f"{name}."): value for n, value in sub.unflatten(vector).items()}, (h,))

    def noise(theta: Tensor, x: Tensor, t: Tensor) -> Tensor:
        h = trunk(x.flatten(0, -4), t)
        return torch.func.vmap(of_last, in_dims=(0, None))(theta, h) if x.ndim == 4 else torch.func.vmap(of_last)(theta, h.unflatten(0, x.shape[:2]))

    return noise


def _standardised(x: Float[Tensor, "M N p"]) -> Float[Tensor, "M N p"]:
    centred = x - x.mean(dim=2, keepdim=True)
    return centred / centred.norm(dim=2, keepdim=True).clamp(min=1e-6)


def _resized(x: UInt8[Tensor, "n C h w"], size: int) -> UInt8[Tensor, "n C s s"]:
    if x.shape[2:] == (size, size):
        return x
    parts = [F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True) for part in x.split(4096)]
    return torch.cat(parts).round().clamp(0, 255).byte()
