"""The library on GPUs that are not there: fake CUDA takes CUDA's branches, pretended CUDA has values and counts (`gpu/`)."""

import asyncio
import functools
import warnings
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_experiment import SMALL
from timm.models.swin_transformer import SwinTransformer
from torch.utils._pytree import tree_map

from gpu import count, notebooks
from gpu.fake import empty_like, fake_cuda, on_cuda
from gpu.pretend import Pretend
from pdiff_lib import audit, explore, networks, zoo
from pdiff_lib.base import runs, training
from pdiff_lib.base.recipe import Recipe
from pdiff_lib.experiment import ORIGINAL, PDIFF, Experiment
from pdiff_lib.generators import autoencoder, baselines, denoiser, diffusion, memory, meter, pdiff, vae
from pdiff_lib.measures import similarity
from pdiff_lib.networks import capture, subset, symmetry
from pdiff_lib.study import Study
from pdiff_lib.tasks import data, evaluate, features
from pdiff_lib.zoos import population

pytestmark = pytest.mark.filterwarnings("error:.*cannot be captured")  # the whole network per vector: right, and slow
SETTINGS = {**SMALL, "test_images": 50, "samples": 3, "noise_scales": [0.05], "T": 6}
WHERE = "cuda:1"  # of two: what goes to "cuda" instead of the device that was asked for is on another one
TINY = {"ae_channels": [2, 2], "latent_dim": 4, "ae_steps": 3, "denoiser_channels": [2, 2, 2], "mlp_width": 8,
        "diffusion_steps": 3, "T": 8, "progress": False}


def seeded(device="cpu", seed=0):
    return torch.Generator(device).manual_seed(seed)


def both(work) -> None:
    """`work(device)` on the CPU and on a pretended GPU must give the same tensors, frames and numbers, in dicts and lists."""
    def here(x):
        if isinstance(x, pd.DataFrame):
            return {c: here(x[c]) for c in x}
        if isinstance(x, pd.Series):
            return x.to_numpy() if x.dtype.kind in "fiub" else [str(v) for v in x]
        return x.cpu() if isinstance(x, torch.Tensor) else x

    plain = tree_map(here, work("cpu"))
    with Pretend(devices=2) as gpu:
        found = tree_map(here, work(WHERE))
    assert plain and gpu.count("launch") > 0 and gpu.count("reseed") == 0
    compare(found, plain)


def compare(found, plain, name="") -> None:
    if isinstance(plain, dict):
        assert found.keys() == plain.keys()
        for key in plain:
            compare(found[key], plain[key], f"{name} {key}")
    elif isinstance(plain, (list, tuple)):
        for i, pair in enumerate(zip(found, plain, strict=True)):
            compare(*pair, f"{name} {i}")
    elif isinstance(plain, str):
        assert found == plain, name
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(plain), rtol=1e-3, atol=1e-5, err_msg=name)


# ---- The tools themselves


@pytest.fixture
def gpu():
    with Pretend(devices=2) as gpu:
        yield gpu
        gpu.faults.clear()  # those that a test expects


@pytest.mark.parametrize("error, wrong", [
    (RuntimeError, lambda a, b: a + b), (RuntimeError, lambda a, b: b + a[0]), (RuntimeError, lambda a, b: b.add_(a)),
    (RuntimeError, lambda a, b: torch.cat([a, b])), (RuntimeError, lambda a, b: a @ b),
    (RuntimeError, lambda a, b: b[a.long()]), (RuntimeError, lambda a, b: a.pin_memory()),
    (RuntimeError, lambda a, b: a.index_put_((b.long(),), b)), (RuntimeError, lambda a, b: a.gather(0, b.long())),
    (RuntimeError, lambda a, b: torch.where(a > 0, a, b)), (RuntimeError, lambda a, b: torch._foreach_add([a, a], [a, b])),
    (RuntimeError, lambda a, b: b.to("cuda:1") + a), (RuntimeError, lambda a, b: F.mse_loss(a, b)),
    (RuntimeError, lambda a, b: torch.func.vmap(lambda x, y: x * y)(a, b)),
    (RuntimeError, lambda a, b: torch.nn.Linear(3, 1)(a)),
    (RuntimeError, lambda a, b: torch.rand(3, generator=torch.Generator("cuda"))),
    (RuntimeError, lambda a, b: torch.rand(3, generator=torch.Generator(), device="cuda")),
    (RuntimeError, lambda a, b: torch.rand(3, generator=torch.Generator("cuda:1"), device="cuda")),
    (TypeError, lambda a, b: a.numpy()), (TypeError, lambda a, b: np.asarray(a)), (TypeError, lambda a, b: np.add(a[1:], 1))])
def test_what_cuda_refuses_is_refused(gpu, error, wrong):
    a, b = torch.arange(3.0, device="cuda"), torch.arange(3.0)
    with pytest.raises(error, match="device"):
        wrong(a, b)
    assert len(gpu.faults) == 1


def test_what_cuda_takes_is_taken_and_its_place_is_kept(gpu):
    a, b = torch.arange(3.0, device="cuda", requires_grad=True), torch.arange(3.0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to("cuda:1")
    results = [a + 1, a + torch.tensor(2.0), torch.tensor(2.0) * a, a[b.long()], a.detach()[1:], torch.zeros_like(a), b.to(a),
               torch.stack([a, a]).T, torch.autograd.grad((a**2).sum(), a)[0], a.new_zeros(2), torch.as_tensor(a),
               torch.tensor([1.0], device="cuda"), torch.rand(2, generator=torch.Generator("cuda"), device="cuda"),
               torch.func.vmap(torch.sin)(a), torch.zeros_like(b, device="cuda"), b.new_zeros(2, device="cuda")]
    assert {x.device for x in results} == {torch.device("cuda:0")} and all(x.is_cuda for x in results)
    others = [*net.parameters(), *net.buffers(), net(b.to("cuda:1").expand(4, 3)), b.to("cuda:1").new_tensor([1.0])]
    assert {x.device for x in others} == {torch.device("cuda:1")}
    others = [torch.zeros_like(a, device="cpu"), a.new_zeros(2, device="cpu"), torch.tensor([*a.detach()]), b.pin_memory()]
    assert {x.device.type for x in others} == {"cpu"} and others[-1].is_pinned() and not b.is_pinned()
    b[:2] = a.detach()[1:]
    assert b.device.type == a.cpu().device.type == "cpu" and b.tolist() == [1, 2, 2]


def test_events_are_counted(gpu):
    def events(work):
        before = dict(gpu.events)
        work()
        return {kind for (kind, *_), n in (gpu.events - type(gpu.events)(before)).items()}

    a, b = torch.arange(4.0, device="cuda"), torch.arange(4.0)
    mask, out = a > 1, torch.zeros(4)
    for work, expected in [(lambda: a * 2, "launch"), (lambda: a.view(2, 2), ""), (lambda: float(a[0]), "wait"),
                           (lambda: bool(mask.all()), "launch wait"), (lambda: a[mask], "launch wait"),
                           (lambda: mask.nonzero(), "launch wait"), (lambda: a.cpu(), "download"), (lambda: a.to("cuda"), ""),
                           (lambda: b.cuda(), "upload"), (lambda: torch.tensor([1.0], device="cuda"), "upload"),
                           (lambda: a[b.long()], "launch upload"), (lambda: a.copy_(b), "upload"),
                           (lambda: out.copy_(a), "download"), (lambda: a.tolist(), "download"),
                           (lambda: torch.tensor([a[0]]), "wait"), (lambda: b * 2, ""),
                           (lambda: torch.manual_seed(0), "reseed"), (lambda: torch.cuda.synchronize(), "wait")]:
        assert events(work) == set(expected.split()), expected


def test_a_fault_that_was_caught_is_raised_at_the_end():
    with pytest.raises(RuntimeError, match="same device"), Pretend():
        try:
            torch.ones(2, device="cuda") + torch.ones(2)
        except RuntimeError:
            pass


def test_fake_cuda_takes_the_branches_of_cuda():
    """Batch norm in eval mode under vmap: cuDNN's branch asks for channels last, which a batched tensor refuses."""
    def normalised(weight):
        x = torch.empty(2, 3, 4, 4, device=weight.device).contiguous(memory_format=torch.channels_last)
        many = torch.func.vmap(lambda w: F.batch_norm(x * w[:, None, None], weight[0], weight[0].abs(), w, w, False))
        return many(weight)

    assert normalised(torch.ones(5, 3)).shape == (5, 2, 3, 4, 4)
    with fake_cuda(), pytest.raises(RuntimeError, match="inside of vmap"):
        normalised(torch.empty(5, 3, device="cuda"))


# ---- Fake CUDA: every kind of network, every kind of loss

NETWORKS = [("test_resnet", 32, "last_norms:2"), ("test_resnet", 32, "all"), ("mobilenetv3_small_050", 32, "last_norms:2"),
            ("test_efficientnet", 32, "last_norms:2"), ("regnetx_002", 32, "*.conv3.bn.*,head.*"),
            ("test_convnext", 32, "all"), ("test_vit", 32, "last_norms:2"), ("test_vit", 32, "all"),
            ("swin", 32, "last_norms:2"), ("swin", 32, "all"),
            ("convnet-mini", 64, "all"), ("mlp-mini", 64, "all"), ("resnet-mini", 64, "all"), ("vit-mini", 64, "all"),
            ("convnext-mini", 64, "last_norms:2"), ("hyperrep-cnn", 32, "all"), ("hyperrep-cnn", 32, "6.*")]
BOTH_LAYOUTS = {"test_resnet", "test_vit", "swin", "convnet-mini", "vit-mini"}  # the others: as `Evaluator` has them


def created(name: str, size: int) -> torch.nn.Module:
    if name != "swin":
        return networks.create(name, 10, 3, size)
    net = SwinTransformer(size, 2, num_classes=10, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4)
    net.input_shape = (3, size, size)
    return net


@pytest.mark.parametrize("name, size, choice, layout", [
    (*network, layout) for network in NETWORKS
    for layout in (torch.channels_last, *[torch.contiguous_format] * (network[0] in BOTH_LAYOUTS))])
def test_one_vector_and_many_on_fake_cuda(name, size, choice, layout):
    net = created(name, size).eval().requires_grad_(False).to(memory_format=layout)
    sub = subset.select(net, choice)
    with fake_cuda(), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # an operation without a rule under vmap: a loop
        on_cuda(net)
        images = torch.empty(4, 3, size, size, device="cuda").contiguous(memory_format=layout)
        part = capture.split(net, sub.names, images)
        boundary = part.frozen(images)
        for vectors in (1, evaluate.VMAP_ON_CUDA):
            scores = evaluate._scores(part, sub, torch.empty(vectors, sub.numel, device="cuda"), boundary)
            assert (tuple(scores.shape), scores.device.type, scores.dtype) == ((vectors, 4, 10), "cuda", torch.float32)


def losses():
    """Name -> a network and its loss of a batch on a device. Only forward: autograd's engine asks for a real GPU."""
    schedule = diffusion.Schedule(8)
    t = torch.zeros(5, dtype=torch.int64)
    ae, v = autoencoder.Autoencoder(100, 4, (2, 2)), vae.VariationalAutoencoder(100, 4, (2, 2))
    conv, mlp = denoiser.Denoiser(4, (2, 2, 2)), denoiser.ResidualMLP(4, schedule.alpha_bar, 8)
    images, net = count.images(1), networks.create("test_resnet", 4, 1, 32)
    return {
        "autoencoder": (ae, lambda x: autoencoder.noisy_reconstruction_loss(ae, x, 1e-3, 0.1, torch.Generator())),
        "VAE": (v, lambda x: vae.negative_elbo(v, x, 1.0, torch.Generator())),
        "denoiser": (conv, lambda x: denoiser.noise_loss(conv, x[:, :4], empty_like(t), x[:, :4], schedule).mean()),
        "MLP": (mlp, lambda x: mlp.loss(x[:, :4], empty_like(t), x[:, :4], schedule).mean()),
        "classification": (net, lambda x: F.cross_entropy(net(data._random_crop(
            empty_like(images.x_train).float(), 32, x[:, :count.BATCH], True, (0.5, 1.0))), empty_like(images.y_train)))}


@pytest.mark.parametrize("name", losses())
def test_the_loss_of_a_training_step_on_fake_cuda(name):
    net, loss = losses()[name]
    with fake_cuda():
        on_cuda(net.train())
        value = loss(torch.empty(5, 100, device="cuda"))
        assert (value.device.type, value.dtype, value.ndim) == ("cuda", torch.float32, 0)


# ---- Pretended CUDA: everything, at tiny sizes


def experiment(device, folder=None, **settings) -> Experiment:
    store = runs.Store(folder and folder / device)
    return Experiment(Recipe.of(**{**SETTINGS, **settings}), store, device, progress=False)


def test_the_quickstart_from_end_to_end(tmp_path):
    def work(device):
        e = experiment(device, tmp_path)
        method, theta = e.fitted(PDIFF), e.zoo.theta
        path = e.training_path(3)
        shown = method.trajectory(2, 4, e.generator("shown"))
        table = audit.table(e).drop(columns=["fit_seconds", "sample_seconds"])
        assert {t.device.type for t in (theta, e.theta(PDIFF), path.theta, path.accuracy)} == {"cpu"}
        assert {p.device for p in e.net.parameters()} == {e.device} == {method.z.device}
        return {"frame": e.frame(), "summary": e.summary(), "audit": table, "losses": e.zoo.losses, "path": path[1:],
                "trajectory": [shown.z, shown.theta], "diagnose": method.diagnose(theta, 5, e.generator("diagnose"))}

    both(work)


@pytest.mark.parametrize("settings", [
    {"base_optimizer": "adam", "zoo_optimizer": "sgd", "zoo_lr": 0.001, "flip": True},
    {"subset": "all", "network": "hyperrep-cnn", "zoo_mode": "independent", "alignment": "reference", "permutations": 2},
    {"subset": "all", "network": "hyperrep-cnn", "alignment": "reference", "zoo_optimizer": "adam"},
    {"subset": "fc.*", "base_optimizer": "sgd", "base_lr": 0.01, "image_channels": 3},
    {"task": "image_generation", "network": "unet-8-16", "subset": "unet.conv_out.*", "image_size": 8, "image_steps": 3, "crop_scale": 1.0, "flip": True},
    {"task": "detection", "dataset": "scenes", "network": "fcos-mini", "subset": "head.*.conv.4.*", "image_size": 48, "train_images": 8, "test_images": 4,
     "base_batch": 4, "zoo_batch": 4, "crop_scale": 1.0}],
    ids=lambda settings: ", ".join(map(str, settings.values())))
def test_settings_that_change_the_path(settings, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 20)

    def work(device):
        e = experiment(device, **settings)
        simple = ["average", "gaussian"] if "task" not in settings else []  # the same of every task
        return {"frame": e.frame([ORIGINAL, *simple, PDIFF]), "learned from": e.learned_from}

    both(work)


def test_a_study_and_own_methods():
    class Own:
        def fit(self, theta):
            self.theta = theta

        def sample(self, n, generator=None):
            return self.theta[:n].to(self.device)

    def work(device):
        Own.device = device
        rows = {"T=6": {}, "PCA": {"ae_kind": "pca"}}
        study = Study(Recipe.of(**SETTINGS), rows, store=runs.Store(None), device=device, progress=False)
        for _, _, e in study:
            e.add("VAE", e.vae(vae_steps=3))
            e.add("own", Own())
        return study.frame([ORIGINAL, PDIFF, "VAE", "own"])

    both(work)


def theta_of(device, k=7, numel=100):
    return torch.randn(k, numel, generator=seeded()).to(device)


def places(device):
    """Where vectors and generators may be: none on the device, one of them, both."""
    return [(vectors, draws) for vectors in dict.fromkeys(["cpu", device]) for draws in dict.fromkeys(["cpu", device])]


@pytest.mark.parametrize("own", [
    {}, {"ae_kind": "pca"}, {"latent_model": "gaussian"}, {"denoiser_kind": "mlp"}, {"sampler": "ddim", "sampling_steps": 5},
    {"sampler": "ddim", "eta": 0.5}, {"standardise_latents": True}, {"centre": "vector"}, {"beta_range": "rescaled"}],
    ids=lambda own: ", ".join(map(str, own.values())) or "as in the paper")
def test_every_p_diff(own):
    def work(device):
        found = []
        for where in ("cpu", device):  # the vectors and the generator; a fit is always on the device
            theta = theta_of(where)
            method = pdiff.PDiff((40, 60), device, **TINY, **own).fit(theta)
            assert method.z.device.type == torch.device(device).type
            found.append([method.sample(3, seeded(where)), method.encode(theta), method.decode(method.z.to(where)),
                          method.diagnose(theta, 4, seeded(where))])
            if "latent_model" not in own:
                found.append(list(method.trajectory(2, 3, seeded(where))[1:]))
        return found

    both(work)


def test_p_diff_and_vae_work_where_the_vectors_are():
    def work(device):
        methods = [pdiff.PDiff(None, **TINY), vae.VAE(None, ae_channels=[2, 2], latent_dim=4, vae_steps=3, progress=False)]
        samples = [m.fit(theta_of(device)).sample(3, seeded()) for m in methods]
        assert {s.device.type for s in samples} == {torch.device(device).type}
        return samples

    both(work)


def test_the_vae():
    def work(device):
        method = vae.VAE((40, 60), device, progress=False, ae_channels=[2, 2], latent_dim=4, vae_steps=3).fit(theta_of("cpu"))
        return [method.sample(3, seeded()), method.diagnose(theta_of("cpu")), method.losses]

    both(work)


BASELINES = {
    "noise": lambda: baselines.Noise(0.1, (40, 60)), "average": baselines.WeightAverage,
    "tensor means": lambda: baselines.TensorMeans((40, 60)), "fixed": lambda: baselines.Fixed(torch.ones(100)),
    "interpolation": baselines.Interpolation, "gaussian": baselines.Gaussian, "subsets": lambda: baselines.SubsetAverage(3),
    "SWAG": lambda: baselines.SWAG(4)}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline(name):
    def work(device):
        samples = [BASELINES[name]().fit(theta_of(vectors)).sample(4, seeded(draws)) for vectors, draws in places(device)]
        return samples * (4 // len(samples))

    both(work)


def test_latent_density_of_an_autoencoder_on_the_gpu():
    def work(device):
        found = []
        for vectors, draws in places(device):
            ae = pdiff.PDiff(None, device, **TINY).fit_autoencoder(theta_of(vectors))
            for accuracy in {"cpu", device}:
                shares = torch.linspace(0, 1, 7, device=accuracy)
                found.append(baselines.LatentKDE(ae, shares, 0.5).fit(theta_of(vectors)).sample(4, seeded(draws)))
        return found * (8 // len(found))

    both(work)


def test_symmetry_with_vectors_and_generators_anywhere():
    def work(device):
        net = networks.create("hyperrep-cnn", 4, 1).to(device)
        sub = subset.select(net, "all")
        groups, found = symmetry.groups(net, sub), []
        for vectors, draws in places(device):
            theta = sub.flatten(net).to(vectors) + 0.1 * theta_of(vectors, 3, sub.numel)
            several = symmetry.augment(theta, groups, 1, seeded(draws))
            assert several.device == theta.device
            found.append([several, symmetry.align(several, several[0], groups),
                          symmetry.permute(theta, groups, symmetry.random(groups, 3, seeded(draws)))])
        return found * (4 // len(found))

    both(work)


def test_measures_of_tensors_on_the_gpu():
    def work(device):
        predictions, y = torch.randint(3, (6, 50), generator=seeded()).to(device), (torch.arange(50) % 3).to(device)
        wrong, theta = predictions != y, theta_of(device)
        votes = [audit.ensemble_accuracy(predictions, y, size, generator=seeded(draws))
                 for size in (1, 3) for draws in ("cpu", device)]
        return [votes, evaluate.accuracy(wrong), evaluate.summary(wrong), *similarity.nearest(wrong, wrong[:3]),
                similarity.pairwise(wrong), similarity.distance(theta, theta[:3]), similarity.outside_span(theta, theta[:3])]

    both(work)


def test_evaluation_with_tensors_anywhere():
    def work(device):
        images = count.images(4)
        net = networks.create("test_resnet", 4, 1, 32)
        sub = subset.select(net, "last_norms:2")
        theta = sub.flatten(net) + 0.1 * theta_of("cpu", 5, sub.numel)
        found = []
        for where in (device, "cpu"):
            net, theta, y, x = net.to(where), theta.to(where), images.y_test.to(where), images.x_test.to(where)
            found.append(evaluate.wrong(net, sub, theta, x, y, prepare=images.prepare, device=device, batch_size=10))
        return found

    both(work)


def test_a_population_and_a_zoo(tmp_path):
    def work(device):
        images, quiet = count.images(3), {"device": device, "progress": False, "base_epochs": 1, "base_batch": count.BATCH}
        z = population.collect(images, 5, chunk=3, at_once=None if device == "cpu" else 2, store=runs.Store(tmp_path / device),
                               network="hyperrep-cnn", pretrained=False, **quiet)
        net = networks.create("test_resnet", 4, 1, 32)
        path = zoo.training_path(net, images, subset.select(net, "last_norms:2"), 3, **quiet)
        assert z.theta.device.type == path.theta.device.type == path.accuracy.device.type == "cpu"
        return [z.theta, z.losses, *path[1:]]

    both(work)


def test_images_beyond_the_memory_come_from_pinned_memory():
    def work(device):
        net = networks.create("test_resnet", 4, 1, 32)
        nets = [networks.create("hyperrep-cnn", 4, 1, 32, seed=i) for i in (0, 1)]
        how = {"device": device, "progress": False, "base_epochs": 2, "base_batch": count.BATCH}
        return [zoo.train(net, count.images(3), **how), population.train(nets, count.images(3), [0, 1], **how)]

    plain = work("cpu")
    with Pretend(free=1000) as gpu:
        compare(work("cuda"), plain)
    sent = [(what, n) for (kind, what, line), n in gpu.events.items() if kind == "upload" and "uint8" in what]
    assert sum(n for _, n in sent) == 2 * 6 and all(what.startswith("pinned") for what, _ in sent)


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", -1.0)

    def work(device):
        net, images = networks.create("test_resnet", 4, 1, 32), count.images(6)
        checkpoint = runs.Checkpoint(tmp_path / f"{device}.safetensors")

        def kill(step):
            if step == 3:
                raise KeyboardInterrupt

        how = {"device": device, "progress": False, "base_epochs": 1, "base_batch": count.BATCH, "checkpoint": checkpoint}
        with pytest.raises(KeyboardInterrupt):
            zoo.train(net, images, after=kill, **how)
        return [zoo.train(networks.create("test_resnet", 4, 1, 32), images, **how), *net.state_dict().values()]

    both(work)


def test_the_explorers():
    def work(device):
        e = experiment(device)
        scatter = explore.Scatter(e)
        denoising = explore.Denoising(e, scatter)
        denoising.seed.value, denoising.sampler.value, denoising.steps.value, denoising.count.value = 3, "ddim", 5, 11
        asyncio.run(denoising.follow())
        asyncio.run(denoising.generate())
        assert "11 of 11 networks" in denoising.status.value
        scatter.add(e.theta("gaussian"))
        scatter.choose(len(scatter.frame) - 1)
        scatter.select([0, 1])
        return {"frame": scatter.frame, "path": list(denoising.path[1:]), "accuracy": denoising.accuracy,
                "generated": denoising.generated, "facts": scatter.facts.value, "table": denoising.table}

    both(work)


def test_a_notebook_that_moves_tensors_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_RUNS", str(tmp_path))
    monkeypatch.chdir(notebooks.ROOT / "notebooks")
    ending, gpu = notebooks.run(notebooks.ROOT / "notebooks" / "23_parameter_autoencoder.ipynb")
    assert ending == "" and sum(n for (*_, line), n in gpu.events.items() if line.startswith("autoencoder.py")) > 100


def test_the_meters_clock_is_read_when_the_gpu_is_done(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", Mock(side_effect=OSError))  # it would set this process's allocator
    log = []
    with Pretend() as gpu:
        note = gpu.note
        monkeypatch.setattr(gpu, "note", lambda kind, what: (log.append(kind), note(kind, what)))
        monkeypatch.setattr(meter.time, "perf_counter", lambda: log.append("clock") or 0.0)
        meter.run(memory.Step("autoencoder", 64, 4, (2, 2), 4), torch.device("cuda"), torch.get_num_threads())
    moments = [i for i, kind in enumerate(log) if kind == "clock"]
    assert len(moments) == 2 and [log[i - 1] for i in moments] == ["wait", "wait"]
    assert "launch" in log[moments[0]:moments[1]]


def test_records_name_the_device_that_was_used(tmp_path):
    with Pretend(devices=2):
        for device, name in (("cpu", "CPU"), ("cuda:0", "pretended GPU 0"), ("cuda:1", "pretended GPU 1")):
            e = experiment(device, tmp_path, base_epochs=0)
            assert e.net
            (file,) = (tmp_path / device).rglob("*.safetensors")
            assert runs.read(file)[1]["device"].startswith(name)


# ---- Budgets

per_step = functools.cache(count.per_step)


@pytest.mark.parametrize("name", [name for name in count.LOOPS if " per " not in name])
def test_no_step_waits_or_copies(name):
    events = per_step(name)
    assert events["launch"] > 20 and {kind: n for kind, n in events.items() if n} == {"launch": events["launch"]}


@pytest.mark.parametrize("name", [name for name in count.LOOPS if "per epoch" in name])
def test_an_epoch_sends_the_order_of_its_images_once(name):
    events = per_step(name)
    assert (events["upload"], events["download"], events["wait"]) == (1, 0, 0)


def test_the_launches_of_a_population_hardly_grow_with_its_members():
    three, six = (per_step(f"population of {n}")["launch"] for n in (3, 6))
    assert six < 1.2 * three


def test_a_batch_of_images_is_sent_once_and_its_predictions_come_back_once():
    events = per_step("evaluation, per batch of images")
    assert (events["upload"], events["download"], events["wait"]) == (1, 1, 0)


def test_the_first_device_is_taken_where_none_is_named():
    with Pretend():
        assert training.device_of(None).type == "cuda"
        e = Experiment(Recipe.of(**SETTINGS), runs.Store(None), progress=False)
        assert {p.device.type for p in e.net.parameters()} == {e.fitted(PDIFF).z.device.type} == {"cuda"}


def test_a_rehearsal_is_on_the_device_that_will_work():
    net = networks.create("hyperrep-cnn", 4, 1, 32)
    with Pretend() as gpu:
        evaluate.rehearse(net, subset.select(net, "all"), (1, 32, 32), torch.device("cuda"))
        assert next(net.parameters()).device.type == "cpu"
    assert {kind for kind, *_ in gpu.events} >= {"launch", "upload"}
