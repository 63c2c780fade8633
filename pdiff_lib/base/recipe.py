"""Settings of an experiment. The paper calls them recipes (Table 5); the defaults here are the paper's.

A setting has one flat name (`latent_dim`, `sigma_z`, ...), the same in a notebook's parameters cell, in a YAML file
under `params/`, on the command line and as a keyword of the library's functions. Sections group what one stage of the
work depends on, so that a stage is computed anew exactly when one of its own settings changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from pdiff_lib.base.parameters import load as load  # of settings, mostly


def setting(default, low=None, high=None, choices=None):
    """A dataclass field with its allowed range (inclusive) or choices."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


class Section:
    """A group of settings; construction checks every value (`ValueError` names the setting, the value, the range)."""

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            value = () if f.default == () and value in ((), []) else convert(f.name, value, hints[f.name])
            for v in value if isinstance(value, tuple) else (value,):
                low, high, choices = (f.metadata.get(k) for k in ("low", "high", "choices"))
                if choices and v not in choices:
                    raise ValueError(f"{f.name} is {v!r}: expected one of {', '.join(map(repr, choices))}")
                if (low is not None and v < low) or (high is not None and v > high):
                    bounds = " and ".join(b for b in (f"at least {low}" * (low is not None),
                                                      f"at most {high}" * (high is not None)) if b)
                    raise ValueError(f"{f.name} is {v!r}: expected {bounds}")
            object.__setattr__(self, f.name, value)


@dataclass(frozen=True)
class Data(Section):
    """What networks are trained for (`task`: "classification", "regression", "fields", "detection", "segmentation", "image_generation", or
    `package.module:Class` of your own), and on what: `dataset`, for images see `data.load`, for scenes `scenes.load`; sizes in pixels;
    0 images = all there are, 0 channels = as stored. Fields are of `field_kind` "grey" (images), "glyph" (images by threshold: what is at
    least half white), "extruded" (glyphs as bodies) or "mesh" (a folder of bodies, see `meshes.load`), and learn from `field_points` of
    each object (of a body as many more near its surface); judged at `field_test_points`. `image_steps`: of noise to images."""

    task: str = "classification"
    dataset: str = "cifar100"
    image_size: int = setting(224, 1)
    image_channels: int = setting(0, choices=(0, 1, 3))
    train_images: int = setting(0, 0)
    test_images: int = setting(0, 0)
    data_seed: int = setting(0, 0)
    field_kind: str = setting("grey", choices=("grey", "glyph", "extruded", "mesh"))
    field_points: int = setting(100_000, 2)
    field_test_points: int = setting(100_000, 2)
    image_steps: int = setting(50, 1, 1000)


@dataclass(frozen=True)
class Base(Section):
    """Table 5a: training of the whole network. `weights`: a safetensors file to start from."""

    network: str = "resnet18"
    pretrained: bool = True
    weights: str = ""
    base_epochs: int = setting(10, 0)
    base_optimizer: str = setting("adamw", choices=("adamw", "adam", "sgd"))
    base_lr: float = setting(5e-4, 0.0)
    base_weight_decay: float = setting(5e-4, 0.0)
    base_batch: int = setting(128, 2)
    crop_scale: float = setting(0.08, 0.01, 1.0)
    flip: bool = True
    seed: int = setting(0, 0)


@dataclass(frozen=True)
class Zoo(Section):
    """Table 5b and Section 3.1: one checkpoint of the subset per fine-tuning step, K in all; constant learning rate."""

    subset: str = "last_norms:2"
    k_checkpoints: int = setting(300, 2)
    zoo_optimizer: str = setting("adamw", choices=("adamw", "adam", "sgd"))
    zoo_lr: float = setting(0.03, 0.0)
    zoo_weight_decay: float = setting(5e-4, 0.0)
    zoo_batch: int = setting(128, 2)


@dataclass(frozen=True)
class Own(Section):
    """What a user brings. `checkpoints`: a folder or pattern of files that are the originals ("": they are trained here; then
    `k_checkpoints`, `base_...` and `zoo_...` say how). `buffers`: running statistics of batch norms that a network is evaluated
    with: "network" (those of the trained network, as in the paper), "checkpoint" (each one's own, a part of its vector) or
    "recalibrate" (computed anew for each network from `recalibrate_images` training images). `input_mean`, `input_std`: of the
    network's inputs per channel, for pixels from 0 to 1; none: timm's own where weights are `pretrained`, else those of the
    training images."""

    checkpoints: str = ""
    buffers: str = setting("network", choices=("network", "checkpoint", "recalibrate"))
    recalibrate_images: int = setting(500, 2)
    input_mean: tuple[float, ...] = setting((), 0.0, 1.0)
    input_std: tuple[float, ...] = setting((), 1e-3)


@dataclass(frozen=True)
class Population(Section):
    """Whole networks as originals (Table 7). `zoo_mode`: "trajectory" (the paper's: checkpoints of one fine-tuning) or
    "independent" (`k_checkpoints` networks, each trained by itself; see `population.collect`). `zoo_start`: these start from
    initial weights of their own ("independent"), all from those of the first ("common"), or all but the first from what that one
    was trained to ("first", as HyperDiffusion does). `alignment`: "reference"
    brings hidden units to the order of the first original. `permutations`: randomly permuted copies of each original that
    the methods learn from beside it (0 = none)."""

    zoo_mode: str = setting("trajectory", choices=("trajectory", "independent"))
    zoo_start: str = setting("independent", choices=("independent", "common", "first"))
    alignment: str = setting("none", choices=("none", "reference"))
    permutations: int = setting(0, 0)


@dataclass(frozen=True)
class Autoencoder(Section):
    """Table 5c and Eq. 5. Noise scales are standard deviations: on the standardised vector, and on the raw latent.
    `ae_kind`: "conv" (the paper's) or "pca" (at most K-1 components; no training, no noise). `centre`: what is subtracted
    from a vector before it is encoded, "tensor" (the authors': one mean per tensor) or "vector" (the mean checkpoint)."""

    centre: str = setting("tensor", choices=("tensor", "vector"))
    ae_kind: str = setting("conv", choices=("conv", "pca"))
    ae_channels: tuple[int, ...] = setting((64, 128, 256, 256, 32), 1)
    latent_dim: int = setting(128, 1)
    ae_steps: int = setting(500, 1)
    ae_lr: float = setting(2e-5, 0.0)
    ae_weight_decay: float = setting(0.0, 0.0)
    ae_batch: int = setting(50, 2)
    sigma_v: float = setting(1e-3, 0.0)
    sigma_z: float = setting(0.1, 0.0)
    pdiff_seed: int = setting(0, 0)


@dataclass(frozen=True)
class Diffusion(Section):
    """Table 5d and Eq. 6. `beta_range`: "fixed" (the authors': the same for every T) or "rescaled" (see `Schedule`).
    `latent_model`: "diffusion", or "gaussian" (fitted to the latents, nothing is trained); `denoiser_kind`: "conv" (the
    paper's) or "mlp" (`denoiser.ResidualMLP`, of `mlp_width`). `prediction`: what it learns, "noise", "v" or "x0" (see
    `prediction`); "default": "noise" for "conv" (the paper's, Eq. 6), "v" for "mlp". Samplers get the noise in all cases."""

    latent_model: str = setting("diffusion", choices=("diffusion", "gaussian"))
    denoiser_kind: str = setting("conv", choices=("conv", "mlp"))
    mlp_width: int = setting(512, 1)
    prediction: str = setting("default", choices=("default", "noise", "v", "x0"))
    denoiser_channels: tuple[int, ...] = setting((64, 128, 256, 512, 256, 128, 64), 1)
    T: int = setting(1000, 1)
    beta_1: float = setting(1e-4, 0.0, 1.0)
    beta_T: float = setting(2e-2, 0.0, 1.0)
    beta_range: str = setting("fixed", choices=("fixed", "rescaled"))
    standardise_latents: bool = False
    diffusion_steps: int = setting(1000, 1)
    diffusion_lr: float = setting(1e-4, 0.0)
    diffusion_weight_decay: float = setting(0.0, 0.0)
    diffusion_batch: int = setting(50, 2)


@dataclass(frozen=True)
class Vae(Section):
    """Table 8: the autoencoder's network as a VAE. `kl_weight`: of the KL term, beside the squared error summed over D."""

    vae_steps: int = setting(2000, 1)
    vae_lr: float = setting(2e-4, 0.0)
    kl_weight: float = setting(1.0, 0.0)


@dataclass(frozen=True)
class Sampling(Section):
    """Section 3.1, inference. `sampling_steps` 0 = all T; `eta` 0 = deterministic DDIM, 1 = DDPM's variance."""

    sampler: str = setting("ddpm", choices=("ddpm", "ddim"))
    sampling_steps: int = setting(0, 0)
    eta: float = setting(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Comparison(Section):
    """Section 4: how many networks are generated per method, and the noise-added baselines."""

    samples: int = setting(200, 1)
    noise_scales: tuple[float, ...] = setting((0.001, 0.05, 0.15), 0.0)


SECTIONS = {c.__name__.lower(): c
            for c in (Data, Base, Zoo, Own, Population, Autoencoder, Diffusion, Vae, Sampling, Comparison)}


@dataclass(frozen=True)
class Recipe:
    """All settings of one experiment, one attribute per section.

    >>> Recipe.of(k_checkpoints=10, dataset="digits").zoo.k_checkpoints
    10
    >>> Recipe.of(k_checkpoint=10)
    Traceback (most recent call last):
    ...
    ValueError: unknown setting 'k_checkpoint': did you mean 'k_checkpoints'?
    """

    data: Data = field(default_factory=Data)
    base: Base = field(default_factory=Base)
    zoo: Zoo = field(default_factory=Zoo)
    own: Own = field(default_factory=Own)
    population: Population = field(default_factory=Population)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    diffusion: Diffusion = field(default_factory=Diffusion)
    vae: Vae = field(default_factory=Vae)
    sampling: Sampling = field(default_factory=Sampling)
    comparison: Comparison = field(default_factory=Comparison)

    @classmethod
    def of(cls, **settings) -> Recipe:
        """A recipe from flat settings; what is not named keeps the paper's value.

        Raises:
            ValueError: an unknown name, a value of the wrong type or out of range; the message names it.
        """
        known = names()
        for name in settings:
            if name not in known:
                raise ValueError(unknown("setting", name, known))
        return cls(**{key: c(**{n: v for n, v in settings.items() if known[n] is c}) for key, c in SECTIONS.items()})

    @classmethod
    def pick(cls, namespace: Mapping[str, Any]) -> Recipe:
        """A recipe from those names of a notebook's namespace (`globals()`) that are settings."""
        return cls.of(**{n: namespace[n] for n in names() if n in namespace})

    def flat(self) -> dict[str, Any]:
        """All settings under their flat names, tuples as lists (ready for YAML and JSON)."""
        values = {n: getattr(getattr(self, c.__name__.lower()), n) for n, c in names().items()}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def names() -> dict[str, type]:
    """Every setting's name and the section that holds it."""
    return {f.name: c for c in SECTIONS.values() for f in dataclasses.fields(c)}


def split(settings: Mapping[str, Any], *sections: type) -> list[Any]:
    """Flat keywords of a function into its sections, strictly: `split({"T": 10}, Autoencoder, Diffusion)`."""
    known = {f.name: c for c in sections for f in dataclasses.fields(c)}
    for name in settings:
        if name not in known:
            raise ValueError(unknown("setting", name, known))
    return [c(**{n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if known[n] is c}) for c in sections]


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` where that loses nothing (int to float, list to tuple).

    Raises:
        ValueError: names the setting, the value and the type that was expected.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{name} is {value!r}: expected a list of {get_args(kind)[0].__name__}, not empty")
        return tuple(convert(name, v, get_args(kind)[0]) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = f"{kind.__name__}{' (True or False)' * (kind is bool)}"
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}): expected {wanted}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: expected a finite number")
    return value


def short(dataset: str) -> str:
    """A data set in a title: its name, or that of its folder or first file.

    >>> short("cifar10"), short("/data/my birds/"), short("data/animals-train.parquet,data/animals-test.parquet")
    ('cifar10', 'my birds', 'animals-train')
    """
    return re.split(r"(?<=\.parquet)\s*,", dataset)[0].rstrip("/").rpartition("/")[2].removesuffix(".parquet")


def unknown(what: str, name: str, known) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}"
    return f"unknown {what} {name!r}: {hint}"
