"""Segmentation: mIoU and wrong pixels by count, evaluation in parts, pixels that do not count."""

import pytest
import torch

from pdiff_lib.base.recipe import Recipe
from pdiff_lib.base.runs import Store
from pdiff_lib.experiment import ORIGINAL, Experiment
from pdiff_lib.networks import subset
from pdiff_lib.tasks import segmentation, task
from pdiff_lib.tasks.scenes import NOT_COUNTED

SETTINGS = dict(task="segmentation", dataset="scenes", image_size=48, train_images=24, test_images=12, network="fcn-mini", pretrained=False,
                crop_scale=1.0, flip=True, base_epochs=2, base_lr=2e-3, base_batch=8, subset="backbone.body.layer4.0.bn2.*", k_checkpoints=4,
                zoo_batch=8, zoo_lr=1e-3, samples=3, ae_channels=[4, 4], latent_dim=2, ae_steps=2, ae_batch=2, denoiser_channels=[4, 4],
                diffusion_steps=2)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    return Experiment(Recipe.of(**SETTINGS), Store(tmp_path_factory.mktemp("stages")), device="cpu", progress=False)


def by_hand(given, wanted, classes):
    """Mean IoU over the classes that are there, and accuracy's complement at the drawn pixels, by loops."""
    counted = wanted != NOT_COUNTED
    found = []
    for c in range(classes):
        if ((wanted == c) & counted).any():
            both = ((given == c) & (wanted == c) & counted).sum()
            found.append(both / (((given == c) | (wanted == c)) & counted).sum())
    return torch.stack(found).mean()


def test_scores_are_those_of_masks_of_the_whole_network(walked):
    judge, theta = walked.task, walked.theta(ORIGINAL)
    outputs = walked.predictions(ORIGINAL)
    x = judge.prepared(judge.x_test)
    with torch.no_grad():
        given = torch.stack([torch.func.functional_call(walked.net, walked.subset.unflatten(v), (x,))["out"].argmax(dim=1) for v in theta])
    assert (judge.masks(walked.net, walked.subset, theta, judge.x_test, torch.device("cpu")) == given).float().mean() > 0.999
    judged, some = judge.judged(outputs), judge.judged(outputs, items=torch.tensor([2, 5]))
    for m in range(len(theta)):
        assert judged.score[m] == pytest.approx(float(by_hand(given[m], judge.y_test.long(), 11)), abs=1e-3)
        assert some.score[m] == pytest.approx(float(by_hand(given[m, [2, 5]], judge.y_test[[2, 5]].long(), 11)), abs=1e-3)
    wrong = (given != judge.y_test).flatten(2).gather(2, judge.pixels.expand(len(theta), -1, -1)).flatten(1)
    assert (judged.wrong == wrong).float().mean() > 0.999 and judged.wrong.shape == (4, 12 * 1667)
    assert outputs.shape == (4, 12, 2 * 11 + 1667)


def test_the_whole_line_runs(walked):
    frame = walked.frame([ORIGINAL, "p-diff", "average"])
    assert list(frame.method.value_counts(sort=False)) == [4, 3, 1]
    assert frame.score.between(0, 1).all() and frame.max_similarity.between(0, 1).all()
    summary = walked.summary([ORIGINAL])
    assert summary["mean"].iloc[0] == pytest.approx(float(walked.judged(ORIGINAL).score.mean()))


def test_pixels_that_do_not_count_are_drawn_nowhere_and_change_nothing():
    judge = task.of(Recipe.of(**SETTINGS).data)
    judge.y_test = judge.y_test.clone()
    judge.y_test[:, :24] = NOT_COUNTED
    judge.pixels = segmentation._drawn(judge.y_test != NOT_COUNTED, 1200)
    assert (judge.pixels >= 24 * 48).all() and judge.pixels.shape == (12, 100)

    class Says(torch.nn.Module):
        """Scores of the classes that an image's first channel holds, and of nothing else."""

        numbers = tuple(range(1, 11))

        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(1)

        def forward(self, x):
            given = (x[:, 0] * segmentation.STD[0] + segmentation.MEAN[0]).mul(255).round().long()
            return torch.nn.functional.one_hot(given.clamp(0, 10), 11).permute(0, 3, 1, 2) * self.norm.weight

    answers = judge.y_test.long().clamp(max=10).clone()
    answers[:, :24] = 3  # wrong, where nothing counts
    judge.x_test = answers[:, None].expand(-1, 3, -1, -1).byte()
    net = Says()
    sub = subset.select(net, "norm.weight")
    outputs = judge.predictor(net, sub, torch.device("cpu"))(torch.tensor([[1.0], [-1.0]]))
    judged = judge.judged(outputs)
    assert judged.score[0] == 1 and not judged.wrong[0].any() and judged.score[1] < 0.1 and judged.wrong[1].any()
    inf = outputs.clone()
    inf[1, :, 22:] = segmentation.NO_CLASS
    with pytest.warns(UserWarning, match="1 of 2 networks give scores that are NaN or infinite .first: network 1."):
        judge.warned(inf)
    assert judge.judged(inf).wrong[1].all()


def test_scores_that_are_not_finite_are_no_class():
    scores = torch.zeros(1, 3, 2, 2)
    scores[0, 1, 0, 0], scores[0, 2, 1, 1] = torch.nan, 1
    assert segmentation._classes(scores).tolist() == [[[-1, 0], [0, 2]]]


def test_boxes_alone_and_wrong_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a segmenter"):
        Experiment(Recipe.of(**SETTINGS | {"network": "fcos-mini"}), Store(tmp_path), device="cpu", progress=False)
    with pytest.raises(ValueError, match="crop_scale is 0.2"):
        Experiment(Recipe.of(**SETTINGS | {"crop_scale": 0.2}), Store(tmp_path), device="cpu", progress=False)


def test_what_is_dropped_in_training_comes_from_the_step_alone():
    recipe = Recipe.of(**SETTINGS)
    judge = task.of(recipe.data)
    net = judge.network(recipe.base).train()
    assert any(isinstance(m, torch.nn.Dropout) for m in net.modules())
    loss_at, _ = judge.loss(net, 8, recipe.base, torch.device("cpu"), "train")
    with torch.no_grad():
        first = [loss_at(i) for i in (0, 1)]
        torch.rand(5)
        assert [loss_at(i) for i in (1, 0)] == first[::-1] and first[0] != first[1]
