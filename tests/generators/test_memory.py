"""memory.py, meter.py: closed forms against the networks as they are, and against what a step really keeps."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from device import DEVICE
from pdiff_lib.generators import denoiser, meter
from pdiff_lib.generators.autoencoder import Autoencoder, noisy_reconstruction_loss
from pdiff_lib.generators.memory import Step
from pdiff_lib.generators.meter import SCHEDULE, Meter, prepared
from pdiff_lib.measures import paper

NARROW, NARROW_DENOISER = (16, 32, 64, 64, 16), (16, 32, 64, 32, 16)
STEPS = [
    Step("autoencoder"),
    Step("autoencoder", 1000, 64, NARROW, 32),  # not a multiple of 64: padded
    Step("autoencoder", 10853, 256, (8, 4, 16), 50),
    Step("autoencoder", 300288, 1024),
    Step("denoiser"),
    Step("denoiser", latent_dim=1024),
    Step("denoiser", latent_dim=64, channels=NARROW_DENOISER, batch=64),
    Step("denoiser", latent_dim=32, channels=(16, 32, 32, 16), batch=8),  # an even number: no middle block
]
every_step = pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s.part}-{s.numel}-{s.latent_dim}-{len(s.channels)}")


def network(step: Step):
    if step.part == "autoencoder":
        return Autoencoder(step.numel, step.latent_dim, step.channels)
    return denoiser.Denoiser(step.latent_dim, step.channels)


def kept(step: Step) -> int:
    """Bytes of the distinct storages that autograd keeps in a forward pass, without parameters and running statistics."""
    net, generator = network(step).train(), torch.Generator().manual_seed(0)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if step.part == "autoencoder":
            loss = noisy_reconstruction_loss(net, torch.randn(step.batch, step.numel), 0.1, 0.1, generator)
        else:
            z = torch.randn(step.batch, step.latent_dim)
            loss = denoiser.noise_loss(net, z, torch.zeros(len(z), dtype=torch.long), torch.randn_like(z), SCHEDULE).mean()
    assert torch.isfinite(loss)
    return sum(size for key, size in storages.items() if key not in own)


@every_step
def test_parameters_are_those_of_the_network(step):
    with torch.device("meta"):
        sizes = [p.numel() for p in network(step).parameters()]
    assert (step.need.parameters, step.need.largest) == (sum(sizes), max(sizes))


@pytest.mark.parametrize("step", [replace(s, batch=4) for s in STEPS if s.numel < 20_000], ids=lambda s: f"{s.part}-{s.numel}")
def test_activations_are_what_autograd_keeps(step):
    assert kept(step) == step.need.activations


@every_step
@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"recompute": True}, {"passes": 2}, {"passes": 4}], ids=str)
def test_the_peak_is_what_a_step_reaches(step, how):
    if "recompute" in how and step.part == "denoiser" or step.batch % how.get("passes", 1):
        return
    step = replace(step, **how)
    assert step.need.peak == pytest.approx(step.counted(), rel=0.03)


def test_counting_without_data_is_counting_with_data():
    step = Step("autoencoder", 2048, 64, NARROW, 50)
    ran = step.run(DEVICE)
    assert ran.counted == pytest.approx(step.counted(), rel=0.02)
    assert 0.9 * ran.counted < ran.resident < 1.6 * ran.counted
    assert ran.seconds > 0


@pytest.mark.parametrize("part, channels", [("autoencoder", NARROW), ("denoiser", NARROW_DENOISER)])
def test_two_passes_reach_the_peak_of_all(part, channels):
    step = Step(part, 2048, 64, channels, 48, passes=12)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step.counted() == meter.peak(step, torch.device("cpu"))


def test_recomputing_trains_the_same():
    """The gradients of one step with and without it, on the same batch."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        step = Step("autoencoder", 128, 8, (4, 4), 6, recompute=recompute)
        net, train = prepared(step, torch.device(DEVICE))
        train()
        gradients.append([p.grad for p in net.parameters()])
    assert len(gradients[0]) == len(gradients[1])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(plain, again)


def test_passes_add_up_to_the_batch():
    """The learning signal of a step must not change with the number of passes: same size of the linear layers' gradient."""
    norms = []
    for passes in (1, 5):
        torch.manual_seed(0)
        net, train = prepared(Step("autoencoder", 128, 8, (4, 4), 50, passes=passes), torch.device(DEVICE))
        train()
        norms.append(float(net.to_inner.weight.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.5)  # batch norm sees smaller batches: not equal


def test_meter_counts_views_once_and_forgets_the_dead():
    with Meter() as meter:
        x = torch.zeros(10, 10)
        y = x.view(100)[:50]
        assert meter.live == 400
        y = x + 1
        y.add_(1)
        assert meter.live == 800
        del y
    assert (meter.live, meter.peak) == (400, 800)


def test_largest_numel_is_the_last_that_fits():
    step, budget = Step("autoencoder", latent_dim=64, channels=NARROW), 10**8
    D = step.largest_numel(budget)
    assert D % 64 == 0 and replace(step, numel=D).need.peak <= budget < replace(step, numel=D + 64).need.peak
    assert step.largest_numel(1000) == 0


@pytest.mark.parametrize("setting, D, L", [("d=100288, latent 512, batch 50", 100288, 512),
                                           ("d=300288, latent 1024, batch 50", 300288, 1024)])
def test_table_13_lies_between_bf16_and_float32(setting, D, L):
    """At its larger sizes, where what CUDA itself takes does not count."""
    table = paper.tables().query("table == '13' and method == 'autoencoder'").set_index("setting").value
    low, high = (Step("autoencoder", D, L, bf16=bf16).need.peak / 1e6 for bf16 in (True, False))
    assert low < table[setting] < high


@pytest.mark.parametrize("settings, message", [
    ({"part": "vae"}, "part is 'vae': expected one of 'autoencoder', 'denoiser'"),
    ({"part": "denoiser", "latent_dim": 0}, "latent_dim is 0: expected at least 1"),
    ({"part": "denoiser", "passes": 3}, "passes is 3: expected a divisor of the batch .50."),
    ({"part": "denoiser", "passes": 50}, "at least 2 vectors per pass"),
    ({"part": "denoiser", "recompute": True}, "expected the autoencoder in float32"),
])
def test_impossible_steps_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Step(**settings)
