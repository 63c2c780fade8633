"""A network of one's own, for 62_own_checkpoints: any function that takes `num_classes` and `in_chans` and returns a module."""

from torch import nn


def small(num_classes: int, in_chans: int) -> nn.Module:
    """Two convolutions with batch norm, for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, num_classes),
    )
