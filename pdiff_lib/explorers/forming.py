"""The explorer of fields: an object forms as noise leaves the parameters of the network that it is."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import html
from collections.abc import Callable
from typing import Any, NamedTuple

import ipywidgets as widgets
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pdiff_lib.base import recipe, runs
from pdiff_lib.drawing import plots, sheets
from pdiff_lib.drawing.widget import WIDE, WRAP, Export, Figure, linked, show
from pdiff_lib.explorers.work import Work
from pdiff_lib.forms import Forms
from pdiff_lib.generators import pdiff
from pdiff_lib.networks import surfaces
from pdiff_lib.tasks.objects import THRESHOLD

MOMENTS = 41  # at most so many moments of a chain are shown
CALLS = {"midpoint": 2, "rk4": 4}  # of the network, in a step of a solver; 1 in all others
DIFFUSION = ("ddim", "ddpm")


class Chain(NamedTuple):
    """What was followed: S moments of one network."""
    method: str
    seed: int
    t: list[float]
    theta: Float[Tensor, "S D"]
    forms: list[Any]  # pictures or meshes
    distance: Float[Tensor, "S"]
    nearest: int  # -1: the end has no form
    beside: Any  # that object's picture or mesh, or nothing
    facts: str


class Fields(Work):
    """One field from noise to object: a picture or a body at one moment, and the training object that it ends nearest to, beside it
    (bodies stand in one space, so that they turn together).

    Follow computes the chain of the chosen generator, order, seed, sampler and steps; Generate that of the next seed. Both work beside
    the kernel's other work and can be stopped. The forms of all moments are computed once: the slider only shows them.

    Args:
        forms: of an arena whose task is fields.
        generators: those to choose from; None: all of the arena that have a way from noise (`trajectory`). Fitted when they are chosen.

    Attributes:
        chain: what is shown.
        generated: [M D] the networks of all chains so far, at their ends.

    Raises:
        ValueError: a generator without a way from noise, or none.
    """

    def __init__(self, forms: Forms, generators: list[str] | None = None):
        self.forms = forms
        entrants = forms.arena.entrants(forms.arena.orders[0], 0)
        able = [name for name, method in entrants.methods.items() if hasattr(method, "trajectory")]
        if bad := [name for name in generators or able if name not in able] or ([] if able else ["none"]):
            raise ValueError(f"generators {', '.join(bad)}: expected some of {', '.join(able) or 'those with trajectory(n, moments, generator)'}")
        self.generated = forms.arena.held[:0]
        self.generator = widgets.Dropdown(options=generators or able, description="generator", layout={"width": "260px"})
        self.order = widgets.Dropdown(options=list(forms.arena.orders), description="order", layout={"width": "180px"})
        self.seed = widgets.BoundedIntText(0, 0, 2**31 - 1, description="seed", layout={"width": "150px"})
        self.sampler = widgets.Dropdown(description="sampler", layout={"width": "180px"})
        self.steps = widgets.BoundedIntText(50, 1, 10_000, style=WIDE, description="sampling steps", layout={"width": "190px"})
        self.follow_button = widgets.Button(description="Follow", tooltip="compute the chain of this generator, seed and sampler")
        self.generate_button = widgets.Button(description="Generate", tooltip="one more: the next seed")
        self.play = widgets.Play(interval=200, show_repeat=False)
        self.moment = widgets.IntSlider(description="moment", readout=False, layout={"width": "420px"})
        widgets.jslink((self.play, "value"), (self.moment, "value"))
        self.label, self.facts, self.link = widgets.Label(), widgets.HTML(), widgets.HTML()
        self._work(self.generator, self.order, self.seed, self.sampler, self.steps, self.follow_button, self.generate_button)
        self._choose()
        self._take(self._follow(lambda: None))
        for control in (self.generator, self.order):
            control.observe(self._choose, "value")
        self.moment.observe(self._step, "value")
        self.follow_button.on_click(lambda _: self._start(self.follow()))
        self.generate_button.on_click(lambda _: self._start(self.generate()))
        exports = [Export({"forming": (self.figure, lambda: self.table)}, "fields")]
        if forms.d == 3:
            for kind in ("ply", "glb"):
                button = widgets.Button(description=f"as {kind.upper()}", tooltip="write the body of this moment to a file")
                button.on_click(lambda _, kind=kind: self._write(kind))
                exports.append(button)
        super().__init__([
            widgets.HBox([self.generator, self.order, self.seed, self.sampler, self.steps], layout=WRAP),
            widgets.HBox([self.follow_button, self.generate_button, self.stop_button, self.progress, self.status], layout=WRAP),
            widgets.HBox([self.play, self.moment, self.label], layout=WRAP), self.figure, self.facts,
            widgets.HBox([*exports, self.link], layout=WRAP)])
        self.add_class("pdiff-fields")

    def _choose(self, _change=None) -> None:
        """Another generator: the samplers that it has."""
        method = self.forms.arena.entrants(self.order.value, 0).methods[self.generator.value]
        if isinstance(method, pdiff.PDiff):
            kinds, now, steps = DIFFUSION, method.sampling.sampler, method.sampling.sampling_steps or method.schedule.T
        elif hasattr(settings := getattr(method, "settings", None), "solver"):
            kinds, now, steps = ("euler", *CALLS), settings.solver, settings.solver_steps
        elif hasattr(settings, "sampler"):
            kinds, now, steps = DIFFUSION, settings.sampler, settings.sampling_steps or settings.T
        else:
            kinds, now, steps = ("its own",), "its own", 1
        self.sampler.options, self.sampler.value, self.steps.value = kinds, now, steps
        self.steps.max = method.schedule.T if hasattr(method, "schedule") else 10_000

    def _sampler(self, tick: Callable[[], None]) -> Any:
        """The fitted generator with the sampler that is chosen; `tick` is called before each use of its network."""
        fitted = self.forms.arena.entrants(self.order.value, 0).fitted(self.generator.value)
        method, kind, steps = copy.copy(fitted), self.sampler.value, self.steps.value
        method.progress = False
        name = "denoiser" if isinstance(method, pdiff.PDiff) else "net"
        if isinstance(method, pdiff.PDiff):
            method.sampling = recipe.Sampling(kind, steps, fitted.sampling.eta)
        elif kind in DIFFUSION:
            method.settings = dataclasses.replace(fitted.settings, sampler=kind, sampling_steps=steps)
        elif kind != "its own":
            method.settings = dataclasses.replace(fitted.settings, solver=kind, solver_steps=steps)
        if (net := getattr(fitted, name, None)) is not None:
            def ticking(*arguments: Any) -> Tensor:
                tick()
                return net(*arguments)

            setattr(method, name, ticking)
        return method

    @property
    def _calls(self) -> int:
        return self.steps.value * CALLS.get(self.sampler.value, 1)

    def _follow(self, tick: Callable[[], None]) -> Chain:
        forms, seed = self.forms, self.seed.value
        way = self._sampler(tick).trajectory(1, min(MOMENTS, self.steps.value + 1), torch.Generator().manual_seed(seed))
        theta = way.theta[:, 0].cpu()
        values = forms.values(theta)
        found, became = forms.form_of(theta)
        distance = torch.full((len(theta),), torch.nan)
        near = torch.full((len(theta),), -1)
        if became.whole.any():
            distance[became.whole], near[became.whole] = (part.cpu() for part in forms.nearest(found[became.whole]))
        nearest, score = int(near[-1]), forms.task.score
        last = "no form: empty" if became.empty[-1] else "no form: full" if became.full[-1] else "no form: not finite" if became.broken[-1] else (
            f"{score.name} with the nearest test object {score.shown(float(forms.arena.experiment.judged_of(theta[-1:]).score))}; nearest training "
            f"object: {forms.objects.names[nearest]}, at {float(distance[-1]) / forms.usual:.2f} of what held-out networks are from theirs")
        return Chain(self.generator.value, seed, list(way.t), theta, [self._shown(v) for v in values], distance, nearest,
                     self._shown(forms.real([nearest])[0] if nearest >= 0 else torch.full_like(values[0], torch.nan)), last)

    def _shown(self, values: Tensor) -> Any:
        """A picture or a mesh; nothing where a number is not finite."""
        values = values.cpu() if torch.isfinite(values).all() else torch.full_like(values, torch.nan, device="cpu")
        if self.forms.d == 2:
            return values.clamp(0, 1)
        return surfaces.marching_cubes(values.nan_to_num(0.0), THRESHOLD)

    def _take(self, chain: Chain) -> None:
        """Show another chain, at its end."""
        self.chain, self.generated, last = chain, torch.cat([self.generated, chain.theta[-1:].to(self.generated)]), len(chain.t) - 1
        drawn = plots.forming(
            chain.forms[last], chain.beside, chain.t, chain.distance, f"{chain.method}, {self.order.value} order, seed {chain.seed}, "
            f"{self.sampler.value} with {self.steps.value} steps<br><sup>{self.forms.arena.title}</sup>", usual=self.forms.usual, moment=last,
            axis="time (1: the end)" if chain.t[-1] else "diffusion steps that remain", measure=self.forms.measure, up=self.forms.up)
        if hasattr(self, "figure"):
            show(self.figure, drawn.update_layout(uirevision="turned"))
        else:
            self.figure = Figure(drawn.update_layout(uirevision="turned"))
        self.play.max = self.moment.max = last
        self.play.value = self.moment.value = last  # a page that connects later copies the one to the other
        self.facts.value = f"<b>{chain.method}, seed {chain.seed}</b>: {chain.facts}"
        self._step()

    def _step(self, _change=None) -> None:
        i, chain = self.moment.value, self.chain
        field, now = self.figure.data[0], self.figure.data[-1]
        with self.figure.batch_update():
            if self.forms.d == 2:
                field.z = [[None if v != v else v for v in row] for row in chain.forms[i].tolist()]  # NaN is no JSON
            else:
                field.update(sheets.coordinates(chain.forms[i], -1.1))
            now.x, now.y = [i], [float(chain.distance[i])]
        far = float(chain.distance[i]) / self.forms.usual
        self.label.value = f"moment {i} of {len(chain.t) - 1}; " + ("no form" if far != far else f"distance {far:.2f} of held-out networks'")

    @property
    def table(self) -> pd.DataFrame:
        """The chain that is shown, a row per moment."""
        return pd.DataFrame({"t": self.chain.t, "distance": self.chain.distance.numpy()})

    async def follow(self) -> None:
        """Compute the chain of what is chosen, and show it."""
        async def work(tick):
            self._take(await asyncio.to_thread(self._follow, tick))
            return self.status.value

        self.status.value = f"chain of seed {self.seed.value}"
        await self._watched(work, self._calls)

    async def generate(self) -> None:
        """Follow the next seed."""
        self.seed.value += 1
        await self.follow()

    def write(self, kind: str) -> Any:
        """The body of the moment that is shown, as a file of this kind under `runs/exports`.

        Raises:
            ValueError: no body, or trimesh is missing.
        """
        vertices, faces = self.chain.forms[self.moment.value]
        if not len(faces):
            raise ValueError("this moment has no body: expected one with faces")
        path = runs.root() / "exports" / f"fields-{self.chain.method}-{self.chain.seed}-{self.moment.value}.{kind}".replace(" ", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        surfaces.trimesh().Trimesh(vertices.numpy(), faces.numpy()).export(path)
        return path

    def _write(self, kind: str) -> None:
        try:
            self.link.value = linked(self.write(kind))
        except Exception as e:  # to be read where the button is
            self.link.value = f"<b>{html.escape(f'{type(e).__name__}: {e}')}</b>"
