"""A task of one's own: rebuild handwritten digits through a bottleneck. No labels, and the lower the score the better."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from pdiff_lib.base import own, training
from pdiff_lib.base.score import Score
from pdiff_lib.tasks.task import Judged, Task

TEST = 400  # of its 1797 pictures


class Rebuild(Task):
    """Pictures of 8 x 8 pixels in, the same out."""

    score = Score("squared error", better="lower")
    relative = True  # "wrong" is a picture rebuilt worse than the originals rebuild one in the median

    def __init__(self, data):
        pixels = torch.tensor(load_digits().data / 16, dtype=torch.float32)
        self.name = "digits, rebuilt"
        self.x_train = self.y_train = pixels[TEST:]
        self.x_test = self.y_test = pixels[:TEST]

    def network(self, base):
        with training.seeded(base.seed):
            return own.load(base.network)(in_features=64, out_features=64)

    def criterion(self, outputs, wanted):
        return F.mse_loss(outputs, wanted)

    def judged(self, outputs, originals=None, items=None):
        error = self._errors(outputs)  # [networks pictures]
        wrong = ~(error <= (error if originals is None else self._errors(originals)).median())
        items = slice(None) if items is None else items
        return Judged(error[:, items].mean(dim=1), wrong[:, items])

    def _errors(self, outputs):
        return (outputs - self.y_test).square().mean(dim=2).double()
