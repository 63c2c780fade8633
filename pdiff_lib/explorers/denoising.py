"""The explorer of the reverse process: follow one chain from noise to network, and draw new networks."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import ipywidgets as widgets
import pandas as pd
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from pdiff_lib.base import recipe
from pdiff_lib.drawing import plots
from pdiff_lib.drawing.widget import WIDE, WRAP, Export, Figure, show
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.explorers.work import Work
from pdiff_lib.generators import pdiff

MOMENTS = 101  # at most so many moments of a chain are decoded and evaluated
AT_ONCE = 10  # networks that are drawn together: what a stop can cost


@runtime_checkable
class Collects(Protocol):
    """What drawn networks are handed to, such as the scatter explorer: `measure` beside the kernel's work, then `add`."""

    def measure(self, theta: Tensor) -> Any: ...

    def add(self, theta: Tensor, measured: Any) -> None: ...


class Denoising(Work):
    """One chain from noise to network, step by step: parameters, path of the latent and accuracy, at one moment.

    Follow computes the chain of another seed or sampler; Generate draws new networks with that sampler. Both work beside the
    kernel's other work and can be stopped; networks that are complete by then are kept.

    Args:
        experiment: with a fitted p-diff (fitted now if it is not).
        scatter: gets the networks that are drawn, such as a `Scatter`.

    Attributes:
        path: the chain that is shown (`pdiff.Trajectory` of one network).
        accuracy: [S] of its moments, fractions; of another task than classification its score.
        generated: [M D] the networks drawn so far.
    """

    def __init__(self, experiment: Experiment, scatter: Collects | None = None):
        self.experiment, self.scatter = experiment, scatter
        self.method: pdiff.PDiff = experiment.fitted(PDIFF)
        self.generated = experiment.zoo.theta[:0]
        self._pca = PCA(2).fit(self.method.z.cpu())
        self._generators: dict[int, torch.Generator] = {}
        T = self.method.schedule.T
        self.seed = widgets.BoundedIntText(0, 0, 2**31 - 1, description="seed", layout={"width": "150px"})
        self.sampler = widgets.Dropdown(options=["ddpm", "ddim"], value=self.method.sampling.sampler, description="sampler",
                                        layout={"width": "180px"})
        self.steps = widgets.BoundedIntText(self.method.sampling.sampling_steps or T, 1, T, style=WIDE,
                                            description=f"sampling steps (of {T})", layout={"width": "230px"})
        self.follow_button = widgets.Button(description="Follow", tooltip="compute the chain of this seed and sampler")
        self.play = widgets.Play(interval=150, show_repeat=False)
        self.moment = widgets.IntSlider(description="moment", readout=False, layout={"width": "420px"})
        widgets.jslink((self.play, "value"), (self.moment, "value"))
        self.label = widgets.Label()
        self.count = widgets.BoundedIntText(20, 1, 10_000, description="networks", layout={"width": "170px"})
        self.generate_button = widgets.Button(description="Generate", tooltip="draw new networks with this sampler")
        self._work(self.seed, self.sampler, self.steps, self.count, self.follow_button, self.generate_button)
        self._take(self._follow(lambda: None))
        self.moment.observe(self._step, "value")
        self.follow_button.on_click(lambda _: self._start(self.follow()))
        self.generate_button.on_click(lambda _: self._start(self.generate()))
        super().__init__([
            widgets.HBox([self.seed, self.sampler, self.steps, self.follow_button], layout=WRAP),
            widgets.HBox([self.play, self.moment, self.label], layout=WRAP), self.figure,
            widgets.HBox([self.count, self.generate_button, self.stop_button, self.progress], layout=WRAP), self.status,
            Export({"denoising": (self.figure, lambda: self.table)}, "denoising")])
        self.add_class("pdiff-denoising")

    def _sampler(self, tick: Callable[[], None]) -> pdiff.PDiff:
        """The fitted method with the sampler that is chosen; `tick` is called before each step."""
        method = copy.copy(self.method)
        method.progress = False
        method.sampling = recipe.Sampling(self.sampler.value, self.steps.value, self.method.sampling.eta)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            tick()
            return self.method.denoiser(x, t)

        method.denoiser = denoiser
        return method

    def _follow(self, tick: Callable[[], None]) -> tuple[pdiff.Trajectory, Tensor]:
        method, generator = self._sampler(tick), torch.Generator().manual_seed(self.seed.value)
        path = method.trajectory(1, min(MOMENTS, self.steps.value + 1), generator)
        path = pdiff.Trajectory(path.t, path.z.cpu(), path.theta.cpu())
        return path, self.experiment.judged_of(path.theta[:, 0]).score

    def _take(self, followed: tuple[pdiff.Trajectory, Tensor]) -> None:
        """Show another chain, at its end."""
        self.path, self.accuracy = followed
        self._plane = torch.from_numpy(self._pca.transform(self.path.z[:, 0])).float()
        self._pictures = [plots.grid(self.experiment.subset, v).numpy() for v in self.path.theta[:, 0]]
        originals = float(self.experiment.judged(ORIGINAL).score.mean())
        drawn = plots.denoising(
            self.experiment.subset, self.path.t, self.path.theta[:, 0], self._plane, self.accuracy,
            torch.from_numpy(self._pca.transform(self.method.z.cpu())).float(), originals,
            f"Denoising, seed {self.seed.value}, {self.sampler.value.upper()} with {self.steps.value} steps"
            f"<br><sup>{self.experiment.title}</sup>", self.experiment.task.score)
        last = len(self.path.t) - 1
        if hasattr(self, "figure"):
            show(self.figure, drawn)
        else:
            self.figure = Figure(drawn)
        self.play.max = self.moment.max = last
        self.play.value = self.moment.value = last  # a page that connects later copies the one to the other
        self._step()

    def _step(self, _change=None) -> None:
        i, score = self.moment.value, self.experiment.task.score
        picture, now, level = self.figure.data[0], self.figure.data[3], self.figure.data[5]
        with self.figure.batch_update():
            picture.z = self._pictures[i]
            now.x, now.y = [float(self._plane[i, 0])], [float(self._plane[i, 1])]
            level.x, level.y = [self.path.t[i]], [score.scale * float(self.accuracy[i])]
        self.label.value = (f"{self.path.t[i]} of {self.path.t[0]} diffusion steps remain; "
                            f"{score.name} {score.shown(float(self.accuracy[i]))}")

    @property
    def table(self) -> pd.DataFrame:
        """The chain that is shown, a row per moment."""
        return pd.DataFrame({"steps_remaining": self.path.t, "accuracy": self.accuracy.numpy(), "PC1": self._plane[:, 0].numpy(),
                             "PC2": self._plane[:, 1].numpy()})

    async def follow(self) -> None:
        """Compute the chain of the chosen seed and sampler, and show it."""
        async def work(tick):
            self._take(await asyncio.to_thread(self._follow, tick))
            return self.status.value

        self.status.value = f"chain of seed {self.seed.value}"
        await self._watched(work, self.steps.value)

    async def generate(self) -> None:
        """Draw the chosen number of networks, and hand them to the scatter explorer."""
        n, start = self.count.value, len(self.generated)
        # Pressing the button again goes on with the same stream: other networks, the same ones in every session.
        generator = self._generators.setdefault(self.seed.value, torch.Generator().manual_seed(self.seed.value))

        async def work(tick):
            method, accuracies, score = self._sampler(tick), [], self.experiment.task.score
            for size in [min(AT_ONCE, n - at) for at in range(0, n, AT_ONCE)]:
                theta, accuracy, measured = await asyncio.to_thread(self._draw, method, size, generator)
                self.generated = torch.cat([self.generated, theta])
                if self.scatter is not None:
                    self.scatter.add(theta, measured)
                accuracies.append(accuracy)
                self.status.value = (f"{len(self.generated) - start} of {n} networks, mean {score.name} "
                                     f"{score.shown(float(torch.cat(accuracies).mean()))}")
            return self.status.value

        self.status.value = f"0 of {n} networks"
        await self._watched(work, self.steps.value * -(-n // AT_ONCE))

    def _draw(self, method: pdiff.PDiff, n: int, generator: torch.Generator) -> tuple:
        theta = method.sample(n, generator).cpu()
        measured = self.scatter.measure(theta) if self.scatter is not None else None
        return theta, self.experiment.judged_of(theta).score, measured
