"""checkpoints.py, zoo.of and the recipe's `checkpoints`: files of every kind become the vectors that they hold, or are refused."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from device import DEVICE
from pdiff_lib import checkpoints, data, evaluate, inputs, networks, recalibrate, runs, subset, zoo
from pdiff_lib.experiment import AVERAGE, ORIGINAL, Experiment
from pdiff_lib.recipe import Recipe
from pdiff_lib.tasks import classification

SMALL = {"dataset": "digits", "image_size": 8, "train_images": 100, "test_images": 100, "network": "own_net:small", "pretrained": False,
         "subset": "all", "samples": 3, "noise_scales": [0.05]}
CODE = """from torch import nn
def small(num_classes, in_chans):
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
"""


def network(seed: int = 0) -> nn.Module:
    """The small network with its own numbers everywhere, running statistics included."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    for tensor in (net[1].weight, net[1].bias, net[1].running_mean):
        nn.init.normal_(tensor)
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def states(n: int, vary: str = "") -> list[dict]:
    """State dicts that differ in the names that begin so."""
    base, found = network().state_dict(), []
    for i in range(n):
        other = network(i + 1).state_dict()
        found.append({k: (other[k] if k.startswith(vary) else v).clone() for k, v in base.items()})
    return found


def hold(state, key):
    return {key: state, "epoch": 3, "optimizer": {"lr": 0.1}}


WRITERS = {  # file name -> how a trainer would have written it
    "step-2.safetensors": lambda s, f: save_file(s, f),
    "step-10.pt": lambda s, f: torch.save(s, f),
    "step-11.pth": lambda s, f: torch.save(hold({f"module.{k}": v for k, v in s.items()}, "state_dict"), f),
    "step-12.ckpt": lambda s, f: torch.save(hold({f"model.{k}": v for k, v in s.items()}, "state_dict"), f),
    "step-13.bin": lambda s, f: torch.save(hold({f"_orig_mod.{k}": v for k, v in s.items()}, "model"), f),
    "step-14.pt": lambda s, f: torch.save(hold({k: v.double() if v.is_floating_point() else v for k, v in s.items()}, "net"), f),
    "step-15.pt": lambda s, f: torch.save(hold(s, "model_state_dict"), f, _use_new_zipfile_serialization=False),
}


def written(folder: Path, found: list[dict], names=WRITERS) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, state in zip(names, found, strict=True):
        WRITERS.get(name, WRITERS["step-10.pt"])(state, folder / name)
    return folder


def by_hand(found: list[dict], names: list[str]) -> torch.Tensor:
    return torch.stack([torch.cat([s[n].flatten() for n in names]) for s in found])


@pytest.mark.parametrize("how", ["folder", "pattern", "list"])
def test_every_format_is_read_in_natural_order(tmp_path, how):
    found = states(7, vary="5.")
    folder = written(tmp_path / "runs [1]", found)
    (folder / "README.md").write_text("mine")
    files = {"folder": folder, "pattern": str(tmp_path / "runs*" / "step-*"), "list": [folder / n for n in reversed(WRITERS)]}[how]
    net = network(99)
    sub = subset.select(net, "5.*")
    z = zoo.of(files, net, sub, progress=False)
    assert torch.equal(z.theta, by_hand(found, ["5.weight", "5.bias"])) and (z.names, len(z.losses)) == (sub.names, 0)
    # The network around the subset is that of the files, and its subset the last one's.
    assert all(torch.equal(v, found[-1][k]) for k, v in net.state_dict().items()) and not net.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    found = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()} for s in states(2, vary="5.")]
    net = network(9)
    z = zoo.of(written(tmp_path, found, ["a.pt", "b.pt"]), net, subset.select(net, "5.*"), progress=False)
    assert z.theta.dtype == torch.float32 and torch.equal(z.theta, by_hand(found, ["5.weight", "5.bias"]).float())


def test_files_of_the_subset_alone_leave_the_rest_of_the_network(tmp_path):
    found = [{k: v for k, v in s.items() if k.startswith("5.")} for s in states(3, vary="5.")]
    net, before = network(9), network(9).state_dict()
    z = zoo.of(written(tmp_path, found, ["1.pt", "2.pt", "3.pt"]), net, subset.select(net, "5.*"), progress=False)
    assert torch.equal(z.theta, by_hand(found, ["5.weight", "5.bias"]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if not k.startswith("5."))


def changed(key, value):
    return lambda s: {**s, key: value(s[key])}


@pytest.mark.parametrize("change, message", [
    (lambda s: [v for v in s.values()], r"holds list: expected a state dict"),
    (lambda s: {"model": s, "state_dict": s}, "holds state dicts under state_dict and model: expected a state dict"),
    (lambda s: {"epoch": 3, "weights": s}, "holds epoch: int, weights: dict: expected a state dict"),
    (lambda s: {k: v for k, v in s.items() if k != "5.bias"}, "not all of its tensors are the network's\nmissing: 5.bias$"),
    (lambda s: {**s, "6.weight": s["5.bias"], "6.bias": s["5.bias"], "7": s["5.bias"], "8": s["5.bias"]},
     "\nunexpected: 6.weight, 6.bias, 7 and 1 more$"),
    (changed("5.weight", lambda t: t[:, :3]), r"\nanother shape: 5.weight \[10, 3\] \(expected \[10, 4\]\)$"),
    (changed("5.weight", lambda t: (t * 9).to(torch.int8)), "5.weight holds numbers of type torch.int8"),
    (changed("5.weight", lambda t: t * float("nan")), "5.weight holds NaN or infinity in 40 of 40"),
    (changed("1.running_var", lambda t: -t), "negative variance"),
    (changed("5.weight", lambda t: t.to_sparse()), "5.weight: expected dense tensors"),
    (changed("0.bias", lambda t: t + 1), "b.pt' differs from '.*a.pt' outside the subset: 0.bias: expected the same.*'all'"),
    (changed("1.running_mean", lambda t: t + 1), "outside the subset: 1.running_mean: .*buffers 'checkpoint'.*'recalibrate'.*`weights`"),
    (lambda s: {k: v for k, v in s.items() if k[0] == "5"}, "outside the subset: 0.weight, 0.bias, 1.weight and 3 more: expected")])
def test_what_does_not_fit_is_named_in_few_lines(tmp_path, change, message):
    first, second = states(2, vary="5.")
    written(tmp_path, [first, change(second)], ["a.pt", "b.pt"])
    net, before = network(9), network(9).state_dict()
    with pytest.raises(ValueError, match=message) as error:
        zoo.of(tmp_path, net, subset.select(net, "5.*"), progress=False)
    assert "b.pt" in str(error.value) and str(error.value).count("\n") < 10 and len(str(error.value)) < 1000
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("files, message", [
    ("nowhere", "'nowhere': 0 files, expected at least two"), ("a.pt", "1 files"), ("*.pt", "1 files"), (["a.pt", "a.pt"], "each once"),
    (["a.pt", "b.pt"], "checkpoint 'b.pt': expected a file that ends in .safetensors, .pt"), (["a.pt", "n.txt"], "n.txt")])
def test_files_that_are_no_checkpoints_are_named(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").write_bytes(b"")
    Path("n.txt").write_text("notes")
    with pytest.raises(ValueError, match=message):
        checkpoints.find(files)


def test_tied_tensors_belong_to_the_subset_under_both_names(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
        net[1].weight = net[0].weight
        net[2].load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        return net

    for i in range(3):
        torch.save(tied(i).state_dict(), tmp_path / f"{i}.pt")
    net = tied(9)
    z = zoo.of(tmp_path, net, subset.select(net, "0.*"), progress=False)
    assert torch.equal(z.theta, torch.stack([tied(i)[0].weight.detach().flatten() for i in range(3)]))
    assert torch.equal(net[1].weight, tied(2)[0].weight)


def plain(state: dict, x: torch.Tensor) -> torch.Tensor:
    net = network()
    net.load_state_dict(state)
    with torch.no_grad():
        return net(x).argmax(1)


@pytest.mark.parametrize("at_once", [1, 3])
def test_vectors_with_running_statistics_are_whole_networks(at_once):
    found, net = states(5), network(9)
    sub = subset.with_statistics(net, subset.select(net, "all"))
    theta = torch.stack([sub.flatten(s) for s in found])
    assert torch.equal(theta[:, -4:], torch.stack([s["1.running_var"].log() for s in found]))
    x = 4 * torch.randn(50, 1, 8, 8) + 4 * torch.randn(50, 1, 1, 1)
    expected = torch.stack([plain(s, x) for s in found])
    assert len(expected.unique(dim=0)) == 5 and sum(len(row.unique()) > 1 for row in expected) > 2
    assert torch.equal(evaluate.predict(net, sub, theta, x, vectors_at_once=at_once, device=DEVICE), expected)
    loaded = sub.load(net, theta[2]).state_dict()
    torch.testing.assert_close(loaded, {**found[2], "1.num_batches_tracked": loaded["1.num_batches_tracked"]}, rtol=1e-6, atol=0)


def test_no_generated_variance_is_negative_or_infinite():
    net = network()
    sub = subset.statistics(net)
    net[1].running_var.zero_()
    assert torch.isfinite(sub.flatten(net)).all()
    variance = sub.unflatten(torch.tensor([0.0] * 4 + [-500.0, 0.0, 30.0, 500.0]))["1.running_var"]
    assert torch.isfinite(variance).all() and (variance >= 0).all() and variance[1] == 1


def test_recalibrated_statistics_are_those_of_the_images():
    net, x = network(), torch.rand(300, 1, 8, 8)
    sub = subset.select(net, "all")
    theta = torch.stack([sub.flatten(network(i)) for i in (3, 4)])
    before = copy.deepcopy(net.state_dict())
    found = recalibrate.recalibrated(net, sub, theta, x, prepare=lambda x: 2 * x, device=DEVICE)
    assert torch.equal(found[:, : sub.numel], theta) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for i, row in zip((3, 4), found):
        with torch.no_grad():
            inner = network(i)[0](2 * x)
        expected = [torch.stack([part.mean((0, 2, 3)) for part in inner.chunk(2)]).mean(0),
                    torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in inner.chunk(2)]).mean(0).log()]
        torch.testing.assert_close(row[sub.numel:], torch.cat(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1 images: expected at least 2"):
        recalibrate.recalibrated(net, sub, theta, x[:1])
    with pytest.raises(ValueError, match="has no batch norm with running statistics"):
        subset.with_statistics(nn.Linear(2, 2), subset.Subset(("weight",), ((2, 2),)))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A working folder with a network of one's own and checkpoints that differ everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path / "runs"))
    (tmp_path / "own_net.py").write_text(CODE)
    for name in ("own_net", "helper_of_own_net"):
        sys.modules.pop(name, None)
    written(tmp_path / "ck", states(7))
    return tmp_path


def experiment(**changes) -> Experiment:
    return Experiment(Recipe.of(**{**SMALL, "checkpoints": "ck", **changes}), device=DEVICE, progress=False)


def test_originals_are_the_files(home):
    e = experiment(buffers="checkpoint")
    x = e.task.images.prepare(e.task.images.x_test)
    expected = torch.stack([plain(s, x) for s in states(7)])
    assert torch.equal(e.predictions(ORIGINAL).long(), expected) and e.k == 7
    assert torch.equal(e.zoo.theta[:, -4:], torch.stack([s["1.running_var"].log() for s in states(7)]))
    assert "K = 7 own checkpoints" in e.title and "running statistics in the vectors" in e.title
    assert e.summary([ORIGINAL, AVERAGE]).columns.name == "running statistics in the vectors"
    again = experiment(buffers="checkpoint")
    again._checkpoints
    assert again.store.seconds.keys() == {"checkpoints"} and len(list((home / "runs/stages/checkpoints").glob("*.safetensors"))) == 1
    WRITERS["step-2.safetensors"](states(8)[7], home / "ck" / "step-2.safetensors")  # another content is another zoo
    assert not torch.equal(experiment(buffers="checkpoint").zoo.theta[0], e.zoo.theta[0])


def test_recalibrated_networks_are_evaluated_with_statistics_of_their_own(home):
    e = experiment(buffers="recalibrate", recalibrate_images=60)
    assert e.subset == subset.select(network(), "all") and "recalibrated on 60 training items" in e.title
    pick = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:60]
    expected = []
    for state in states(7):
        net = network()
        net.load_state_dict(state)
        torch.optim.swa_utils.update_bn([e.task.images.prepare(e.task.images.x_train[pick])], net)
        expected.append(net(e.task.images.prepare(e.task.images.x_test)).argmax(1))
    assert torch.equal(e.predictions(ORIGINAL).long(), torch.stack(expected))


def test_a_network_that_overflows_under_recalibration_has_no_class(home):
    e = experiment(buffers="recalibrate")
    theta = e.zoo.theta[:2].clone()
    theta[1] *= 1e30
    with pytest.warns(UserWarning, match="1 of 2 networks give scores that are NaN"):
        predictions = e.predictions_of(theta)
    assert (predictions[1] == evaluate.NO_CLASS).all() and torch.equal(predictions[0], e.predictions(ORIGINAL)[0])


def test_whose_running_statistics_serve_is_never_guessed(home):
    with pytest.raises(ValueError, match="outside the subset: 1.running_mean, 1.running_var: .*buffers 'checkpoint'"):
        experiment().zoo
    save_file(network(50).state_dict(), home / "base.safetensors")
    e = experiment(weights="base.safetensors")
    e.zoo
    assert torch.equal(e.net[1].running_mean.cpu(), network(50)[1].running_mean)
    assert torch.equal(e.net[0].weight.cpu(), states(7)[-1]["0.weight"])
    written(home / "same", states(3, vary="5."), ["1.pt", "2.pt", "3.pt"])
    same = experiment(checkpoints="same", weights="base.safetensors")
    assert torch.equal(same.net[1].running_mean.cpu(), network()[1].running_mean)  # of the files, where they agree
    assert "running statistics of the trained network" in same.title


@pytest.mark.parametrize("changes, message", [
    ({"checkpoints": "nowhere"}, "'nowhere': 0 files"), ({"zoo_mode": "independent"}, "zoo_mode is 'independent' with checkpoints"),
    ({"buffers": "mine"}, "buffers is 'mine'"), ({"network": "hyperrep-cnn", "image_size": 32, "buffers": "checkpoint"}, "no batch norm"),
    ({"input_mean": [0.5]}, r"input_mean \[0.5\] and input_std \[\]"), ({"input_mean": [0.5] * 2, "input_std": [1.0] * 2}, "expected 1 numbers"),
    ({"network": "own_net:absent"}, "has no 'absent'"), ({"network": "no_net:small"}, "module no_net cannot be imported"),
    ({"checkpoints": "", "pretrained": True}, "no published weights")])
def test_what_is_wrong_is_said_before_any_work(home, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(**changes)


def test_files_of_a_part_need_weights_for_the_rest(home):
    written(home / "part", [{k: v for k, v in s.items() if k[0] == "5"} for s in states(3)], ["1.pt", "2.pt", "3.pt"])
    part = {"checkpoints": "part", "subset": "5.*"}
    with pytest.raises(ValueError, match="missing: 0.weight, 0.bias, 1.weight and 3 more"):
        experiment(**part).zoo
    save_file(network(50).state_dict(), home / "base.safetensors")
    e = experiment(**part, weights="base.safetensors")
    assert e.zoo.theta.shape == (3, 50) and torch.equal(e.net[0].weight.cpu(), network(50)[0].weight)


def test_the_input_scale_is_a_setting_and_part_of_the_images_identity():
    images = data.load("digits", train_images=50, test_images=20)
    other = images.scaled([0.5], [0.25])
    torch.testing.assert_close(other.prepare(images.x_test), (images.x_test / 255 - 0.5) / 0.25)
    assert len({i.training_digest for i in (images, other, images.scaled([0.5], [0.2]), images.scaled([0.4], [0.25]))}) == 4
    assert images.scaled((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).mean == pytest.approx((0.5,)) and "0.5" in other.scale
    e = Experiment(Recipe.of(**{**SMALL, "network": "test_resnet", "image_size": 32, "input_mean": [0.5], "input_std": [0.25]}),
                   runs.Store(None), progress=False)
    assert e.task.images.mean == (0.5,)


def test_published_weights_bring_their_own_scale(monkeypatch):
    made = networks.create("test_resnet", 10, 1, 32)
    monkeypatch.setattr(classification.networks, "create", lambda *a, **k: made)
    e = Experiment(Recipe.of(**{**SMALL, "network": "test_resnet", "image_size": 32, "pretrained": True}), runs.Store(None), progress=False)
    assert e.task.images.mean == pytest.approx((sum(made.pretrained_cfg["mean"]) / 3,))


def test_ones_own_code_is_part_of_the_identity(home):
    values = {"network": "own_net:small", "checkpoints": "ck"}
    first, digest = inputs.digests(inputs.of(values, home)), networks.code_key("own_net:small")
    assert first.keys() == {"network", "checkpoints"} and len(first["checkpoints"]) == 7 and networks.code_key("resnet18") == {}
    (home / "own_net.py").write_text("from helper_of_own_net import relu\n" + CODE.replace("nn.ReLU()", "relu()"))
    (home / "helper_of_own_net.py").write_text("from torch import nn\ndef relu():\n    return nn.ReLU()\n")
    second = inputs.digests(inputs.of(values, home))
    (home / "helper_of_own_net.py").write_text("from torch import nn\ndef relu():\n    return nn.Tanh()\n")
    third = inputs.digests(inputs.of(values, home))
    assert len({str(f["network"]) for f in (first, second, third)}) == 3 and len(third["network"]) == 2
    before = experiment(checkpoints="", base_epochs=0).net_digest
    for name in ("own_net", "helper_of_own_net"):
        sys.modules.pop(name, None)
    assert isinstance(networks.create("own_net:small", 10, 1, 8)[2], nn.Tanh)
    assert networks.code_key("own_net:small") != digest
    assert experiment(checkpoints="", base_epochs=0).net_digest != before  # of the same numbers
