"""A network of one's own: any function that returns a module; a recipe names it `network: own_network:mlp`."""

from torch import nn

HIDDEN = 16


def mlp(in_features: int, out_features: int) -> nn.Module:
    """One hidden layer."""
    net = nn.Sequential(nn.Linear(in_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out_features))
    net.input_shape = (in_features,)  # what `symmetry` runs through it
    return net
