"""Weights of a user's own: read from a file, refused where they cannot be right, loaded into a network."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pdiff_lib.base.own import PICKLED
from pdiff_lib.base.vectors import FLOATS

COUNT = "num_batches_tracked"
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch's marks, at any depth of a name
SHOWN = 3  # names in a message
HOLDERS = ("state_dict", "model", "net", "model_state_dict")  # under which trainers keep a state dict among other things


def load(net: nn.Module, path: Path, name: str, classes: int, new_head: bool = False) -> None:
    """Load a file's weights into a network, in place; arguments and errors as `fitting`. Its attribute `new_head` says whether it kept its own."""
    own = net.state_dict()
    found = fitting(path, own, name, classes, new_head=new_head)
    net.load_state_dict(found, strict=True)
    net.new_head = any(found.get(k) is tensor for k, tensor in own.items())


def fitting(path: Path, expected: Mapping[str, Tensor], name: str, classes: int | None = None,
            needed: Collection[str] | None = None, new_head: bool = False) -> dict[str, Tensor]:
    """A file's tensors under the network's own names. What all names begin with beyond those ("module." of data parallelism,
    "model." of a trainer), and `torch.compile`'s marks, are taken off.

    Args:
        path: a file that `read` takes. Floats of 16 and 64 bits become those of the network.
        expected: the network's state dict, for names, shapes and types.
        name, classes: of the network, for messages; None: unknown.
        needed: the names that must be there; None: all, except counts of batches, which torch adds by itself.
        new_head: where all fits but the layer of the classes, of which there is another number, the network's own is taken, and said so.

    Raises:
        ValueError: what `read` refuses, weights of another network, integers (or floats of 8 bits) where floats belong; the
            first tensors are named.
    """
    needed = [k for k in expected if k in needed] if needed is not None else [k for k in expected if not k.endswith(COUNT)]
    state = _unwrapped(read(path), expected, needed)
    if new_head and (head := _head(state, expected, needed, classes)):
        print(f"weights {path.name!r} are for {len(state[head[0]])} classes: {some(head)} start anew, for {classes}")
        state = {**state, **{k: expected[k] for k in head}}
    for key in expected:
        if expected[key].is_floating_point() and key in state and state[key].dtype not in FLOATS:
            raise ValueError(f"weights {str(path)!r}: {key} holds numbers of type {state[key].dtype}: expected floats of 16, "
                             "32 or 64 bits; quantised weights must be turned back into floats, with their scales")
    if cause := _misfit(state, expected, needed, classes):
        of = f" with {classes} classes" if classes else ""
        raise ValueError(f"weights {str(path)!r} do not fit {name}{of}: {cause}")
    return state


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; floats as float32.

    Args:
        path: safetensors, or by its ending (`PICKLED`) what `torch.save` wrote of a state dict, alone or under one of `HOLDERS`.
            The latter is read with `weights_only=True`, which runs no code.

    Raises:
        ValueError: no such file, of another format, one that needs more than tensors (named), NaN or infinity, or a negative
            running variance.
    """
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: there is no such file")
    held = _held(path, _unpickled(path)) if path.suffix.lower() in PICKLED else _safetensors(path)
    if odd := [k for k, t in held.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]:
        raise ValueError(f"weights {str(path)!r}: {some(odd)}: expected dense tensors, neither sparse nor quantised, with numbers")
    state = {k: t.detach().float() if t.dtype in FLOATS else t for k, t in held.items()}
    floats = {k: t for k, t in state.items() if t.dtype == torch.float32}
    _refuse(path, {k: ~torch.isfinite(t) for k, t in floats.items()}, "NaN or infinity", "finite ones, also as float32")
    _refuse(path, {k: t < 0 for k, t in floats.items() if k.endswith("running_var")}, "a negative variance", "none below 0")
    return state


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {str(path)!r} is not a safetensors file ({error}): expected one, or what torch.save wrote of "
                         f"a state dict, with the ending {', '.join(PICKLED)}") from error


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"weights {str(path)!r} cannot be read without running code{_needs(path, error)}: expected tensors "
                         "alone; where you trust the file, save its state_dict() again, as safetensors best") from error
    except Exception as error:  # each way of not being such a file has an error of its own
        raise ValueError(f"weights {str(path)!r} is not a file of torch.save ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]})") from error


def _needs(path: Path, error: Exception) -> str:
    """What a pickle asks for beyond tensors, in words."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of torch's older format, which it cannot list: the first is in the message
        names = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    return f" (it needs {some(names)})" if names else ""


def _held(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what `torch.save` was given."""
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return {str(k): v for k, v in content.items()}
    holders = [k for k in HOLDERS if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)]
    if len(holders) == 1:
        return _held(path, content[holders[0]])
    parts = ([f"{k}: {type(v).__name__}" for k, v in content.items() if not isinstance(v, Tensor)]
             if isinstance(content, Mapping) else [type(content).__name__])
    raise ValueError(f"weights {str(path)!r} holds {'state dicts under ' + ' and '.join(holders) if holders else some(parts)}: "
                     f"expected a state dict (names and tensors), alone or under one of {', '.join(HOLDERS)}")


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


def _unwrapped(state: dict[str, Tensor], expected: Mapping[str, Tensor], needed: Collection[str]) -> dict[str, Tensor]:
    """The state with the network's own names, when nothing but wrappers stands before or within them; else as it is."""
    def fits(names: list[str]) -> bool:
        there = set(names)
        return there <= expected.keys() and there.issuperset(needed)

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


def _head(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], needed: Collection[str], classes: int | None) -> list[str]:
    """The tensors that have a row per class, where these are all that do not fit; none otherwise."""
    other = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    fits = all(k in state for k in needed) and all(k in expected for k in state)
    same = {expected[k].shape[:1] for k in other} == {(classes,)} and len({state[k].shape[:1] for k in other}) == 1
    return other if fits and same and all(state[k].shape[1:] == expected[k].shape[1:] for k in other) else []


def _misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], needed: Collection[str], classes: int | None) -> str:
    """Why weights are another network's, the likely cause first; "" when they are not."""
    missing = [k for k in needed if k not in state]
    extra = [k for k in state if k not in expected]
    other = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if not (missing or extra or other):
        return ""
    prefix = next((k.partition(".")[0] + "." for k in extra if k.partition(".")[2] in expected), "")
    others = [k for k in state if not k.startswith(prefix)]
    if prefix and len(others) < len(state) / 2:
        return (f"{len(state) - len(others)} of its {len(state)} names begin with {prefix!r}; expected all, but not "
                f"{some(others)}")
    if len(missing) + len(other) > len(needed) / 2:
        cause = "they are another network's"
    elif _head(state, expected, needed, classes):
        cause = f"they are for {state[other[0]].shape[0]} classes"
    else:
        cause = "not all of its tensors are the network's"
    shapes = [f"{k} {list(state[k].shape)} (expected {list(expected[k].shape)})" for k in other]
    lines = [f"{title}: {some(names)}" for title, names in
             (("missing", missing), ("unexpected", extra), ("another shape", shapes)) if names]
    return "\n".join([cause, *lines])


def judge(right: int, images: int, chance: float, source: str, scale: str) -> None:
    """Print the accuracy that weights have as they come, and warn when it is no more than guessing.

    Near chance is what three standard errors of chance, or 5 % of the way from there to 1, would explain: of weights that fit
    this data set even a bad network is better, while those of another input scale or order of classes end there.

    Args:
        right: images that were classified correctly.
        images: of so many.
        chance: the accuracy of guessing, a fraction (the share of the most frequent class).
        source, scale: of the weights and of the images, in words.
    """
    accuracy = right / images
    print(f"{source}: {accuracy:.1%} of {images} test images are right before any training (guessing: {chance:.1%})")
    if accuracy <= chance + max(3 * (chance * (1 - chance) / images) ** 0.5, 0.05 * (1 - chance)):
        warnings.warn(f"{source}: an accuracy of {accuracy:.1%} on {images} test images is near chance ({chance:.1%}). Likely "
                      f"causes: the network was trained on another input scale (here {scale}; input_mean and input_std set it), "
                      "with its classes in another order, or with another head")
