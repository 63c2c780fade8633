"""Regression on a table: rows of numbers, one of them to be predicted from the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from pdiff_lib.base import own, recipe, training
from pdiff_lib.base.score import Score
from pdiff_lib.tasks.task import Judged, Task

DIABETES_TEST = 142  # of its 442 rows


class Regression(Task):
    """A table, each column in units of its mean and standard deviation over the training rows.

    An original counts as wrong on a test row where it is off by more than the median error of all originals, so that about half of
    a network's predictions are wrong and Eq. 7 compares which.

    Args:
        data: `dataset` is "diabetes" (scikit-learn; the same 142 rows are held out everywhere) or TRAIN.parquet,TEST.parquet, whose
            last column is to be predicted.

    Raises:
        ValueError: another data set, columns that are not numbers, or settings of images.
    """

    score = Score("R²")
    relative = True

    def __init__(self, data: recipe.Data):
        if data.train_images or data.test_images or data.image_channels:
            raise ValueError("train_images, test_images and image_channels are for images: expected 0 with task 'regression'")
        self.name = recipe.short(data.dataset)
        train, test = (torch.tensor(part) for part in _tables(data.dataset))
        mean, std = train.mean(dim=0), train.std(dim=0)
        if not bool((std > 0).all()):
            raise ValueError(f"{self.name}: columns {(~(std > 0)).nonzero()[:, 0].tolist()} are constant, or hold NaN, in the training "
                             "rows: expected numbers that vary")
        (self.x_train, self.y_train), (self.x_test, self.y_test) = (
            ((rows[:, :-1] - mean[:-1]).div(std[:-1]).float(), (rows[:, -1] - mean[-1]).div(std[-1]).float()) for rows in (train, test))

    def network(self, base: recipe.Base) -> nn.Module:
        """A multilayer perceptron: "mlp-32-32" has two hidden layers of 32. Or `package.module:function`, which is called with
        in_features and out_features."""
        if base.pretrained or base.weights:
            raise ValueError(f"pretrained = {base.pretrained} and weights = {base.weights!r}: expected False and '' with task 'regression'")
        sizes = {"in_features": self.x_train.shape[1], "out_features": 1}
        with training.seeded(base.seed):
            if own.is_name(base.network):
                return own.build(base.network, **sizes)
            kind, *hidden = base.network.split("-")
            if kind != "mlp" or not hidden or not all(h.isdigit() and int(h) for h in hidden):
                raise ValueError(f"network {base.network!r}: expected 'mlp-32-32', say, or package.module:function with task 'regression'")
            net = torchvision.ops.MLP(sizes["in_features"], [*map(int, hidden), 1])
            net.input_shape = (sizes["in_features"],)
            return net

    def criterion(self, outputs: Float[Tensor, "B 1"], wanted: Float[Tensor, "B"]) -> Float[Tensor, ""]:
        """Mean squared error."""
        return F.mse_loss(outputs[:, 0], wanted)

    def judged(self, outputs: Float[Tensor, "M N 1"], originals: Float[Tensor, "K N 1"] | None = None,
               items: Tensor | None = None) -> Judged:
        """R² (1: exact, 0: as good as the mean), and which rows are further off than the originals are in the median."""
        y = self.y_test.double()
        error = (outputs[..., 0].double() - y).abs()
        typical = (error if originals is None else (originals[..., 0].double() - y).abs()).median()
        items = slice(None) if items is None else items
        error, y = error[:, items], y[items]
        score = 1 - error.square().sum(dim=1) / (y - y.mean()).square().sum()
        return Judged(score.where(torch.isfinite(score), torch.nan), ~(error <= typical))


def _tables(dataset: str) -> list[np.ndarray]:
    """Training and test rows, [rows columns], float64."""
    if dataset == "diabetes":
        from sklearn.datasets import load_diabetes  # here, as importing it takes more than a second

        bunch = load_diabetes(scaled=False)
        rows = np.column_stack([bunch.data, bunch.target])
        # RandomState, whose numbers NumPy promises never to change, so that this split stays the same everywhere.
        rows = rows[np.random.RandomState(0).permutation(len(rows))]
        return [rows[DIABETES_TEST:], rows[:DIABETES_TEST]]
    files = [part.strip() for part in dataset.split(".parquet,")]
    if len(files) != 2 or not dataset.endswith(".parquet"):
        raise ValueError(f"dataset {dataset!r}: expected 'diabetes' or TRAIN.parquet,TEST.parquet with task 'regression'")
    tables = [pd.read_parquet(Path(files[0] + ".parquet")), pd.read_parquet(Path(files[1]))]
    for file, table in zip(files, tables):
        if list(table) != list(tables[0]) or table.shape[1] < 2 or not all(pd.api.types.is_numeric_dtype(t) for t in table.dtypes):
            raise ValueError(f"{file} has columns {', '.join(map(str, table))}: expected at least two, all numbers, the same in both files")
    return [table.to_numpy(np.float64) for table in tables]
