"""Detection: AP as pycocotools says it, what counts as found, training that learns and repeats, and evaluation in parts."""

import contextlib
import io

import numpy as np
import pytest
import torch

from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.networks import capture, detectors, subset
from pdiff_lib.tasks import task
from pdiff_lib.tasks.scenes import NOTHING

SETTINGS = dict(task="detection", dataset="scenes", image_size=48, train_images=24, test_images=12, network="fcos-mini", pretrained=False,
                crop_scale=1.0, flip=False, base_epochs=2, base_lr=2e-3, base_batch=8, subset="head.*.conv.4.*", k_checkpoints=4, zoo_batch=8,
                zoo_lr=1e-3, samples=3, ae_channels=[4, 4], latent_dim=2, ae_steps=2, ae_batch=2, denoiser_channels=[4, 4], diffusion_steps=2)


@pytest.fixture(scope="module")
def scenes_():
    return task.of(Recipe.of(**SETTINGS).data)


def detections(judge, noise=2.0, seed=0):
    """Four guesses around each object: boxes off by some pixels, some with another class, of random scores."""
    random = torch.Generator().manual_seed(seed)
    out = torch.full((1, len(judge.y_test), 20, 6), -1.0)
    for i, objects in enumerate(judge.y_test):
        there = objects[objects[:, 4] != NOTHING].repeat(4, 1)
        boxes = there[:, :4] + noise * torch.randn(len(there), 4, generator=random)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        other = torch.rand(len(there), generator=random) < 0.3
        label = torch.where(other, torch.randint(0, 10, (len(there),), generator=random).float(), there[:, 4])
        score = torch.rand(len(there), generator=random)
        out[0, i, :len(there)] = torch.cat([boxes, score[:, None], label[:, None]], dim=1)
    return out


def by_pycocotools(y, found, size):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    notes, results = [], []
    for i, objects in enumerate(y.tolist()):
        for x0, y0, x1, y1, label, crowd in objects:
            if label >= 0:
                notes.append({"id": len(notes) + 1, "image_id": i, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0],
                              "area": (x1 - x0) * (y1 - y0), "iscrowd": int(crowd)})
        for x0, y0, x1, y1, score, label in found[i].tolist():
            if label >= 0:
                results.append({"image_id": i, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, "images": [{"id": i, "width": size, "height": size} for i in range(len(y))], "annotations": notes,
                         "categories": [{"id": c, "name": str(c)} for c in range(10)]}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[0], judge.stats[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_is_that_of_pycocotools(scenes_, seed):
    found = detections(scenes_, seed=seed)
    ours, theirs = scenes_.ap(found)[0], by_pycocotools(scenes_.y_test, found[0], 48)
    assert np.allclose(ours.numpy(), theirs, atol=1e-9) and 0.05 < ours[0] < ours[1] < 0.95


def test_perfect_detections_have_an_ap_of_1_and_none_of_0(scenes_):
    perfect = torch.full((2, len(scenes_.y_test), 20, 6), -1.0)
    for i, objects in enumerate(scenes_.y_test):
        there = objects[objects[:, 4] != NOTHING]
        perfect[0, i, :len(there)] = torch.cat([there[:, :4], torch.ones(len(there), 1), there[:, 4:5]], dim=1)
    judged = scenes_.judged(perfect)
    assert judged.score.tolist() == [1, 0] and not judged.wrong[0].any() and judged.wrong[1].all()
    assert judged.wrong.shape[1] == int((scenes_.y_test[..., 4] != NOTHING).sum())


def test_found_is_the_right_class_at_an_iou_and_a_score_of_a_half(scenes_):
    y = scenes_.y_test
    first = y[0, 0]
    side = first[2] - first[0]
    shifted = first[:4] + torch.tensor([side / 2, 0, side / 2, 0])  # IoU 1/3
    near = first[:4] + torch.tensor([side / 4, 0, side / 4, 0])  # IoU .6
    cases = {(tuple(first[:4]), 0.5, 0): False, (tuple(first[:4]), 0.49, 0): True, (tuple(first[:4]), 0.9, 1): True,
             (tuple(shifted), 0.9, 0): True, (tuple(near), 0.9, 0): False}
    for (box, score, off), wrong in cases.items():
        found = torch.full((1, len(y), 20, 6), -1.0)
        found[0, 0, 3] = torch.tensor([*box, score, (first[4] + off) % 10])
        assert bool(scenes_.missed(found)[0, 0]) == wrong


def test_parts_of_the_images_are_judged_alone_and_numbers_that_are_not_finite_are_no_score(scenes_):
    found = detections(scenes_)
    half = torch.tensor([1, 5, 7])
    expected = by_pycocotools(scenes_.y_test[half], found[0, half], 48)
    assert np.allclose(scenes_.ap(found, half)[0].numpy(), expected)
    assert scenes_.missed(found, half).shape[1] == int((scenes_.y_test[half, :, 4] != NOTHING).sum())
    found[0, 5] = torch.nan
    with pytest.warns(UserWarning, match="1 of 1 networks give NaN"):
        scenes_.warned(found)
    assert scenes_.judged(found).score.isnan().all() and scenes_.ap(found, torch.tensor([1, 7])).isfinite().all()


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return Experiment(Recipe.of(**SETTINGS), Store(tmp_path_factory.mktemp("stages")), device="cpu", progress=False)


def test_the_whole_line_runs_and_predictions_are_those_of_the_whole_network(walked):
    frame = walked.frame([ORIGINAL, "p-diff", "average"])
    assert list(frame.method.value_counts(sort=False)) == [4, 3, 1] and frame.score.between(0, 1).all()
    assert walked.subset.numel == 256 and (walked.zoo.theta[0] != walked.zoo.theta[-1]).any()
    x, theta = walked.task.x_test, walked.theta(ORIGINAL)
    with torch.no_grad():
        whole = torch.stack([detectors.table(torch.func.functional_call(walked.net, walked.subset.unflatten(v), (list(x.float() / 255),)), 20)
                             for v in theta])
    ours = walked.predictions(ORIGINAL)
    whole[..., 5] = torch.where(whole[..., 5] > 0, whole[..., 5] - 1, whole[..., 5])  # the network's numbers start at 1
    assert torch.allclose(ours, whole, atol=1e-4) and (ours[..., 5] >= 0).any()


def test_training_learns_and_repeats_step_by_step(scenes_, tmp_path):
    recipe = Recipe.of(**SETTINGS | {"network": "fasterrcnn-mini", "flip": True})
    losses = []
    for _ in range(2):
        net = scenes_.network(recipe.base).train()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        loss_at, per_epoch = scenes_.loss(net, 8, recipe.base, torch.device("cpu"), "train")
        run = []
        for i in range(8):
            loss = loss_at(i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
        torch.rand(3)  # whatever else draws numbers
    assert losses[0] == losses[1] and per_epoch == 3 and np.mean(losses[0][-2:]) < 0.8 * np.mean(losses[0][:2])


def test_a_backbone_that_cannot_be_captured_runs_whole_with_a_warning_and_finds_the_same(walked, monkeypatch):
    theta, ours = walked.theta(ORIGINAL), walked.predictions(ORIGINAL)
    monkeypatch.setattr(capture, "split", lambda *_: exec("raise RuntimeError('no graph')"))
    with pytest.warns(UserWarning, match="Dense cannot be captured, so the whole network runs for every vector .RuntimeError: no graph"):
        whole = walked.task.predictor(walked.net, walked.subset, torch.device("cpu"))
    assert torch.allclose(whole(theta), ours, atol=1e-4)
    assert torch.equal(whole(theta[:1]), whole(theta)[:1])


class Odd(torch.nn.Module):
    """A detector of nobody's kind: it says that everything is a 3."""

    detections_per_img = 5

    def __init__(self):
        super().__init__()
        self.score = torch.nn.Parameter(torch.tensor([0.7]))
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, images, targets=None):
        box = self.norm(torch.tensor([[0.0, 1, 2, 3]])) * 0 + torch.tensor([[1.0, 1, 20, 20]])
        return [{"boxes": box, "scores": self.score, "labels": torch.tensor([4])} for _ in images]


def test_a_detector_whose_parts_are_not_known_runs_whole_with_a_warning(scenes_):
    net = Odd()
    net.input_shape, net.numbers = (3, 48, 48), tuple(range(1, 11))
    scenes_.check(net)
    sub = subset.select(net, "score")
    with pytest.warns(UserWarning, match="Odd cannot be captured, so the whole network runs for every vector"):
        predictor = scenes_.predictor(net, sub, torch.device("cpu"))
    found = predictor(torch.tensor([[0.25], [0.75]]))
    assert found.shape == (2, 12, 5, 6) and found[:, :, 0, 4].unique(dim=1).flatten().tolist() == [0.25, 0.75]
    assert (found[:, :, 0, 5] == 3).all() and (found[:, :, 1:] == -1).all()


@pytest.mark.parametrize("changes, message", [
    ({"crop_scale": 0.5}, "crop_scale is 0.5: expected 1.0"), ({"network": "resnet18"}, "expected a detector"),
    ({"task": "classification"}, "has several objects in an image: expected task 'detection'"), ({"dataset": "digits"}, "expected 'scenes'")])
def test_what_does_not_fit_is_said_at_once(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Experiment(Recipe.of(**SETTINGS | changes), Store(tmp_path), device="cpu", progress=False)


def test_statistics_that_cannot_be_computed_anew_are_refused_before_training(tmp_path):
    e = Experiment(Recipe.of(**SETTINGS | {"buffers": "recalibrate"}), Store(tmp_path), device="cpu", progress=False)
    with pytest.raises(ValueError, match="buffers is 'recalibrate', .*fcos-mini of task 'detection' says 'targets should not be none"):
        e.net
    assert not list(tmp_path.rglob("*.safetensors"))
