"""generate.py: files that load elsewhere, numbers that hold there, nothing picked by the images that it is reported on."""

import json
import re

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from device import DEVICE
from pdiff_lib import cli, evaluate, generate, runs
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.recipe import Recipe
from pdiff_lib.tasks import task

SMALL = {"dataset": "digits", "image_size": 32, "train_images": 200, "test_images": 100, "network": "test_resnet", "pretrained": False,
         "base_epochs": 4, "base_lr": 3e-3, "base_batch": 50, "k_checkpoints": 6, "zoo_batch": 16, "crop_scale": 0.6, "flip": False,
         "zoo_lr": 0.01, "ae_channels": [2, 2], "latent_dim": 4, "ae_steps": 3, "denoiser_channels": [2, 2, 2], "diffusion_steps": 3,
         "T": 10, "samples": 6, "noise_scales": [0.05]}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return runs.Store(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def made(home, stages, out="out", n=3, source="recipe.yaml", **how):
    generate.generate(home / source, n, home / out, store=stages, device=DEVICE, progress=False, **how)
    return json.loads((home / out / "networks.json").read_text())


def right(net, images, half):
    x, y = images.prepare(images.x_test[half]), images.y_test[half]
    with torch.no_grad():
        return net.eval()(x).argmax(1) == y


@pytest.mark.parametrize("buffers", ["network", "checkpoint", "recalibrate"])
def test_files_load_into_timm_and_give_the_numbers_that_are_said(home, stages, buffers):
    (home / "recipe.yaml").write_text(yaml.safe_dump({**SMALL, "buffers": buffers, "recalibrate_images": 50}))
    report = made(home, stages)
    e = Experiment(Recipe.of(**{**SMALL, "buffers": buffers, "recalibrate_images": 50}), stages, DEVICE, False)
    here, there = task.halves(100)
    assert len(here) + len(there) == 100 and len({*here.tolist(), *there.tolist()}) == 100 and list(report["files"]) == [
        f"generated-{i:03d}.safetensors" for i in range(3)]
    originals, picked = e.wrong(ORIGINAL)[:, there], []
    for file, said in report["files"].items():
        net = timm.create_model("test_resnet", num_classes=10, in_chans=1)
        net.load_state_dict(load_file(home / "out" / file))
        correct = right(net, e.task.images, there)
        assert said["accuracy"] == pytest.approx(correct.double().mean().item())
        assert said["accuracy_to_pick"] == pytest.approx(right(net, e.task.images, here).double().mean().item())
        alike = [float((~correct & w).sum() / (~correct | w).sum()) for w in originals]
        assert said["max_similarity"] == pytest.approx(max(alike)) and alike[said["nearest"]] == pytest.approx(max(alike))
        picked.append(said["candidate"])
    accuracy = evaluate.accuracy(e.wrong(PDIFF)[:, here])
    assert len({*picked}) == 3 and accuracy[picked].sum() == accuracy.sort().values[-3:].sum()
    assert report["complete"] and ("running statistics" in report["title"]) == (buffers != "network")


def test_the_card_is_one_of_the_hub(home, stages):
    report = made(home, stages)
    card = ModelCard.load(home / "out" / "README.md")
    (result,) = card.data.eval_results
    accuracies = [said["accuracy"] for said in report["files"].values()]
    assert card.data.library_name == "timm" and result.metric_value == pytest.approx(sum(accuracies) / 3, abs=1e-4)
    (usage,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    scope = {}
    exec(usage.replace("generated-000", str(home / "out" / "generated-000")), scope)
    mean, std = (float(v) for v in re.search(r"less mean \(([\d.]+)\), divided by std \(([\d.]+)\)", card.text).groups())
    images = Experiment(Recipe.of(**SMALL), stages, DEVICE, False).task.images
    x = torch.nn.functional.interpolate(images.x_test.float(), (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close((x / 255 - mean) / std, images.prepare(images.x_test), rtol=1e-4, atol=1e-4)
    assert not scope["net"].training and "picked nothing" in card.text


def test_it_goes_on_and_writes_again_what_is_damaged(home, stages, monkeypatch):
    write, files = runs.write, []

    def killed(path, *a):
        if path.parent.name == "out" and len(files) == 1:
            raise KeyboardInterrupt
        files.append(path) if path.parent.name == "out" else None
        write(path, *a)

    monkeypatch.setattr(runs, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        made(home, stages)
    assert not json.loads((home / "out" / "networks.json").read_text())["complete"]
    monkeypatch.setattr(runs, "write", lambda path, *a: (files.append(path), write(path, *a)) if path.parent.name == "out" else write(path, *a))
    report, before = made(home, stages), [p.name for p in files]
    assert report["complete"] and before == [f"generated-{i:03d}.safetensors" for i in range(3)]
    data = (home / "out" / before[1]).read_bytes()
    (home / "out" / before[1]).write_bytes(data[:-4] + b"abcd")
    assert made(home, stages)["files"] == report["files"] and len(files) == 4
    (home / "same").write_bytes(data)
    assert runs.tensor_digest(load_file(home / "out" / before[1])) == runs.tensor_digest(load_file(home / "same"))


def test_a_folder_of_something_else_is_refused_before_any_work(home, stages, monkeypatch):
    made(home, stages)
    monkeypatch.setattr(generate, "Experiment", None)
    (home / "mine").mkdir()
    (home / "mine" / "thesis.tex").write_text("")
    (home / "other.yaml").write_text(yaml.safe_dump({**SMALL, "sigma_z": 1.0, "T": 11}))
    for changes, message in [({"out": "mine"}, "mine holds something else"), ({"n": 2}, r"something else \(n differ\)"),
                             ({"source": "other.yaml"}, r"\(sigma_z, T differ\)|\(T, sigma_z differ\)"),
                             ({"out": "new", "n": 0}, "n is 0 of 6"), ({"out": "new", "candidates": 2}, "n is 3 of 2 candidates")]:
        with pytest.raises(ValueError, match=message):
            made(home, stages, **changes)
    assert [p.name for p in (home / "mine").iterdir()] == ["thesis.tex"] and not (home / "new").exists()


def test_a_runs_folder_stands_for_its_recipe_and_its_files(home, stages):
    start = Experiment(Recipe.of(**SMALL), stages, DEVICE, False)
    save_file(start._initial.state_dict(), home / "w.safetensors")
    run = runs.Run("tiny", {**SMALL, "weights": "w.safetensors", "seeds": [0]})
    run.record({"a": 1})
    assert generate.recipe_of(run.folder) == Recipe.of(**SMALL, weights="w.safetensors")
    state = start._initial.state_dict()
    save_file({**state, "fc.bias": state["fc.bias"] + 1}, home / "w.safetensors")
    with pytest.raises(ValueError, match="^weights: not there, or not as run"):
        generate.recipe_of(run.folder)
    with pytest.raises(ValueError, match="holds no record.json"):
        generate.recipe_of(home)
    with pytest.raises(ValueError, match="unknown setting 'sigmaz'"):
        (home / "typo.yaml").write_text("sigmaz: 1")
        generate.recipe_of(home / "typo.yaml")


def test_the_command(home, stages, monkeypatch, capsys):
    monkeypatch.setattr(runs, "root", lambda: stages.folder.parent)
    monkeypatch.setattr("sys.argv", ["pdiff", "generate", "recipe.yaml", "--n", "2", "--out", "cli"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code and len(list((home / "cli").glob("*.safetensors"))) == 2
    assert "complete: " in capsys.readouterr().out


@pytest.mark.parametrize("settings, said", [
    ({"task": "image_generation", "image_size": 8, "image_steps": 2, "test_images": 12, "network": "unet-8-16", "subset": "unet.conv_out.*"},
     ("Frechet distance, lower is better", "correlation of the images made of the same noise")),
    ({"task": "detection", "dataset": "scenes", "image_size": 48, "train_images": 8, "test_images": 8, "network": "fcos-mini",
      "subset": "head.*.conv.4.*", "base_batch": 4, "zoo_batch": 4}, ("| | AP |", "intersection over union of wrong predictions"))],
    ids=["images", "objects"])
def test_networks_that_are_no_classifiers(home, stages, settings, said):
    settings = {**SMALL, "crop_scale": 1.0, "base_epochs": 1, **settings}
    (home / "recipe.yaml").write_text(yaml.safe_dump(settings))
    report = made(home, stages)
    e = Experiment(Recipe.of(**settings), stages, DEVICE, False)
    net, _ = e.task.network(e.recipe.base), report["files"]
    for i, file in enumerate(report["files"]):
        net.load_state_dict(load_file(home / "out" / file))
        candidate = report["files"][file]["candidate"]
        assert torch.equal(e.subset.flatten(net), e.theta(PDIFF)[candidate].cpu())
    card = (home / "out" / "README.md").read_text()
    assert all(text in card for text in said) and "generated-000.safetensors" in card
    here, there = task.halves(e.predictions(PDIFF).shape[1])
    scores = e.task.judged(e.predictions(PDIFF), items=here).score
    best = scores.argsort(descending=e.task.score.better == "higher", stable=True)[:3].tolist()
    assert [report["files"][f]["candidate"] for f in report["files"]] == best
