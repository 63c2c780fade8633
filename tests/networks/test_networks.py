"""networks.py: counts of the paper's Table 6, what each network takes, and every refusal."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from pdiff_lib import networks

TABLE_6 = {"convnet-mini": 24262, "mlp-mini": 66970, "resnet-mini": 25138, "vit-mini": 80714, "convnext-mini": 74970}
SMALL = [*TABLE_6, "hyperrep-cnn", "hyperrep-2464", "mlp-10", "mlp-32-32"]


@pytest.mark.parametrize("name, count", TABLE_6.items())
def test_minis_have_the_papers_parameter_counts(name, count):
    net = networks.create(name, 10)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net.input_shape == (3, 64, 64)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_chans, num_classes", [(3, 10), (1, 4)])
def test_small_networks_classify_and_learn_everywhere(name, in_chans, num_classes):
    net = networks.create(name, num_classes, in_chans=in_chans)
    out = net(torch.randn(2, *net.input_shape))
    assert out.shape == (2, num_classes)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_vit_mini_positions_are_distinct_and_not_saved():
    net = networks.create("vit-mini", 10)
    assert torch.cdist(net.positions, net.positions).fill_diagonal_(9).min() > 0.1
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("name, in_chans, size, count", [
    ("hyperrep-2464", 1, None, 2464), ("hyperrep-cnn", 3, None, 10_853), ("mlp-10", 1, 8, 760), ("mlp-16", 1, None, 12_730), ("mlp-10", 1, 28, 7960),
    ("mlp-32-32", 1, None, 26_506)])
def test_networks_of_other_papers_zoos_have_their_parameter_counts(name, in_chans, size, count):
    net = networks.create(name, 10, in_chans, size)
    assert sum(p.numel() for p in net.parameters()) == count
    networks.check(net, net.input_shape)


def test_an_mlp_is_what_its_name_says():
    net = networks.create("mlp-5-3", 2, 1, 4, seed=1)
    x, (a, b, c) = torch.randn(3, 1, 4, 4), [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in (a, b, c)] == [5, 3, 2]
    torch.testing.assert_close(net(x), c(b(a(x.flatten(1)).relu()).relu()))
    for name in ("mlp-", "mlp-0", "mlp-3-"):
        with pytest.raises(ValueError, match=f"network '{name}' is unknown"):
            networks.create(name, 2)


def test_hyperrep_cnn_is_meant_for_32():
    assert networks.create("hyperrep-cnn", 10).input_shape == (3, 32, 32)


@pytest.mark.parametrize("name, image_size, shape", [
    ("resnet18", None, (1, 224, 224)), ("resnet18", 32, (1, 32, 32)),
    ("vit_tiny_patch16_224", None, (1, 224, 224)), ("vit_tiny_patch16_224", 64, (1, 64, 64))])
def test_timm_networks_take_the_size_they_were_asked_for(name, image_size, shape):
    net = networks.create(name, 7, in_chans=1, image_size=image_size)
    assert net.input_shape == shape and net.training
    networks.check(net, shape)
    assert net.eval()(torch.zeros(1, *shape)).shape == (1, 7)


def test_seed_decides_the_weights_and_leaves_the_global_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (networks.create("resnet18", 10, seed=s).conv1.weight for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_weights_round_trip(tmp_path):
    net = networks.create("convnet-mini", 10, seed=1)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    again = networks.create("convnet-mini", 10, weights=tmp_path / "w.safetensors", seed=2)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def changed(file, change, network="test_resnet", classes=10):
    """A file of a network's weights, with a change."""
    state = networks.create(network, classes, image_size=None if "-" in network else 32, seed=1).state_dict()
    state = change(state) or state
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    return state


def renamed(name):
    return lambda state: {name(k): v for k, v in state.items()}


@pytest.mark.parametrize("name", [
    "module.{}", "_orig_mod.{}", "model.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "state_dict.net.{}", "a.b.c.d.{}"])
@pytest.mark.parametrize("network", ["test_resnet", "hyperrep-cnn", "mlp-mini"])
def test_what_wrappers_put_before_names_is_taken_off(tmp_path, name, network):
    state = changed(tmp_path / "w", renamed(name.format), network)
    net = networks.create(network, 10, image_size=None if "-" in network else 32, weights=tmp_path / "w", seed=2)
    assert all(torch.equal(v, state[name.format(k)]) for k, v in net.state_dict().items())


def test_a_compiled_part_of_a_network_is_that_part(tmp_path):
    state = changed(tmp_path / "w", renamed(lambda k: k.replace("layer1.", "layer1._orig_mod.")))
    net = networks.create("test_resnet", 10, weights=tmp_path / "w", seed=2)
    assert torch.equal(net.layer1[0].conv1.weight, state["layer1._orig_mod.0.conv1.weight"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 0), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_floats_of_other_sizes_are_taken(tmp_path, dtype, tolerance):
    changed(tmp_path / "w", lambda s: {k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()})
    net, same = networks.create("test_resnet", 10, weights=tmp_path / "w"), networks.create("test_resnet", 10, seed=1)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    torch.testing.assert_close(net.state_dict(), same.state_dict(), rtol=tolerance, atol=1e-6)


def old(state):
    """As torch wrote it before it counted batches."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_weights_for_other_classes_are_taken_without_their_head_where_that_is_asked_for(tmp_path, capsys):
    state = changed(tmp_path / "w", lambda s: None, classes=5)
    net, own = networks.create("test_resnet", 10, weights=tmp_path / "w", seed=2, new_head=True), networks.create("test_resnet", 10, seed=2)
    assert torch.equal(net.bn1.bias, state["bn1.bias"]) and torch.equal(net.layer1[0].conv1.weight, state["layer1.0.conv1.weight"]) and torch.equal(net.fc.weight, own.fc.weight) and net.new_head
    assert "are for 5 classes: fc.weight, fc.bias start anew, for 10" in capsys.readouterr().out
    assert not networks.create("test_resnet", 5, weights=tmp_path / "w", new_head=True).new_head and capsys.readouterr().out == ""
    changed(tmp_path / "w", lambda s: {**s, "layer1.0.conv1.weight": s["layer1.0.conv1.weight"][:, :1].clone()}, classes=5)
    with pytest.raises(ValueError, match="not all of its tensors are the network's"):
        networks.create("test_resnet", 10, weights=tmp_path / "w", new_head=True)



def test_weights_without_counts_of_batches_are_taken(tmp_path):
    changed(tmp_path / "w", old)
    assert networks.create("test_resnet", 10, weights=tmp_path / "w").bn1.num_batches_tracked == 0


def with_number(key, value, count=1):
    def change(state):
        state[key].view(-1)[:count] = value
    return change


def quantised(*keys):
    return lambda state: {k: (v * 100).to(torch.int8) if k in keys else v for k, v in state.items()}


@pytest.mark.parametrize("change, message", [
    (with_number("bn1.running_var", float("nan")), r"^weights '.*w': bn1.running_var holds NaN or infinity in 1 of \d+ "),
    (with_number("fc.weight", float("-inf"), 7), "fc.weight holds NaN or infinity in 7 of"),
    (lambda s: {k: v.double() * (1e300 if k == "fc.bias" else 1) if v.is_floating_point() else v for k, v in s.items()},
     "fc.bias holds NaN or infinity in 10 of 10 numbers: expected finite ones, also as float32"),
    (lambda s: [v.fill_(float("nan")) for v in s.values() if v.is_floating_point()] and None,
     r"bn1.bias holds NaN .* \(and so do .*, .*, .* and \d+ more\)"),
    (with_number("bn1.running_var", -0.5, 2), "bn1.running_var holds a negative variance in 2 of .*expected none below 0"),
    (quantised("fc.weight"), "fc.weight holds numbers of type torch.int8: expected floats of 16, 32 or 64 bits; quantised"),
    (lambda s: {k: v.to(torch.int64) for k, v in s.items()}, "holds numbers of type torch.int64: expected floats"),
    (lambda s: {k: v.to(torch.float8_e4m3fn) if "fc" in k else v for k, v in s.items()}, "type torch.float8_e4m3fn"),
    (lambda s: {k: v > 0 if "fc" in k else v for k, v in s.items()}, "type torch.bool")])
def test_weights_that_are_no_numbers_are_refused_where_they_are_read(tmp_path, change, message):
    changed(tmp_path / "w", change)
    with pytest.raises(ValueError, match=message) as error:
        networks.create("test_resnet", 10, weights=tmp_path / "w")
    assert str(error.value).count("\n") == 0


def averaged(state):
    """As `torch.optim.swa_utils.AveragedModel` has it."""
    return {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in state.items()}}


@pytest.mark.parametrize("change, message", [
    (lambda s: {"extra" if k == "fc.bias" else k: v for k, v in s.items()},
     r"test_resnet with 10 classes: not all of its tensors are the network's\nmissing: fc.bias\nunexpected: extra$"),
    (averaged, "92 of its 93 names begin with 'module.'; expected all, but not n_averaged$"),
    (lambda s: {**s, "ema.fc.bias": s["fc.bias"].clone()}, r"not all of its.*\nunexpected: ema.fc.bias$"),
    (lambda s: networks.create("resnet18", 10).state_dict(), "another network's\nmissing: .*, .*, .* and \\d+ more\nunexp"),
    (lambda s: {"a.b.weight": torch.zeros(3)}, "they are another network's"),
    (lambda s: networks.create("test_resnet", 5).state_dict(),
     r"with 10 classes: they are for 5 classes\nanother shape: fc.weight \[5, \d+\] \(expected \[10, \d+\]\), fc.bias \[5\]"),
    (lambda s: networks.create("test_resnet", 10, in_chans=1).state_dict(), r"\nanother shape: conv1.*expected \[\d+, 3,")])
def test_weights_that_do_not_fit_say_why_in_a_few_lines(tmp_path, change, message):
    changed(tmp_path / "w", change)
    with pytest.raises(ValueError, match=message) as error:
        networks.create("test_resnet", 10, weights=tmp_path / "w")
    assert str(error.value).count("\n") < 10 and len(str(error.value)) < 1000
    assert error.value.__cause__ is None  # torch's own message lists every name


class _Trap:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("file, message", [("w.pt", r"without running code \(it needs .*getattr"), ("w.CKPT", "without running"),
                                           ("w.safetensors", "not a safetensors file"), ("w.npz", "not a safetensors file")])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_would_run_code_is_refused_unopened_whatever_its_name(tmp_path, file, message, legacy):
    torch.save({"weight": _Trap(tmp_path / "sprung")}, tmp_path / file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=message):
        networks.create("convnet-mini", 10, weights=tmp_path / file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kwargs, message", [
    (dict(name="resnet19"), "'resnet19' is unknown.*resnet18"),
    (dict(name="convnet-min"), "did you mean convnet-mini"),
    (dict(name="qqqqqqqq"), "expected convnet-mini"),
    (dict(name="hf-hub:someone/model"), "is unknown"),
    (dict(name="resnet18.nonsense"), r"'resnet18\.nonsense' is unknown.*resnet18\.a1_in1k"),
    (dict(name="convnet-mini", num_classes=0), "num_classes = 0"),
    (dict(name="convnet-mini", in_chans=0), "in_chans = 0"),
    (dict(name="resnet18", image_size=-1), "image_size = -1"),
    (dict(name="convnet-mini", image_size=32), "image_size = 32: convnet-mini takes 64x64"),
    (dict(name="convnet-mini", pretrained=True), "no published weights of convnet-mini"),
    (dict(name="resnet18", pretrained=True, weights="w"), "not both"),
    (dict(name="resnet18", weights="nowhere.safetensors"), "'nowhere.safetensors': there is no such file"),
])
def test_wrong_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        networks.create(**{"num_classes": 10, **kwargs})


def test_failing_download_names_the_model(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match="resnet18: its published weights.*no route to host"):
        networks.create("resnet18", 10, pretrained=True)
    with pytest.raises(ValueError, match="timm cannot build resnet18"):
        networks.create("resnet18", 10)


@pytest.mark.parametrize("name", SMALL)
def test_check_refuses_other_sizes_and_channels(name):
    net = networks.create(name, 10)
    networks.check(net, net.input_shape)
    # ConvNeXt-mini pools globally, so larger images fit; MLP-mini averages the channels, so any number of them does.
    larger = [] if name == "convnext-mini" else [(3, 128, 128)]
    grey = [] if name == "mlp-mini" else [(1, *net.input_shape[1:])]
    for shape in [(3, 27, 20), *larger, *grey]:
        with pytest.raises(ValueError) as error:
            networks.check(net, shape)
        assert str(list(shape)) in str(error.value) and str(list(net.input_shape)) in str(error.value)


def test_check_restores_every_mode_and_statistic():
    net = networks.create("resnet18", 10)
    net.layer1.eval()
    modes, mean = [m.training for m in net.modules()], net.bn1.running_mean.clone()
    networks.check(net, (3, 32, 32))
    with pytest.raises(ValueError):
        networks.check(net, (1, 32, 32))
    assert [m.training for m in net.modules()] == modes and torch.equal(net.bn1.running_mean, mean)
