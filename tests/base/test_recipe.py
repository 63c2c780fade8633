"""recipe.py: the paper's values, every refusal, and that no setting escapes the digest."""

import dataclasses
import math

import pytest

from pdiff_lib.base import recipe, runs
from pdiff_lib.base.recipe import Recipe

TABLE_5 = {  # and Section 3.1; K is 300 in the text (200 in Table 5b)
    "base_optimizer": "adamw", "base_lr": 5e-4, "base_weight_decay": 5e-4, "base_epochs": 10, "base_batch": 128,
    "zoo_optimizer": "adamw", "zoo_lr": 0.03, "zoo_weight_decay": 5e-4, "k_checkpoints": 300, "zoo_batch": 128,
    "ae_lr": 2e-5, "ae_weight_decay": 0.0, "ae_steps": 500, "ae_batch": 50, "sigma_v": 0.001, "sigma_z": 0.1,
    "diffusion_lr": 1e-4, "diffusion_weight_decay": 0.0, "diffusion_steps": 1000, "diffusion_batch": 50,
    "T": 1000, "beta_1": 1e-4, "beta_T": 0.02}
OTHERS = {"network": "resnet18", "dataset": "cifar100", "subset": "last_norms:2", "image_size": 224, "latent_dim": 128,
          "ae_channels": [64, 128, 256, 256, 32], "denoiser_channels": [64, 128, 256, 512, 256, 128, 64],
          "sampler": "ddpm", "sampling_steps": 0, "beta_range": "fixed", "standardise_latents": False, "samples": 200,
          "noise_scales": [0.001, 0.05, 0.15]}
FIELDS = [(c, f) for c in recipe.SECTIONS.values() for f in dataclasses.fields(c)]


@pytest.mark.parametrize("name, value", {**TABLE_5, **OTHERS}.items())
def test_defaults_are_the_papers(name, value):
    assert Recipe().flat()[name] == value


@pytest.mark.parametrize("settings, message", [
    ({"k_checkpoint": 3}, "unknown setting 'k_checkpoint': did you mean 'k_checkpoints'?"),
    ({"zzzz": 3}, "unknown setting 'zzzz': expected one of .*ae_batch, .*weights"),
    ({"latent_dim": "128"}, r"latent_dim is '128' \(str\): expected int"),
    ({"ae_lr": "fast"}, r"ae_lr is 'fast' \(str\): expected float"),
    ({"T": True}, r"T is True \(bool\): expected int"),
    ({"ae_lr": True}, r"ae_lr is True \(bool\): expected float"),
    ({"flip": 1}, r"flip is 1 \(int\): expected bool"),
    ({"T": 10.0}, r"T is 10.0 \(float\): expected int"),
    ({"seed": None}, r"seed is None \(NoneType\): expected int"),
    ({"k_checkpoints": 1}, "k_checkpoints is 1: expected at least 2"),
    ({"crop_scale": 1.5}, "crop_scale is 1.5: expected at least 0.01 and at most 1.0"),
    ({"beta_T": -0.1}, "beta_T is -0.1: expected at least 0.0"),
    ({"sigma_z": math.nan}, "sigma_z is nan: expected a finite number"),
    ({"zoo_lr": math.inf}, "zoo_lr is inf: expected a finite number"),
    ({"sampler": "euler"}, "sampler is 'euler': expected one of 'ddpm', 'ddim'"),
    ({"image_channels": 2}, "image_channels is 2: expected one of 0, 1, 3"),
    ({"ae_channels": []}, r"ae_channels is \[\]: expected a list of int, not empty"),
    ({"ae_channels": 64}, "ae_channels is 64: expected a list of int"),
    ({"ae_channels": [8, 0]}, "ae_channels is 0: expected at least 1"),
    ({"ae_channels": [8, 1.5]}, r"ae_channels is 1.5 \(float\): expected int"),
    ({"noise_scales": [0.1, math.nan]}, "noise_scales is nan: expected a finite number")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of(**settings)


def test_numbers_are_converted_where_nothing_is_lost():
    r = Recipe.of(ae_lr=1, ae_channels=[8, 16], noise_scales=(1,))
    assert (r.autoencoder.ae_lr, type(r.autoencoder.ae_lr)) == (1.0, float)
    assert r.autoencoder.ae_channels == (8, 16) and r.comparison.noise_scales == (1.0,)
    assert type(r.comparison.noise_scales[0]) is float


def another(f, value):
    """A valid value other than the default."""
    if f.metadata.get("choices"):
        return next(c for c in f.metadata["choices"] if c != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, *(value[:1] or (0.5,)))
    return value + 1 if isinstance(value, int) else value / 2 + 0.017


@pytest.mark.parametrize("section, f", FIELDS, ids=[f.name for _, f in FIELDS])
def test_every_setting_changes_the_digest_of_its_section_alone(section, f):
    value = another(f, f.default)
    changed, own = Recipe.of(**{f.name: value}), section.__name__.lower()
    differs = {key for key in recipe.SECTIONS if runs.digest(dataclasses.asdict(getattr(changed, key)))
               != runs.digest(dataclasses.asdict(getattr(Recipe(), key)))}
    assert differs == {own} and getattr(getattr(changed, own), f.name) == value
    assert Recipe.of(**changed.flat()) == changed != Recipe()


def test_names_are_unique_and_flat_holds_them_all():
    assert len({f.name for _, f in FIELDS}) == len(FIELDS) == len(Recipe().flat())
    assert recipe.names() == {f.name: c for c, f in FIELDS}


def test_pick_takes_the_settings_among_other_names():
    assert Recipe.pick({"T": 10, "recipe": recipe, "samples": 3, "__name__": "x"}) == Recipe.of(T=10, samples=3)


def test_split_gives_its_sections_alone():
    ae, diffusion = recipe.split({"T": 10, "latent_dim": 4}, recipe.Autoencoder, recipe.Diffusion)
    assert (ae, diffusion) == (recipe.Autoencoder(latent_dim=4), recipe.Diffusion(T=10))
    with pytest.raises(ValueError, match="unknown setting 'samples'"):
        recipe.split({"samples": 1}, recipe.Autoencoder)


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().zoo.k_checkpoints = 3


def test_yaml_reads_numbers_that_yaml_takes_for_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("ae_lr: 1e-4\nnoise_scales: [2E-3, 0.5]\ndataset: 2e\nnetwork: e3\nseed: 7\nflip: false\n")
    values = recipe.load(file)
    assert values == {"ae_lr": 0.0001, "noise_scales": [0.002, 0.5], "dataset": "2e", "network": "e3", "seed": 7,
                      "flip": False}
    assert Recipe.of(**values).autoencoder.ae_lr == 0.0001


@pytest.mark.parametrize("text, message", [
    (None, "no parameter file"), ("- 1\n- 2\n", "holds list: expected 'name: value'"), ("", "holds NoneType"),
    ("a: [1,\n", "is not YAML")])
def test_bad_yaml_files_are_named(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        recipe.load(file)
    assert "bad.yaml" in str(error.value)
