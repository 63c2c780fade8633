"""One pass over the images gives what one whole network per vector gives."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from device import DEVICE
from pdiff_lib.base import kept, training
from pdiff_lib.networks import capture, subset
from pdiff_lib.tasks import evaluate, few


def images(count, size=32, channels=3, seed=1):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def vectors(net, sub, count=3, seed=2):
    centre = sub.flatten(net)
    noise = torch.randn(count, sub.numel, generator=torch.Generator().manual_seed(seed))
    return centre + 0.2 * centre.abs().clamp(min=0.05) * noise


@torch.no_grad()
def plain(net, sub, theta, x):
    return torch.stack([torch.func.functional_call(net, sub.unflatten(v), (x,)) for v in theta])


@torch.no_grad()
def ours(net, sub, theta, x):
    part = capture.split(net, sub.names, x)
    boundary = part.frozen(x)
    return torch.stack([part.rest(sub.unflatten(v), boundary) for v in theta]), part, boundary


@pytest.fixture
def captured(monkeypatch):
    """Capture as soon as anything is spared: networks in tests are too small for it to pay."""
    monkeypatch.setattr(capture, "CAPTURE", -1)
    monkeypatch.setattr(few, "are_few", lambda *_: False)


@pytest.fixture(params=["whole", "captured"])
def way(request):
    """Both sides of what pays."""
    if request.param == "captured":
        request.getfixturevalue("captured")
    return request.param


def mini():
    """A small CNN with batch norm whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1),
                        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    net(3 * images(16, 8) + 1)
    return net.eval()


def network(name, **how):
    """From timm, with the scales that start at 0 or 1e-6 (and would hide what lies before them) drawn anew."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **how).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, -1, 1)
    return net


@pytest.mark.parametrize("name, choice, size, count", [
    ("resnet18", "last_norms:2", 64, 3), ("resnet18", "last_norms:2", 64, 1), ("resnet18", "all", 32, 3),
    ("resnet18", "layer3.0.conv2.weight,layer4.1.bn1.*", 64, 3), ("resnet50", "last_norms:2", 64, 3),
    ("convnext_atto", "last_norms:2", 64, 3), ("convnext_atto", "stages.2.*.gamma", 64, 1),
])
def test_scores_are_bitwise_equal(name, choice, size, count):
    net = network(name)
    sub = subset.select(net, choice)
    theta, x = vectors(net, sub, 2), images(count, size)
    scores, _, _ = ours(net, sub, theta, x)
    assert not torch.equal(scores[0], scores[1])
    assert torch.equal(scores, plain(net, sub, theta, x))


@pytest.mark.parametrize("choice, size, tokens", [
    ("last_norms:2", 224, [1]), ("blocks.9.mlp.fc2.bias", 48, [10, 10, 1, 1]), ("norm.weight,pos_embed", 48, None),
    ("all", 48, None)])
def test_vit_computes_the_class_token_alone(choice, size, tokens):
    net = network("vit_tiny_patch16_224", img_size=size)
    sub = subset.select(net, choice)
    theta, x = vectors(net, sub), images(2, size)
    scores, part, boundary = ours(net, sub, theta, x)
    expected = plain(net, sub, theta, x)
    # Fewer rows in a matrix product are summed in another order: equal to rounding, not to the last bit.
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    if tokens:
        assert [b.shape[1] for b in boundary] == tokens


@pytest.mark.parametrize("name, size, convolutions", [("resnet18", 32, 0), ("resnet50", 32, 0), ("resnet18", 64, 1)])
def test_a_convolution_of_one_pixel_is_a_matrix_product(name, size, convolutions):
    net = network(name)
    sub, x = subset.select(net, "last_norms:2"), images(5, size)
    theta = vectors(net, sub)
    scores, part, _ = ours(net, sub, theta, x)
    expected = plain(net, sub, theta, x)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert sum(n.target is torch.ops.aten.conv2d.default for n in part.rest.graph.nodes) == convolutions


@pytest.mark.parametrize("how, product", [
    ({"kernel_size": 3, "padding": 1}, True), ({"kernel_size": 3, "padding": 1, "bias": False}, True), ({"kernel_size": 1}, True),
    ({"kernel_size": (5, 3), "padding": (2, 2), "dilation": (1, 2), "stride": 3}, True),
    ({"kernel_size": 3, "padding": 1, "groups": 2}, False), ({"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2}, True),
    ({"kernel_size": 4, "padding": 3, "dilation": 2}, False), ({"kernel_size": 1, "padding": 3, "stride": 8}, False),  # meet padding alone
    ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, False), ({"kernel_size": 3, "padding": 2}, False)])
def test_which_entries_of_a_kernel_meet_the_pixel(how, product):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, **how), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    sub, x = subset.select(net, "0.*"), images(3, 1, 4)
    theta = vectors(net, sub)
    scores, part, _ = ours(net, sub, theta, x)
    torch.testing.assert_close(scores, plain(net, sub, theta, x))
    assert any(n.target is torch.ops.aten.linear.default for n in part.rest.graph.nodes) == product


class Tokens(nn.Module):
    """What the narrowing must see through: broadcasting, negative axes, several readers, axes that are mixed."""

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(12, 1))
        self.norm, self.both, self.mix = nn.LayerNorm(6), nn.LayerNorm((12, 6)), nn.Linear(12, 12)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = x.flatten(1).view(-1, 12, 6) * self.scale
        h = self.norm(nn.functional.gelu(h + self.shift)) + h
        return self.read(self, h)


@pytest.mark.parametrize("read", [
    lambda net, h: net.head(h[:, 0]),
    lambda net, h: net.head(h[:, -1]),
    lambda net, h: net.head(h.select(-2, 3)),
    lambda net, h: net.head(h[:, -3:].mean(1) + h[:, 1:9:4].sum(1) + h.mean(1)),
    lambda net, h: net.head(h[:, 2:].amax(1)),
    lambda net, h: net.head(net.both(h)[:, 5]),
    lambda net, h: net.head(net.mix(h.transpose(1, 2))[:, :, 4]),
    lambda net, h: net.head(h).transpose(1, 2)[:, :, 1],
    lambda net, h: (h * h[:, :1])[:, 7, :4] + (net.head(h)[:, 7:8] * h[:, :, :4])[:, 2],
    lambda net, h: (h.unsqueeze(1) + torch.ones(3, 12, 1))[:, 1, 6][:, :4],
    lambda net, h: (h[None] + h.unsqueeze(2).transpose(0, 1)[:1].transpose(0, 1)[:, :, 0])[0, :, 3, :4],
])
def test_narrowing_keeps_the_scores(read):
    net = Tokens(read).eval()
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    for choice in ("all", "scale", "norm.*"):
        sub = subset.select(net, choice)
        theta = vectors(net, sub)
        torch.testing.assert_close(ours(net, sub, theta, x)[0], plain(net, sub, theta, x))


class InPlace(nn.Module):
    """Writes chosen parameters into a view of what the frozen part computed, and reads it afterwards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.shift, self.head = nn.Linear(12, 6), nn.Parameter(torch.randn(3)), nn.Linear(6, 6)
        self.head.weight = self.tied = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        h = self.body(x.flatten(1))
        h[:, :3].add_(self.shift)
        return self.head(torch.relu_(h) @ self.tied)


@pytest.mark.parametrize("choice", ["shift", "tied", "head.weight", "body.bias,shift", "all"])
def test_in_place_operations_and_tied_parameters(choice):
    net = InPlace().eval()
    if choice in ("tied", "head.weight"):  # one of the two names is the parameter's own
        choice = next(n for n, p in net.named_parameters() if p is net.tied)
    sub = subset.select(net, choice)
    theta, x = vectors(net, sub), images(4, 2)
    scores, part, boundary = ours(net, sub, theta, x)
    assert torch.equal(scores, plain(net, sub, theta, x))
    again = torch.stack([part.rest(sub.unflatten(v), boundary) for v in theta])
    assert torch.equal(again, scores), "the rest changed what the frozen part handed over"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("choice", ["last_norms:1", "all", "3.weight"])
def test_batches_ragged_and_single(batch_size, choice, way):
    net = mini()
    sub = subset.select(net, choice)
    theta, x = vectors(net, sub, 4), images(7, 8)
    expected = torch.cat([plain(net, sub, theta, part).argmax(-1) for part in x.split(batch_size)], dim=1)
    assert torch.equal(evaluate.predict(net, sub, theta, x, batch_size=batch_size), expected)


@pytest.mark.parametrize("make, choice, size", [
    (mini, "all", 8), (mini, "last_norms:2", 8), (lambda: network("resnet18"), "last_norms:2", 32),
    (lambda: network("convnext_atto"), "last_norms:2", 32),
    (lambda: network("vit_tiny_patch16_224", img_size=48), "last_norms:2", 48),
])
def test_vmap_equals_the_loop(make, choice, size, captured):
    net = make()
    sub = subset.select(net, choice)
    theta, x = vectors(net, sub, 5), images(3, size)
    part = capture.split(net, sub.names, x)
    with torch.no_grad():
        boundary = part.frozen(x)
        together = evaluate._scores(part, sub, theta, boundary)
        torch.testing.assert_close(together, plain(net, sub, theta, x), rtol=1e-4, atol=1e-4)
    sure = together.topk(2).values.diff().abs().squeeze(-1) > 1e-3  # a near tie may go either way
    chunked = evaluate.predict(net, sub, theta, x, vectors_at_once=4)
    assert torch.equal(chunked[sure], evaluate.predict(net, sub, theta, x)[sure]) and sure.any()


def test_the_network_is_left_as_it_was(way):
    net = mini()
    net.train()
    net[4].eval()
    sub = subset.select(net, "all")
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    theta = vectors(net, sub)
    before = theta.clone()
    evaluate.predict(net, sub, theta, images(3, 8))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and torch.equal(theta, before)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_prepare_turns_uint8_into_what_the_network_takes(capsys, way):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    theta = vectors(net, sub)
    x = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def prepare(batch):
        return nn.functional.interpolate(batch.float() / 255, size=(8, 8))

    got = evaluate.predict(net, sub, theta, x, prepare=prepare, batch_size=2, progress=True)
    assert torch.equal(got, evaluate.predict(net, sub, theta, prepare(x), batch_size=2)) and got.dtype == torch.int64
    assert "evaluating" in capsys.readouterr().err


class Branching(nn.Module):
    """Control flow that depends on the images: no graph holds it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else -self.head(x.flatten(1))


def test_a_network_that_cannot_be_captured_runs_whole_and_says_so(captured):
    net = Branching()
    sub = subset.select(net, "all")
    theta, x = vectors(net, sub, 5), images(4, 2)
    with pytest.warns(UserWarning, match="Branching cannot be captured.*data-dependent"):
        got = evaluate.predict(net, sub, theta, x, vectors_at_once=4)
    assert torch.equal(got, plain(net, sub, theta, x).argmax(-1))


def test_one_vector_is_not_worth_a_capture(monkeypatch, captured):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    theta, x = vectors(net, sub, 1), images(4, 8)
    monkeypatch.setattr(capture, "split", lambda *_: pytest.fail("captured"))
    assert torch.equal(evaluate.predict(net, sub, theta, x), plain(net, sub, theta, x).argmax(-1))


def captures(monkeypatch):
    """A list that grows with each capture."""
    made, real = [], capture.split
    monkeypatch.setattr(capture, "split", lambda *a: made.append(1) or real(*a))
    return made


MANY = 600  # vectors on 4 small images: more than a capture of `mini` costs


@pytest.mark.parametrize("choice, count, expected", [("last_norms:1", 8, 0), ("last_norms:1", MANY, 1), ("all", MANY, 0)])
def test_a_capture_is_made_where_it_pays(monkeypatch, choice, count, expected):
    net, made = mini(), captures(monkeypatch)
    sub = subset.select(net, choice)
    theta, x = vectors(net, sub, count), images(4, 8)
    got = evaluate.predict(net, sub, theta, x)
    assert len(made) == expected and torch.equal(got, plain(net, sub, theta, x).argmax(-1))


def test_an_evaluator_adds_up_what_it_was_asked(monkeypatch):
    monkeypatch.setattr(capture, "CAPTURE", capture.CAPTURE / 10)
    net, made, many = mini(), captures(monkeypatch), MANY // 10
    sub = subset.select(net, "last_norms:1")
    theta, x = vectors(net, sub, many), images(4, 8)
    expected = plain(net, sub, theta, x).argmax(-1)
    evaluator, when = evaluate.Evaluator(net, sub, x), []
    for start in range(0, many, 5):
        assert torch.equal(evaluator.predict(theta[start:start + 5]), expected[start:start + 5])
        when.append(len(made))
    assert when[0] == 0 and when[-1] == 1
    alone = evaluate.Evaluator(net, sub, x, keep=0)  # one vector a call and nothing kept: a capture spares nothing, ever
    for row in theta:
        alone.predict(row[None])
    assert len(made) == 1


@torch.no_grad()
def test_what_is_frozen_is_counted():
    net = mini()  # convolution, norm, ReLU, convolution: 8 maps of 6 x 6 each
    count = capture.Count(net, subset.select(net, "4.*").names)
    assert torch.equal(count.run(images(1, 8)), net(images(1, 8)))
    multiplications, written = 36 * 8 * (3 * 9 + 8 * 9), 4 * 8 * 36
    assert (count.operations, count.frozen) == (12, 7)  # an empty tensor for each norm, the head transposed
    assert count.seconds_per_image == pytest.approx(capture.FLOP * 2 * multiplications + capture.ELEMENT * written)
    everything = capture.Count(net, subset.select(net, "all").names)
    everything.run(images(1, 8))
    assert (everything.operations, everything.frozen, everything.seconds_per_image) == (12, 2, 0)  # the empty tensors


def test_capturing_is_silent(captured):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.predict(net, sub, vectors(net, sub), images(3, 8), batch_size=2)


def test_wrong_accuracy_and_summary():
    net = mini()
    sub = subset.select(net, "all")
    theta, x = vectors(net, sub, 6), images(9, 8)
    y = plain(net, sub, theta, x)[0].argmax(-1)
    wrong = evaluate.wrong(net, sub, theta, x, y, batch_size=4)
    assert wrong.dtype == torch.bool and not wrong[0].any() and evaluate.accuracy(wrong)[0] == 1

    wrong = torch.rand(5, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    got, right = evaluate.summary(wrong, seed=3), (~wrong).double()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    best = right[:, order[:5]].mean(1).argmax()
    assert got == pytest.approx({
        "n_models": 5, "n_images": 11, "mean": right.mean().item(), "std": right.mean(1).std(correction=0).item(),
        "best": right.mean(1).max().item(), "best_selected_half": right[best, order[:5]].mean().item(),
        "best_other_half": right[best, order[5:]].mean().item()})
    assert got == evaluate.summary(wrong, seed=3)
    assert got["best_other_half"] != evaluate.summary(wrong, seed=4)["best_other_half"]
    with pytest.raises(ValueError, match="at least 1 model and 2 images"):
        evaluate.summary(wrong[:, :1])


def test_errors_before_any_work(monkeypatch, unchecked):
    predict, net = evaluate.predict, mini()
    sub = subset.select(net, "last_norms:1")
    theta, x = vectors(net, sub, 4), images(3, 8)
    monkeypatch.setattr(capture, "split", lambda *_: pytest.fail("work began"))
    spoilt = theta.clone()
    spoilt[2, 1], spoilt[3, 0] = float("nan"), float("inf")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, how, message in [
        ((theta[:, :-1], x), {}, r"theta has shape \[4, 15\]: expected \[vectors, 16\]"),
        ((theta[0], x), {}, r"theta has shape \[16\]"),
        ((theta[:0], x), {}, "theta holds 0 vectors"),
        ((spoilt, x), {}, "NaN or infinity in 2 of 4 vectors, first in vector 2"),
        ((theta, x[0]), {}, r"x has shape \[3, 8, 8\]: expected \[images, channels, height, width\]"),
        ((theta, x[:0]), {}, "at least 1 image"),
        ((theta, x[:, :1]), {}, r"Sequential does not take images of shape \[1, 8, 8\].*expected.*3 channels"),
        ((theta, x.byte()), {}, r"does not take images of shape \[3, 8, 8\] \(torch.uint8\)"),
        ((theta, x), {"device": "cuda"}, r"cuda requested but torch.cuda.is_available\(\) is False"),
        ((theta, x), {"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ((theta, x), {"vectors_at_once": -1}, "vectors_at_once is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(net, sub, *arguments, **how)
    with pytest.raises(ValueError, match=r"y has shape \[2\] \(torch.int64\): expected \[3\]"):
        evaluate.wrong(net, sub, theta, x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"4.weight of the subset has shape \(8,\): Sequential has None"):
        predict(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), sub, theta, x)
    with pytest.raises(ValueError, match=r"Conv2d returns \[\d, 8, 6, 6\] for images: expected class scores"):
        conv = nn.Conv2d(3, 8, 3)
        whole = subset.select(conv, "all")
        predict(conv, whole, vectors(conv, whole), x)


class Viewing(nn.Module):
    """Insists on contiguous tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def test_a_network_that_insists_on_contiguous_tensors_is_evaluated_in_them():
    torch.manual_seed(0)
    net = Viewing().eval()
    sub = subset.select(net, "head.*")
    theta, x = vectors(net, sub), images(5, 8)
    assert torch.equal(evaluate.predict(net, sub, theta, x), plain(net, sub, theta, x).argmax(-1))


def test_an_evaluator_runs_the_frozen_part_once(monkeypatch, captured):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    theta, x = vectors(net, sub, 5), images(7, 8)
    expected = plain(net, sub, theta, x).argmax(-1)
    frozen = []
    real = capture.split
    monkeypatch.setattr(capture, "split", lambda *a: (part := real(*a))._replace(
        frozen=lambda batch: frozen.append(len(batch)) or part.frozen(batch)))
    evaluator = evaluate.Evaluator(net, sub, x, batch_size=3)
    for chosen in (theta, theta[:2], theta[4:]):
        rows = [int((theta == row).all(1).nonzero()) for row in chosen]
        assert torch.equal(evaluator.predict(chosen), expected[rows])
    assert frozen == [3, 3, 3]  # 7 images in 3 batches of one size, once for all calls

    frozen.clear()
    forgetful = evaluate.Evaluator(net, sub, x, batch_size=3, keep=10)
    assert torch.equal(forgetful.predict(theta), expected) and torch.equal(forgetful.predict(theta[:2]), expected[:2])
    assert frozen == [3] * 6 and not forgetful.kept

    net.get_parameter(sub.names[0]).data.zero_()
    assert torch.equal(evaluator.predict(theta), expected)  # of the network as it was


def spoilt(net, sub, value, count=4):
    """Vectors of which the second and the fourth give scores that are not finite, though they are finite themselves."""
    theta = vectors(net, sub, count)
    theta[1], theta[3] = value * theta[1].sign(), value * theta[3].sign()
    return theta


@pytest.mark.parametrize("at_once", [1, 3])
def test_scores_that_are_not_finite_are_no_class_and_wrong(at_once, way):
    net = mini()
    sub = subset.select(net, "all")
    theta, x = spoilt(net, sub, 1e30), images(5, 8)
    with pytest.warns(UserWarning, match=r"2 of 4 networks give scores that are NaN or infinite, on 10 of 20 images.*network 1\)"):
        got = evaluate.predict(net, sub, theta, x, vectors_at_once=at_once)
    good = plain(net, sub, theta[[0, 2]], x)
    assert torch.equal(got[[0, 2]], good.argmax(-1)) and (got[[1, 3]] == evaluate.NO_CLASS).all()
    with pytest.warns(UserWarning, match="counted as wrong"):
        wrong = evaluate.wrong(net, sub, theta, x, torch.zeros(5, dtype=torch.uint8), vectors_at_once=at_once)
    assert wrong[[1, 3]].all() and torch.equal(wrong[0], good[0].argmax(-1) != 0)


def test_one_score_that_is_not_finite_spoils_its_image_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    sub = subset.select(net, "1.bias")
    x = images(4, 2)
    x[2, 0, 0, 0] = float("inf")
    with pytest.warns(UserWarning, match="1 of 1 networks.*on 1 of 4"):
        got = evaluate.predict(net, sub, torch.zeros(1, 3), x)[0]
    expected = plain(net, sub, torch.zeros(1, 3), x)[0].argmax(-1)
    expected[2] = evaluate.NO_CLASS
    assert torch.equal(got, expected)


@pytest.mark.parametrize("label", [-100, 5, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_without_a_score_are_named(label, dtype, unchecked):
    net = mini()
    sub = subset.select(net, "all")
    theta, x, y = vectors(net, sub), images(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    assert torch.equal(evaluate.wrong(net, sub, theta, x, y.to(dtype)), evaluate.wrong(net, sub, theta, x, y))
    y[1] = label
    if label >= 0 or dtype != torch.uint8:
        with pytest.raises(ValueError, match=rf"y holds 1 labels that Sequential has no score for \({label}\): expected 0 to 4"):
            evaluate.wrong(net, sub, theta, x, y.to(dtype))
    with pytest.raises(ValueError, match="torch.float32.*one class number per image"):
        evaluate.wrong(net, sub, theta, x, y.float())


@pytest.mark.parametrize("convert", [lambda t: t.double(), lambda t: t.half().float().half(), lambda t: t.bfloat16(),
                                     lambda t: t.clone().requires_grad_(), lambda t: t.numpy(),
                                     lambda t: t.double().numpy()], ids=["float64", "fp16", "bf16", "grad", "NumPy", "NumPy64"])
def test_vectors_of_any_kind_are_taken_as_float32(convert, unchecked):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    theta, x = vectors(net, sub), images(5, 8)
    given = convert(theta)
    expected = plain(net, sub, torch.as_tensor(given).detach().float(), x).argmax(-1)
    assert torch.equal(evaluate.predict(net, sub, given, x), expected)
    with pytest.raises(ValueError, match="int64"):
        evaluate.predict(net, sub, (10 * theta).long(), x)


def hungry(monkeypatch, limit: int) -> list[tuple[int, int]]:
    """A device whose memory holds `limit` vectors times images; returns what was tried."""
    tried, real = [], evaluate._scores

    def scores(part, sub, theta, boundary):
        tried.append((len(theta), len(boundary[0])))
        if len(theta) * len(boundary[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(part, sub, theta, boundary)

    monkeypatch.setattr(evaluate, "_scores", scores)
    return tried


def test_without_memory_it_goes_on_with_less(monkeypatch, captured):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    theta, x = vectors(net, sub, 8), images(8, 8)
    expected = plain(net, sub, theta, x).argmax(-1)
    tried = hungry(monkeypatch, 16)
    evaluator = evaluate.Evaluator(net, sub, x, vectors_at_once=8)
    assert torch.equal(evaluator.predict(theta), expected)
    assert tried[:4] == [(8, 8), (8, 8), (4, 8), (2, 8)] and not evaluator.kept  # first, what was kept is dropped
    assert (evaluator.vectors_at_once, evaluator.batch) == (2, 8)

    hungry(monkeypatch, 2)
    assert torch.equal(evaluate.predict(net, sub, theta, x, vectors_at_once=8), expected)
    hungry(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):  # not "does not take images"
        evaluate.predict(net, sub, theta, x)


@pytest.mark.parametrize("where", ["forward", "capture"])
def test_out_of_memory_is_no_fault_of_the_network(monkeypatch, where, captured):
    net = mini()
    sub = subset.select(net, "all")
    theta, x = vectors(net, sub), images(3, 8)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "forward":
        monkeypatch.setattr(net[0], "forward", full)
    else:
        monkeypatch.setattr(capture, "split", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor "cannot be captured"
        with pytest.raises(torch.OutOfMemoryError):
            evaluate.predict(net, sub, theta, x, batch_size=1)


def test_what_is_kept_has_one_budget_per_process(monkeypatch, captured):
    net = mini()
    sub = subset.select(net, "last_norms:1")
    theta, x, cpu = vectors(net, sub), images(7, 8), torch.device("cpu")
    kept.drop(cpu)
    evaluators = [evaluate.Evaluator(net, sub, x, batch_size=4) for _ in range(3)]
    evaluators[0].predict(theta)
    size = evaluators[0].kept.nbytes
    assert size > 0
    free = {"bytes": 10 * size}
    monkeypatch.setattr(training, "free_memory", lambda device: free["bytes"])
    evaluators[1].predict(theta)  # (10 + 1) / 4: two of them
    assert [bool(e.kept) for e in evaluators] == [True, True, False]
    free["bytes"] = 6 * size  # (6 + 2) / 4: two
    evaluators[2].predict(theta)
    assert [bool(e.kept) for e in evaluators] == [False, True, True]
    del evaluators[1]  # memory that went with its evaluator counts no more
    free["bytes"] = 2 * size  # (2 + 1) / 4: none
    evaluators[0].predict(theta)
    assert [bool(e.kept) for e in evaluators] == [False, True] and evaluators[1].kept.nbytes == size
    assert kept.drop(cpu) and not kept.drop(cpu) and not evaluators[1].kept


class FiveAxes(nn.Module):
    """A parameter of five axes, which knows no channels-last layout of four (timm's lambda networks have some)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.taps, self.head = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 4, 1, 3, 3)), nn.Linear(4, 5)

    def forward(self, x):
        h = nn.functional.conv3d(self.conv(x)[:, :, None], self.taps)
        return self.head(h.mean((2, 3, 4)))


def weight_normed(kind):
    torch.manual_seed(0)
    net = nn.Sequential(kind(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net(images(2, 8))
    return net.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*cannot be captured")
@pytest.mark.parametrize("make", [FiveAxes, lambda: weight_normed(torch.nn.utils.weight_norm),
                                  lambda: weight_normed(torch.nn.utils.parametrizations.weight_norm),
                                  lambda: weight_normed(torch.nn.utils.parametrizations.spectral_norm)])
def test_unusual_networks_are_evaluated_like_any_other(make, way):
    net = make().eval()
    sub = subset.select(net, "all")
    theta, x = vectors(net, sub), images(5, 8)
    expected = plain(net, sub, theta, x).argmax(-1)
    assert torch.equal(evaluate.predict(net, sub, theta, x), expected)
    assert torch.equal(evaluate.predict(net, sub, theta[:1], x), expected[:1])


class Random(nn.Module):
    """Draws random numbers, which a vmap refuses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        scores = self.head(x.flatten(1))
        return scores + 0 * torch.rand_like(scores)


def test_a_network_that_takes_one_vector_at_a_time_gets_one(recwarn, captured):
    net = Random().eval()
    sub = subset.select(net, "all")
    theta, x = vectors(net, sub, 5), images(4, 2)
    assert torch.equal(evaluate.predict(net, sub, theta, x, vectors_at_once=4), plain(net, sub, theta, x).argmax(-1))
    assert ["several vectors at once" in str(w.message) for w in recwarn] == [True]


def test_a_rehearsal_says_before_any_work_what_would_fail_after_it():
    net = mini()
    sub = subset.select(net, "all")
    evaluate.rehearse(net, sub, (3, 8, 8), torch.device(DEVICE))
    with pytest.raises(ValueError, match="does not take images"):
        evaluate.rehearse(net, sub, (1, 8, 8), torch.device(DEVICE))
    branching = Branching()
    with pytest.warns(UserWarning, match="Branching cannot be captured"):
        evaluate.rehearse(branching, subset.select(branching, "all"), (3, 2, 2), torch.device(DEVICE))


@pytest.mark.parametrize("prepare", [None, lambda x: x * 2 + 1])
def test_a_few_vectors_are_evaluated_as_many_are_and_leave_the_network_alone(monkeypatch, prepare):
    net = mini().train()
    net[1].eval()  # a frozen layer
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    sub, x = subset.select(net, "last_norms:1"), images(40, 8)
    theta = sub.flatten(net) + torch.randn(3, sub.numel, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(evaluate, "Evaluator", lambda *_, **__: pytest.fail("made ready for many"))
    few_ones = evaluate.predict(net, sub, theta, x, prepare=prepare)
    monkeypatch.undo()
    assert torch.equal(few_ones, evaluate.Evaluator(net, sub, x, prepare=prepare).predict(theta)) and len(few_ones.unique()) > 1
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_what_is_few_depends_on_counts_alone():
    small, middle, large = nn.Linear(10, 10), nn.Linear(400, 400), nn.Linear(1000, 1001)
    assert few.are_few(large, 2, 256) and not few.are_few(large, 2, 257) and not few.are_few(large, 3, 10)
    assert few.are_few(middle, 8, 16) and not few.are_few(middle, 8, 17)
    assert few.are_few(small, 64, 16) and not few.are_few(small, 64, 17)


def test_few_vectors_leave_the_network_with_what_it_held():
    """Also where the network does not take the images; and a tensor that is used twice is changed in both places."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    net[2].weight = net[1].weight
    sub = subset.select(net, "1.weight,3.weight")
    held = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in net.state_dict().items()}
    theta, x = torch.randn(2, sub.numel, generator=torch.Generator().manual_seed(0)), torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    scores = few.scores(net, sub, theta, x)
    with pytest.raises(ValueError, match="Sequential does not take images of shape .1, 5, 5"):
        few.scores(net, sub, theta, torch.randn(3, 1, 5, 5))
    assert all(held[name][0] == tensor.data_ptr() and torch.equal(held[name][1], tensor) for name, tensor in net.state_dict().items())
    assert net[2].weight is net[1].weight and net[1].weight.requires_grad
    for vector, found in zip(theta, scores):
        values = sub.unflatten(vector)
        twice = nn.functional.linear(nn.functional.linear(x.flatten(1), values["1.weight"], net[1].bias), values["1.weight"], net[2].bias)
        torch.testing.assert_close(found, nn.functional.batch_norm(twice, net[3].running_mean, net[3].running_var, values["3.weight"], net[3].bias))
