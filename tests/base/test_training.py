"""training.py: the loop against one written by hand, and a resumed run against an uninterrupted one."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pdiff_lib.base import runs, training

STEPS = 12


class Setting:
    """A small network with batch norm, its data by step, and what its training left behind."""

    def __init__(self, optimizer: str = "adamw"):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.optimizer = training.OPTIMIZERS[optimizer](self.net.parameters(), lr=0.05, weight_decay=0.1)
        self.trace, self.steps = torch.zeros(STEPS, 8), []

    def loss_at(self, i: int) -> torch.Tensor:
        self.steps.append(i)
        return (self.net(torch.randn(10, 6, generator=torch.Generator().manual_seed(i))) - 1).square().mean()

    def loop(self, checkpoint=None, loss_at=None, **how) -> torch.Tensor:
        return training.loop(
            loss_at or self.loss_at,
            STEPS,
            {"net": self.net},
            self.optimizer,
            checkpoint=checkpoint,
            progress=False,
            buffers={"trace": self.trace},
            after=lambda i: self.trace[i].copy_(self.net[1].weight.detach()),
            **how,
        )

    def state(self) -> list[torch.Tensor]:
        return [t.clone() for t in (*self.net.state_dict().values(), self.trace)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(
    "optimizer, plain", [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_loop_is_the_loop_one_writes_by_hand(optimizer, plain, schedule):
    ours, hand = Setting(optimizer), Setting(optimizer)
    losses = ours.loop(schedule=schedule)
    opt = plain(hand.net.parameters(), lr=0.05, weight_decay=0.1, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    decay = CosineAnnealingLR(opt, STEPS)
    expected, trace = [], []
    for i in range(STEPS):
        loss = hand.loss_at(i)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if schedule == "cosine":
            decay.step()
        expected.append(loss.item())
        trace.append(hand.net[1].weight.detach().clone())
    assert ours.steps == list(range(STEPS))
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.trace, torch.stack(trace), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.net.state_dict(), hand.net.state_dict(), rtol=1e-5, atol=1e-6)


class Stop(Exception):
    """The end of a process, as far as the loop can tell."""


@pytest.mark.parametrize("stop", [1, 5, STEPS - 1])
@pytest.mark.parametrize("optimizer", list(training.OPTIMIZERS))
def test_a_resumed_loop_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch, optimizer, stop):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)  # after every step
    whole, first, second = (Setting(optimizer) for _ in range(3))
    losses, path = whole.loop(), tmp_path / "partial"

    def stopping(i):
        if i == stop:
            raise Stop
        return first.loss_at(i)

    with pytest.raises(Stop):
        first.loop(runs.Checkpoint(path), stopping)
    with torch.no_grad():  # the next process has other initial weights, if any
        for p in second.net.parameters():
            p.normal_()
    resumed = second.loop(runs.Checkpoint(path))
    assert second.steps == list(range(stop, STEPS))
    assert torch.equal(resumed, losses) and equal(second.state(), whole.state())


def test_nothing_is_kept_before_it_is_due(tmp_path):
    Setting().loop(runs.Checkpoint(tmp_path / "partial"))  # 30 s have not passed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(value):
    setting = Setting()
    with pytest.raises(FloatingPointError, match=rf"^my net: the loss is {value} at step 4 of {STEPS}.*lower learning rate than 0\.05"):
        setting.loop(loss_at=lambda i: setting.loss_at(i) * (value if i >= 4 else 1), desc="my net")
    setting = Setting()
    with pytest.raises(FloatingPointError, match=rf"the loss is {value} at step 0 .*the starting weights or the inputs hold NaN") as e:
        setting.loop(loss_at=lambda i: setting.loss_at(i) * value)
    assert "learning rate" not in str(e.value)


def test_a_loss_that_is_not_finite_is_noticed_while_it_trains(monkeypatch):
    setting, clock = Setting(), iter(range(0, 1000))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock) / 2)  # half a second from look to look
    with pytest.raises(FloatingPointError, match="at step 4 of"):
        setting.loop(loss_at=lambda i: setting.loss_at(i) * (float("nan") if i == 4 else 1))
    assert max(setting.steps) < 9  # not after the last step


def test_no_checkpoint_holds_a_state_that_is_not_finite(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(runs.Checkpoint, "due", lambda self: True)
    setting, checkpoint = Setting(), runs.Checkpoint(tmp_path / "partial")
    with pytest.raises(FloatingPointError):
        setting.loop(checkpoint, lambda i: setting.loss_at(i) * (float("nan") if i >= 4 else 1))
    state = checkpoint.load()
    assert int(state["step"]) == 4 and all(torch.isfinite(v).all() for v in state.values())


@pytest.mark.parametrize("spoilt", ["weight", "running_var"])
def test_a_trained_number_that_is_not_finite_is_named_at_the_end(spoilt):
    setting = Setting()

    def spoil(i):  # as a last step of optimization can, after the last loss
        if i == STEPS - 1:
            getattr(setting.net[1], spoilt).data[2] = float("inf")

    with pytest.raises(FloatingPointError, match=rf"1 tensors hold NaN or infinity after the last step, first net\.1\.{spoilt}"):
        training.loop(setting.loss_at, STEPS, {"net": setting.net}, setting.optimizer, after=spoil, progress=False)


def test_seeding_is_for_the_inside_alone_and_for_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU was seeded"))
    torch.default_generator.manual_seed(5)
    first = torch.rand(3)
    torch.default_generator.manual_seed(5)
    with training.seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
    torch.default_generator.manual_seed(1)
    assert torch.equal(inside, torch.rand(3))


def flags() -> tuple:
    return (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("tf32", [False, True])
def test_precision_on_cuda_is_set_and_put_back(tf32):
    before = flags()
    with training.precision(torch.device("cpu"), tf32):
        assert flags() == before
    with pytest.raises(KeyError):
        with training.precision(torch.device("cuda"), tf32):
            assert flags() == (tf32, tf32, True, False, True)
            raise KeyError
    assert flags() == before and not torch.is_deterministic_algorithms_warn_only_enabled()


def test_device_of():
    assert training.device_of("cpu") == training.device_of(torch.device("cpu")) == torch.device("cpu")
    assert training.device_of(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'cuda:1' was asked for"):
        training.device_of("cuda:1")


def test_seeds_differ_by_purpose_and_are_the_same_in_every_process():
    seeds = [
        training.seed_for(*args)
        for args in [
            (0,),
            (1,),
            (0, "zoo"),
            (0, "zoo", 1),
            (0, "zoo", 2),
            (0, "train", 1),
            (1, "zoo", 1),
            (0, "zoo1"),
            (0, "zoo", "1"),
        ]
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert (
        training.seed_for(0, "zoo", 1) == 6317837586251689879
    )  # Python's own hash() would change from process to process
