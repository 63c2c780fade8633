"""zoo.py: training and collecting against loops written by hand, files that come back whole or are refused."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from device import DEVICE
from pdiff_lib import zoo
from pdiff_lib.base import recipe, runs, training
from pdiff_lib.networks import subset
from pdiff_lib.tasks import data

SETTINGS = {"k_checkpoints": 6, "zoo_lr": 0.01, "zoo_batch": 16, "zoo_weight_decay": 0.1, "crop_scale": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def images() -> data.Images:
    """24 bright and 24 dark noisy pictures, and as many to test."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 2
    x = (torch.randint(0, 156, (2, 48, 3, 8, 8), generator=g) + 100 * y.view(48, 1, 1, 1)).byte()
    return data.Images("two", "made here", x[0], y, x[1], y, ("dark", "bright"), 8)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    net.input_shape = (3, 8, 8)
    return net


@pytest.fixture
def norm(net) -> subset.Subset:
    return subset.select(net, "last_norms:1")


def snapshot(net: nn.Module) -> dict:
    return {
        **{k: v.clone() for k, v in net.state_dict().items()},
        "modes": [m.training for m in net.modules()],
        "grads": [p.requires_grad for p in net.parameters()],
        "grad": [p.grad for p in net.parameters()],
    }


def unchanged(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def collect(net, sub, images, **changes) -> zoo.Zoo:
    return zoo.collect(net, sub, images, progress=False, device=DEVICE, **{**SETTINGS, **changes})


def test_training_learns(net, images):
    before = F.cross_entropy(net.eval()(images.prepare(images.x_test)), images.y_test).item()
    losses = zoo.train(
        net, images, progress=False, device=DEVICE, base_epochs=15, base_lr=0.05, base_batch=16, crop_scale=0.5
    )
    assert losses.shape == (15 * 3,) and not net.training
    with torch.no_grad():
        scores = net(images.prepare(images.x_test.to(DEVICE))).cpu()
    assert F.cross_entropy(scores, images.y_test).item() < 0.5 * before
    assert (scores.argmax(1) == images.y_test).float().mean() > 0.9


def by_hand(net, images, optimizer, steps: int, batch: int, stream: str, schedule=None) -> tuple[list, list]:
    """Plain steps on the augmented batches that the library documents; losses and snapshots of the parameters."""
    losses, after = [], []
    per_epoch = len(images.y_train) // batch
    for i in range(steps):
        order = data.epoch_order(len(images.y_train), i // per_epoch, training.seed_for(SETTINGS["seed"], stream))
        pick = order[i % per_epoch * batch :][:batch]
        x = images.augment(images.x_train[pick].to(DEVICE), training.seed_for(SETTINGS["seed"], stream, i), True, (0.5, 1.0))
        loss = F.cross_entropy(net(x), images.y_train[pick].to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        losses.append(loss.item())
        after.append({n: p.detach().cpu().clone() for n, p in net.named_parameters()})
    return losses, after


def test_training_is_the_loop_one_writes_by_hand(net, images):
    torch.manual_seed(1)
    hand = nn.Sequential(*map(type_copy, net)).train()
    hand.load_state_dict(net.state_dict())
    hand.to(DEVICE)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=0.02, weight_decay=5e-4)
    losses, after = by_hand(
        hand, images, optimizer, 4, 20, "train", torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    )
    ours = zoo.train(
        net, images, progress=False, device=DEVICE, base_epochs=2, base_lr=0.02, base_batch=20, crop_scale=0.5, seed=3
    )
    torch.testing.assert_close(ours, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close({n: p.detach().cpu() for n, p in net.named_parameters()}, after[-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net[1].running_var, hand[1].running_var)


def type_copy(module: nn.Module) -> nn.Module:
    """A layer of the same kind and size, made anew."""
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(3, 4, 3)
    if isinstance(module, nn.Linear):
        return nn.Linear(4, 2)
    return nn.BatchNorm2d(4) if isinstance(module, nn.BatchNorm2d) else module


def test_collecting_is_the_loop_one_writes_by_hand(net, norm, images):
    z = collect(net, norm, images)
    for p in net.to(DEVICE).parameters():
        p.requires_grad_(False)
    chosen = [net[1].weight.requires_grad_(), net[1].bias.requires_grad_()]
    optimizer = torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.1)
    losses, after = by_hand(net.train(), images, optimizer, 6, 16, "zoo")  # the second epoch starts at step 3
    expected = torch.stack([torch.cat([p["1.weight"], p["1.bias"]]) for p in after])
    assert (z.names, z.shapes) == (("1.weight", "1.bias"), ((4,), (4,)))
    torch.testing.assert_close(z.theta, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after[-1]["0.weight"], net[0].weight.detach().cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("choice", ["last_norms:1", "all", "5.bias"])
def test_every_step_is_kept_and_the_network_is_not_touched(net, images, choice):
    zoo.train(net, images, progress=False, device=DEVICE, base_epochs=1, base_batch=16)
    sub = subset.select(net, choice)
    net[0].weight.requires_grad_(False)
    net[3].train()  # a mode of its own
    before = snapshot(net)
    z = collect(net, sub, images)
    assert unchanged(snapshot(net), before)
    assert z.theta.shape == (6, sub.numel) and z.theta.dtype == torch.float32 and z.theta.device.type == "cpu"
    assert (torch.vstack([sub.flatten(net).cpu(), z.theta]).diff(dim=0) != 0).any(dim=1).all()
    assert not z.theta.requires_grad


def test_only_the_subset_changes(net, images, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "loop", lambda *a, loop=training.loop, **k: seen.append(a[2]["net"]) or loop(*a, **k))
    sub = subset.select(net, "5.bias")
    z = collect(net, sub, images)
    copy, original = dict(seen[0].cpu().named_parameters()), dict(net.named_parameters())
    assert [n for n in copy if not torch.equal(copy[n], original[n])] == ["5.bias"]
    assert torch.equal(copy["5.bias"], z.theta[-1])


def test_the_seed_decides(net, norm, images):
    first = collect(net, norm, images)
    torch.manual_seed(99)  # the global random state does not matter
    again, other = collect(net, norm, images), collect(net, norm, images, seed=4)
    assert torch.equal(first.theta, again.theta) and torch.equal(first.losses, again.losses)
    assert not torch.equal(first.theta, other.theta)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k_checkpoints": 1}, "k_checkpoints is 1: expected at least 2"),
        ({"k_checkpoints": 0}, "at least 2"),
        ({"zoo_lr": -0.1}, "zoo_lr is -0.1"),
        ({"zoo_optimiser": "sgd"}, "did you mean 'zoo_optimizer'"),
    ],
)
def test_impossible_settings_are_refused(net, norm, images, changes, message):
    with pytest.raises(ValueError, match=message):
        collect(net, norm, images, **changes)


def test_a_subset_of_another_network_is_refused(net, images):
    other = subset.Subset(("9.weight",), ((4,),))
    with pytest.raises(ValueError, match="9.weight"):
        collect(net, other, images)


def test_a_resumed_collection_is_bitwise_the_uninterrupted_one(net, norm, images, tmp_path, monkeypatch):
    whole, augment, calls = collect(net, norm, images), data.Images.augment_many, []

    def third_fails(self, x, *args):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return augment(self, x, *args)

    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(data.Images, "augment_many", third_fails)
    with pytest.raises(KeyboardInterrupt):
        collect(net, norm, images, checkpoint=runs.Checkpoint(tmp_path / "p"))
    resumed = collect(net, norm, images, checkpoint=runs.Checkpoint(tmp_path / "p"))
    assert len(calls) == 3 + 4  # steps 0 and 1 were not repeated
    assert torch.equal(resumed.theta, whole.theta) and torch.equal(resumed.losses, whole.losses)


@pytest.fixture
def saved(net, norm, tmp_path):
    z = zoo.Zoo(torch.randn(5, 8), norm.names, norm.shapes, torch.rand(5))
    z.save(tmp_path / "zoo.safetensors")
    return z, tmp_path / "zoo.safetensors"


def test_a_zoo_comes_back_from_its_file(saved, norm):
    z, path = saved
    for back in (zoo.load(path), zoo.load(str(path), norm)):
        assert torch.equal(back.theta, z.theta) and torch.equal(back.losses, z.losses)
        assert (back.names, back.shapes) == (z.names, z.shapes)


def test_a_zoo_of_another_network_is_refused(saved, net):
    for choice in ("0.*", "1.weight", "all"):
        with pytest.raises(ValueError, match="is a zoo of 2 tensors with 8 numbers"):
            zoo.load(saved[1], subset.select(net, choice))


def test_what_is_no_zoo_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no zoo file"):
        zoo.load(tmp_path / "absent")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"theta": [1.0]}))
    torch.save({"theta": torch.zeros(3, 8)}, tmp_path / "torch")
    for name in ("pickle", "torch"):
        with pytest.raises(ValueError, match="pickle among them, are refused"):
            zoo.load(tmp_path / name)
    runs.write(tmp_path / "stage", {"theta": torch.zeros(2, 2)}, {"seconds": 1})
    with pytest.raises(ValueError, match="expected a zoo"):
        zoo.load(tmp_path / "stage")


def test_checkpoints_that_are_not_the_workbooks_are_told_how_to_come_in(net, norm, tmp_path):
    for i in range(3):
        state = {k: v + i if k in norm.names else v for k, v in net.state_dict().items()}
        save_file(state, tmp_path / ("foreign.safetensors" if i == 0 else f"foreign-{i}.safetensors"))
    with pytest.raises(ValueError, match=r"not a zoo of this workbook \(it holds .* and \d+ more\): bring .*") as error:
        zoo.load(tmp_path / "foreign.safetensors")
    how = str(error.value).partition("of your own with ")[2]
    z = eval(how, {"zoo": zoo, "files": tmp_path, "net": net, "sub": norm})
    assert torch.equal(z.theta.sort(dim=0).values, torch.tensor([[1.0 + i] * 4 + [0.0 + i] * 4 for i in range(3)]))


@pytest.mark.parametrize("theta, message", [
    (torch.zeros(3, 7), r"shape \[3, 7\]: expected \[vectors, 8\]"),
    (torch.full((3, 8), torch.nan), "NaN or infinity in 3 of 3"),
    (torch.zeros(3, 8, dtype=torch.int64), "numbers of type torch.int64"), (torch.zeros(8), "a single vector is theta.None.")])
def test_a_zoo_holds_vectors_of_its_subset(unchecked, norm, tmp_path, theta, message):
    with pytest.raises(ValueError, match=message):
        zoo.Zoo(theta, norm.names, norm.shapes, torch.empty(0))
    runs.write(tmp_path / "zoo", {"theta": theta, "losses": torch.empty(0)},
               {"names": norm.names, "shapes": [list(s) for s in norm.shapes]})
    with pytest.raises(ValueError, match=message):
        zoo.load(tmp_path / "zoo")


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.bfloat16(), lambda t: t.numpy().astype(">f8"),
                                    lambda t: t.clone().requires_grad_()])
def test_a_zoo_takes_all_floats(norm, tmp_path, change):
    theta = torch.arange(24.0).reshape(3, 8)
    z = zoo.Zoo(change(theta), norm.names, norm.shapes, torch.empty(0))
    z.save(tmp_path / "zoo")
    for found in (z.theta, zoo.load(tmp_path / "zoo").theta):
        assert torch.equal(found, theta) and found.dtype == torch.float32 and not found.requires_grad


def test_defaults_are_the_papers():
    z, b = recipe.Zoo(), recipe.Base()
    assert (z.k_checkpoints, z.zoo_lr, z.subset, z.zoo_optimizer) == (300, 0.03, "last_norms:2", "adamw")
    assert (b.base_epochs, b.base_lr, b.base_batch, b.crop_scale) == (10, 5e-4, 128, 0.08)
