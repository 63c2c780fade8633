"""Weights of a user's own: read from a file, refused where they cannot be right, loaded into a network."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pdiff_lib.base.vectors import FLOATS

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch's marks, at any depth of a name
SHOWN = 3  # names in a message


def load(net: nn.Module, path: Path, name: str, classes: int) -> None:
    """Load a file's weights into a network, in place. What all names begin with beyond those of the network ("module." of
    data parallelism, "model." of a trainer), and `torch.compile`'s marks, are taken off.

    Args:
        net: the network; its state dict says which names, shapes and types are expected.
        path: a safetensors file. Floats of 16 and 64 bits become those of the network.
        name, classes: of the network, for messages.

    Raises:
        ValueError: no such file, not safetensors, weights of another network, integers (or floats of 8 bits) where floats
            belong, NaN or infinity, or a negative running variance; the first tensors are named.
    """
    expected = net.state_dict()
    state = _unwrapped(read(path), expected)
    for key in expected:
        if expected[key].is_floating_point() and key in state and state[key].dtype not in FLOATS:
            raise ValueError(f"weights {str(path)!r}: {key} holds numbers of type {state[key].dtype}: expected floats of 16, "
                             "32 or 64 bits; quantised weights must be turned back into floats, with their scales")
    if cause := _misfit(state, expected, classes):
        raise ValueError(f"weights {str(path)!r} do not fit {name} with {classes} classes: {cause}")
    net.load_state_dict(state, strict=True)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; floats as float32.

    Raises:
        ValueError: no such file, not safetensors (pickles are refused, never executed), NaN or infinity, or a negative
            running variance.
    """
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: there is no such file")
    try:
        state = {k: t.float() if t.dtype in FLOATS else t for k, t in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"weights {str(path)!r} is not a safetensors file ({error}). Pickled files (.pt, .pth, .bin) "
                         "are never loaded, as they can run code: convert with safetensors.torch.save_file") from error
    floats = {k: t for k, t in state.items() if t.dtype == torch.float32}
    _refuse(path, {k: ~torch.isfinite(t) for k, t in floats.items()}, "NaN or infinity", "finite ones, also as float32")
    _refuse(path, {k: t < 0 for k, t in floats.items() if k.endswith("running_var")}, "a negative variance", "none below 0")
    return state


def _refuse(path: Path, bad: Mapping[str, Bool[Tensor, "..."]], found: str, expected: str) -> None:
    names = [k for k, wrong in bad.items() if wrong.any()]
    if names:
        first = bad[names[0]]
        more = f" (and so do {some(names[1:])})" if names[1:] else ""
        raise ValueError(f"weights {str(path)!r}: {names[0]} holds {found} in {int(first.sum())} of {first.numel()} numbers"
                         f"{more}: expected {expected}")


def some(names: Collection[str]) -> str:
    """A few names and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - SHOWN
    return ", ".join(list(names)[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unwrapped(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the network's own names, when nothing but wrappers stands before or within them; else as it is."""
    def fits(names: list[str]) -> bool:
        there = set(names)
        return there <= expected.keys() and all(k in there or k.endswith("num_batches_tracked") for k in expected)

    def bare(name: str) -> str:
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        return name

    names = list(state)
    if fits(names):
        return state
    names = [bare(k) for k in names]
    while not fits(names) and len({k.partition(".")[0] for k in names}) == 1 and all("." in k for k in names):
        names = [k.partition(".")[2] for k in names]
    return dict(zip(names, state.values())) if fits(names) and len(set(names)) == len(names) else state


def _misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], classes: int) -> str:
    """Why weights are another network's, the likely cause first; "" when they are not."""
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]  # torch adds that by itself
    extra = [k for k in state if k not in expected]
    other = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if not (missing or extra or other):
        return ""
    prefix = next((k.partition(".")[0] + "." for k in extra if k.partition(".")[2] in expected), "")
    others = [k for k in state if not k.startswith(prefix)]
    if prefix and len(others) < len(state) / 2:
        return (f"{len(state) - len(others)} of its {len(state)} names begin with {prefix!r}; expected all, but not "
                f"{some(others)}")
    if len(missing) + len(other) > len(expected) / 2:
        cause = "they are another network's"
    elif not missing and not extra and {expected[k].shape[:1] for k in other} == {(classes,)} and len(
            {state[k].shape[:1] for k in other}) == 1:
        cause = f"they are for {state[other[0]].shape[0]} classes"
    else:
        cause = "not all of its tensors are the network's"
    shapes = [f"{k} {list(state[k].shape)} (expected {list(expected[k].shape)})" for k in other]
    lines = [f"{title}: {some(names)}" for title, names in
             (("missing", missing), ("unexpected", extra), ("another shape", shapes)) if names]
    return "\n".join([cause, *lines])


def judge(right: int, images: int, chance: float, source: str) -> None:
    """Print the accuracy that weights have as they come, and warn when it is no more than guessing.

    Near chance is what three standard errors of chance, or 5 % of the way from there to 1, would explain: of weights that fit
    this data set even a bad network is better, while those of another input scale or order of classes end there.

    Args:
        right: images that were classified correctly.
        images: of so many.
        chance: the accuracy of guessing, a fraction (the share of the most frequent class).
        source: of the weights, in words.
    """
    accuracy = right / images
    print(f"{source}: {accuracy:.1%} of {images} test images are right before any training (guessing: {chance:.1%})")
    if accuracy <= chance + max(3 * (chance * (1 - chance) / images) ** 0.5, 0.05 * (1 - chance)):
        warnings.warn(f"{source}: an accuracy of {accuracy:.1%} on {images} test images is near chance ({chance:.1%}). Likely "
                      "causes: the network was trained on another input scale (here each channel has mean 0 and standard "
                      "deviation 1 over the training images), with its classes in another order, or with another head")
