"""task.py, classification.py, regression.py: what is judged, against the same computed plainly; and from a recipe to a table."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from torch import nn

from device import DEVICE
from pdiff_lib.base import runs, score as scores
from pdiff_lib.base.recipe import Base, Data, Recipe
from pdiff_lib.experiment import AVERAGE, ORIGINAL, PDIFF, Experiment
from pdiff_lib.generators import coded
from pdiff_lib.networks import subset, symmetry
from pdiff_lib.tasks import data, task
from pdiff_lib.tasks.classification import Classification
from pdiff_lib.tasks.regression import Regression

TABLE = {"task": "regression", "dataset": "diabetes", "network": "mlp-8", "pretrained": False, "subset": "all", "base_epochs": 30,
         "base_batch": 50, "base_lr": 0.01, "k_checkpoints": 6, "zoo_batch": 50, "zoo_lr": 0.01, "ae_channels": [2, 2], "latent_dim": 4,
         "ae_steps": 3, "denoiser_channels": [2, 2, 2], "diffusion_steps": 3, "T": 10, "samples": 4, "noise_scales": [0.05]}


def experiment(folder=None, **changes) -> Experiment:
    return Experiment(Recipe.of(**{**TABLE, **changes}), runs.Store(folder), device=DEVICE, progress=False)


@pytest.fixture(scope="module")
def done() -> Experiment:
    e = experiment(zoo_mode="independent")
    e.frame()
    return e


def outputs_plain(e: Experiment, name: str) -> np.ndarray:
    """What each network gives for each test row, one after the other."""
    net, found = e.task.network(e.recipe.base), []
    for theta in e.theta(name):
        e.subset.load(net, theta)
        with torch.no_grad():
            found.append(net.eval()(e.task.x_test)[:, 0].numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", [ORIGINAL, PDIFF, "noise 0.05", AVERAGE])
def test_a_table_of_regression_is_r2_and_who_is_off_by_more_than_usual(done, name):
    found, y = outputs_plain(done, name), done.task.y_test.numpy()
    np.testing.assert_allclose(done.predictions(name)[..., 0].numpy(), found, atol=1e-5)
    rows = done.frame([name])
    np.testing.assert_allclose(rows.score, [r2_score(y, f) for f in found], atol=1e-4)
    usual = np.median(np.abs(outputs_plain(done, ORIGINAL) - y))
    agree = (done.wrong(name).numpy() == (np.abs(found - y) > usual)).mean()
    assert agree > 0.995  # but for ties of rounding
    assert 0.3 < done.wrong(ORIGINAL).float().mean() < 0.7
    assert list(rows) == ["method", "index", "score", "max_similarity", "nearest", "distance", "outside_span"]


def test_originals_learn_more_than_the_mean_and_each_is_trained_by_itself(done):
    assert done.frame([ORIGINAL]).score.min() > 0.2
    assert torch.pdist(done.zoo.theta).min() > 1


def test_summary_picks_on_one_half_of_the_rows_and_reports_on_the_other(done):
    row, found, y = done.summary().loc["noise 0.05"], outputs_plain(done, "noise 0.05"), done.task.y_test.numpy()
    first, second = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tensor_split([len(y) // 2])
    here = [r2_score(y[first], f[first]) for f in found]
    best = int(np.argmax(here))
    assert (row.n_models, row.n_items) == (4, 142)
    np.testing.assert_allclose([row.best_selected_half, row.best_other_half], [here[best], r2_score(y[second], found[best][second])], atol=1e-4)


def test_a_trajectory_of_regression_and_a_second_look_from_its_stages(tmp_path):
    first, again = experiment(tmp_path), experiment(tmp_path)
    frame = first.frame([ORIGINAL, PDIFF])
    assert first.training_path(3).accuracy.shape == (3,)
    again.zoo.theta
    again.task.predictor = None  # nothing is evaluated again
    pd.testing.assert_frame_equal(frame, again.frame([ORIGINAL, PDIFF]))


def test_the_split_is_of_all_rows_once_and_in_units_of_the_training_rows():
    t, raw = Regression(Data(task="regression", dataset="diabetes")), load_diabetes(scaled=False)
    assert (len(t.x_train), len(t.x_test)) == (300, 142)
    torch.testing.assert_close(t.x_train.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(t.y_train.std(), torch.tensor(1.0))
    order = torch.cat([t.y_train, t.y_test]).double().sort().values
    raw = torch.tensor(np.sort(raw.target))
    torch.testing.assert_close((order - order[0]) / (order[-1] - order[0]), (raw - raw[0]) / (raw[-1] - raw[0]), atol=1e-5, rtol=0)


def test_tables_of_ones_own_come_from_parquet(tmp_path):
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=["a", "b", "wanted"])
    rows[:20].to_parquet(tmp_path / "train.parquet")
    rows[20:].to_parquet(tmp_path / "test.parquet")
    t = Regression(Data(task="regression", dataset=f"{tmp_path}/train.parquet,{tmp_path}/test.parquet"))
    mean, std = rows[:20].mean(), rows[:20].std()
    np.testing.assert_allclose(t.x_test.numpy(), ((rows[20:] - mean) / std)[["a", "b"]], rtol=1e-5)
    np.testing.assert_allclose(t.y_test.numpy(), ((rows[20:] - mean) / std).wanted, rtol=1e-5)
    rows.assign(a="x")[20:].to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="expected at least two, all numbers"):
        Regression(Data(task="regression", dataset=f"{tmp_path}/train.parquet,{tmp_path}/test.parquet"))


@pytest.mark.parametrize("changes, message", [
    ({"task": "regresion"}, "did you mean 'regression'"),
    ({"task": "no_such_module:Task"}, "task 'no_such_module:Task': module no_such_module cannot be imported"),
    ({"task": "pathlib:Path"}, "expected a class derived from"),
    ({"dataset": "cifar10"}, "expected 'diabetes' or TRAIN.parquet"),
    ({"network": "resnet18"}, "expected 'mlp-32-32'"),
    ({"network": "mlp-0"}, "expected 'mlp-32-32'"),
    ({"pretrained": True}, "expected False and ''"),
    ({"train_images": 5}, "are for images"),
    ({"network": "timm:create_model"}, r"cannot be built with in_features = 10, out_features = 1 \(TypeError"),
])
def test_what_a_task_does_not_take_is_said_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(**changes)


def test_outputs_that_are_not_finite_are_wrong_and_leave_no_score(done):
    outputs = done.predictions(ORIGINAL).clone()
    outputs[2, 5] = torch.nan
    with pytest.warns(UserWarning, match=r"1 of 6 networks give NaN or infinity \(first: network 2\)"):
        done.task.warned(outputs)
    judged = done.task.judged(outputs, done.predictions(ORIGINAL))
    assert judged.score.isnan().tolist() == [i == 2 for i in range(6)] and bool(judged.wrong[2, 5])
    summary = done.task.summary(outputs, done.predictions(ORIGINAL))
    assert np.isnan(summary["mean"]) and summary["best"] == judged.score.nan_to_num(nan=-9).max()


class Upward(task.Task):
    """A line's slope; the lower its error the better, and nothing is "wrong"."""

    score = scores.Score("error", better="lower")

    def __init__(self, data):
        self.name, self.x_train = "line", torch.linspace(-1, 1, 40)[:, None]
        self.y_train = 2 * self.x_train
        self.x_test, self.y_test = self.x_train[::2], self.y_train[::2]

    def network(self, base):
        return nn.Linear(1, 1)

    def criterion(self, outputs, wanted):
        return nn.functional.mse_loss(outputs, wanted)

    def judged(self, outputs, originals=None, items=None):
        error = (outputs - self.y_test).square().flatten(1).double()
        return task.Judged((error if items is None else error[:, items]).mean(1), None)


def test_a_task_of_ones_own_without_wrong_and_with_a_score_that_is_better_lower(monkeypatch):
    monkeypatch.setitem(task.TASKS, "upward", f"{__name__}:Upward")
    e = experiment(task="upward", network="anything")
    frame = e.frame([ORIGINAL, "gaussian"])
    assert frame.max_similarity.isna().all() and (frame.nearest == -1).all() and scores.of(frame) == Upward.score
    assert e.summary([ORIGINAL]).best.item() == frame.score[frame.method == ORIGINAL].min()
    with pytest.raises(ValueError, match="no items that a network gets wrong"):
        e.wrong(ORIGINAL)


def test_classification_by_its_task_is_what_evaluate_says():
    images = data.load("digits", size=32, train_images=60, test_images=50)
    t = Classification(images)
    net = t.network(Base(network="test_resnet", pretrained=False))
    sub = subset.select(net, "last_norms:1")
    theta = sub.flatten(net).repeat(3, 1) * torch.tensor([[1.0], [0.5], [2.0]])
    judged = t.judged(t.predictor(net, sub, torch.device(DEVICE))(theta))
    with torch.no_grad():
        plain = torch.stack([sub.load(net.eval(), v)(images.prepare(images.x_test)).argmax(1) for v in theta])
    assert torch.equal(judged.wrong, plain != images.y_test)
    torch.testing.assert_close(judged.score, (plain == images.y_test).double().mean(1))


def test_equal_vectors_give_equal_numbers_wherever_they_stand():
    t = Regression(Data(task="regression", dataset="diabetes"))
    net = t.network(Base(network="mlp-8", pretrained=False))
    sub = subset.select(net, "all")
    theta = sub.flatten(net).repeat(task.AT_ONCE + 3, 1)
    outputs = task.predict(net, sub, theta, t.x_test, DEVICE)
    assert (outputs == outputs[0]).all() and torch.equal(task.predict(net, sub, theta[:1], t.x_test, DEVICE)[0], outputs[0])


def test_a_score_is_found_in_a_frame_also_after_parquet(tmp_path, done):
    frame = done.frame([ORIGINAL])
    frame.to_parquet(tmp_path / "x.parquet")
    assert scores.of(pd.read_parquet(tmp_path / "x.parquet")) == scores.of(frame) == Regression.score
    assert scores.of(pd.DataFrame({"accuracy": [1.0]})) == scores.ACCURACY
    with pytest.raises(ValueError, match="expected 'accuracy' or 'score'"):
        scores.of(pd.DataFrame({"loss": [1.0]}))
    with pytest.raises(ValueError, match="expected 'higher' or 'lower'"):
        scores.Score("x", better="up")


class Asked:
    """A generator that answers with its condition."""

    def fit(self, theta, condition):
        self.seen, self.width = condition, theta.shape[1]

    def sample(self, n, generator=None, condition=None):
        self.wanted = condition
        return condition[:, :1].expand(n, self.width)


def test_a_condition_reaches_fit_and_sample_and_is_refused_by_who_takes_none(done, unchecked):
    asked, rows = Asked(), torch.arange(12.0).view(6, 2)
    done.add("asked", asked, condition=rows, wanted=rows[3])
    assert torch.equal(done.theta("asked"), torch.full((4, done.subset.numel), 6.0))
    assert torch.equal(asked.seen, rows) and torch.equal(asked.wanted, rows[3].expand(4, 2))
    for name, method in done.methods.items():
        if name != "asked":
            with pytest.raises(ValueError, match="takes no condition"):
                method.fit(done.zoo.theta, condition=rows)
            with pytest.raises(ValueError, match="takes no condition"):
                done.fitted(name).sample(2, condition=rows)
    for wrong, message in (({"condition": rows[:5], "wanted": rows[0]}, "has 5 rows: expected one per original, 6"),
                           ({"condition": rows}, "together, or neither"), ({"condition": rows, "wanted": rows[0, :1]}, r"expected \[2\]")):
        with pytest.raises(ValueError, match=message):
            done.add("other", Asked(), **wrong)
    for method in (done.pdiff(), done.vae(), coded.Coded(done.pdiff(), coded.PCA(2))):
        with pytest.raises(ValueError, match="takes no condition"):
            done.add("other", method, condition=rows, wanted=rows[0])


def test_steps_are_undone_in_the_opposite_order_and_any_generator_can_be_wrapped(done, unchecked):
    theta = done.zoo.theta

    class Copies:
        def fit(self, theta):
            self.theta = theta

        def sample(self, n, generator=None):
            return self.theta[:n]

    sizes = done.subset.sizes
    exact = coded.Coded(Copies(), coded.Standardise(sizes), coded.PCA(99)).fit(theta)
    assert exact.generator.theta.shape == (6, 5)  # K - 1 components hold everything
    torch.testing.assert_close(exact.sample(6), theta, atol=1e-4, rtol=1e-4)
    few = coded.PCA(2).fit(theta)
    spread = torch.linalg.svdvals((theta - theta.mean(0)).double())
    lost = (few.decode(few.encode(theta)) - theta).double().square().sum()
    torch.testing.assert_close(lost, spread[2:].square().sum(), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="expected at least one object with fit, encode and decode"):
        coded.Coded(Copies(), object())


def test_one_order_of_the_units_is_a_step_and_changes_no_function():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net.input_shape = (3,)
    sub, x = subset.select(net, "all"), torch.randn(7, 3)
    theta = torch.randn(5, sub.numel)
    step = symmetry.Canonical(net).fit(theta)
    ordered = step.encode(theta)
    for a, b in zip(theta, step.decode(ordered)):
        outputs = [torch.func.functional_call(net, sub.unflatten(v), (x,)) for v in (a, b)]
        torch.testing.assert_close(*outputs)
    assert torch.equal(ordered[0], theta[0]) and (ordered - theta[0]).norm() < (theta - theta[0]).norm()
