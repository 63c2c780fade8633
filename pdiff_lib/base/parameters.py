"""Parameters as text: in YAML files, on the command line, and on the way to a kernel. What is read is what was written."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST, DEEPEST = 1_000_000, 20  # characters and levels of YAML
KINDS = {  # of plain scalars
    "none": (r"~|null|Null|NULL|", lambda _: None),
    "truth": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?(0|[1-9](_?[0-9]){0,300})", int),
    "float": (r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", float),
    "infinite": (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
}


def load(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file under `params/`; for what its text means see `parse`.

    Raises:
        ValueError: the file is missing, is not a mapping, or is not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no parameter file {str(path)!r}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: expected at most {LARGEST:,} of parameters")
    try:
        values = parse(str(path), path.read_text("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not YAML: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}: expected 'name: value' lines")
    return values


def parse(name: str, text: str, words: bool = False) -> Any:
    """YAML text as a value. Numbers are what looks like one (`1e-4` too, text to YAML 1.1), truth is `true` or `false`.

    What YAML 1.1 would quietly make something else of is text, as written: yes, on, 012 (octal), 12:30 (sexagesimal), dates.
    Keys are always text. Anchors, tags and keys given twice are refused.

    Args:
        name: what it stands for, for messages.
        text: at most `LARGEST` characters.
        words: no numbers and no truth: every value is text.

    Raises:
        ValueError: not such YAML; the message names where it stood, on one line.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{name} has {len(text):,} characters: expected at most {LARGEST:,}")
    try:
        return yaml.load(text, _Words if words else _Loader)
    except yaml.YAMLError as e:
        raise ValueError(f"{name} is not YAML: {' '.join(str(e).split())}") from e


class _Words(yaml.BaseLoader):
    """YAML without what can run code, grow beyond its size, or mean two things; PyYAML's base makes text, lists, mappings."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent, index):
        """Refuse at the first sign of it, before anything is made of the text."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            what = f"tag {event.tag}" if getattr(event, "tag", None) else f"anchor or alias {event.anchor}"
            raise yaml.composer.ComposerError(None, None, f"{what}: expected plain values", event.start_mark)
        if self.depth == DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"expected at most {DEEPEST} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        """Keys as they are written, each once."""
        made = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in made:
                what = f"{key.value!r} twice" if isinstance(key, yaml.ScalarNode) else "a key that is not text"
                raise yaml.constructor.ConstructorError(None, None, f"found {what}", key.start_mark)
            made[key.value] = self.construct_object(value, deep=True)
        return made


class _Loader(_Words):
    """The same, with numbers, truth and none."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def construct_scalar(self, node):
        """A scalar by the kind that `KINDS` saw in it."""
        return KINDS[node.tag][1](node.value) if node.tag in KINDS else node.value


for _kind, (_pattern, _) in KINDS.items():
    _Loader.add_implicit_resolver(_kind, re.compile(rf"^({_pattern})$"), None)


class _Dumper(yaml.SafeDumper):
    """Text in quotes wherever any reader could take it for something else, on one line; no anchors."""

    def ignore_aliases(self, data):
        """What stands in two places is written twice."""
        return True


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z][\w./ -]*", value, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def dump(values: Mapping[str, Any], lines: bool = True) -> str:
    """Values as YAML that `load`, and papermill's `-y`, read back as they are; `lines` False: all of it on one line."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=not lines, width=sys.maxsize)


def typed(name: str, text: str, default: Any) -> Any:
    """What text on the command line means for a parameter: text where the default is text, a list or mapping in YAML where the
    default is one (of words, if it holds words), and anything else what papermill's `-p` makes of it.

    >>> typed("dataset", "001", "digits"), typed("seeds", "[0, 1]", [0]), typed("T", "10", 1000), typed("own", "yes", None)
    ('001', [0, 1], 10, 'yes')
    """
    if isinstance(default, str):
        return text
    if isinstance(default, (list, dict)):
        words = isinstance(default, list) and bool(default) and all(isinstance(v, str) for v in default)
        return parse(name, text, words)
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def plain(name: str, value: Any) -> Any:
    """A value as papermill can hand it to a kernel unchanged: tuples as lists.

    Raises:
        ValueError: a number that is not finite, a key that is not text, broken text, or anything that YAML does not know.
    """
    if isinstance(value, (list, tuple)):
        return [plain(name, v) for v in value]
    if isinstance(value, Mapping):
        odd = [k for k in value if not isinstance(k, str)]
        if odd:
            raise ValueError(f"{name} is {value!r}: expected text as keys, not {odd[0]!r}")
        return {k: plain(name, v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: expected a finite number")
    if isinstance(value, str) and not value.isascii() and value.encode("utf-8", "ignore").decode() != value:
        raise ValueError(f"{name} is {value!r}: expected text in UTF-8")
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}): expected text, a number, true, false, null, a list "
                         "or a mapping")
    return value
