"""What names a run and what it says of itself, as text: digests, JSON that any reader takes, commits."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from pdiff_lib.base.storage import PROJECT


def digest(value: Any) -> str:
    """Hex digest of anything that JSON can hold (floats exactly, keys sorted).

    Raises:
        ValueError: a number in it that is not finite.
    """
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError as e:
        places = ", ".join(place for place, _ in _infinite("", value)) or repr(value)
        raise ValueError(f"{places}: expected finite numbers ({e})") from e
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def dumps(content: Mapping[str, Any]) -> str:
    """A record as JSON. The standard has no NaN: numbers that are not finite are null, and `not_finite` says which they are.

    >>> print(dumps({"a/b": [1.0, float("inf")]}).replace("\\n", ""))
    { "a/b": [  1.0,  null ], "not_finite": {  "/a~1b/1": "inf" }}
    """
    plain = json.loads(json.dumps(content, default=float))  # tensors and NumPy's numbers as floats, keys as text
    odd = dict(_infinite("", plain))
    for place in odd:
        _put(plain, place, None)
    return json.dumps({**plain, "not_finite": odd} if odd else plain, indent=1, allow_nan=False)


def loads(text: str) -> dict[str, Any]:
    """A record from what `dumps` wrote (or from the time before it, with bare NaN), its numbers in their places.

    >>> loads(dumps({"a/b": [1.0, float("inf")]}))
    {'a/b': [1.0, inf]}
    """
    content = json.loads(text)
    for place, number in content.pop("not_finite", {}).items():
        _put(content, place, float(number))
    return content


def _infinite(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """Places (as JSON pointers) of the numbers that are not finite, and these as text."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, str(value)
    elif isinstance(value, (Mapping, list, tuple)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _infinite(f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}", part)


def _put(content: Any, place: str, value: float | None) -> None:
    *above, last = (part.replace("~1", "/").replace("~0", "~") for part in place.split("/")[1:])
    for key in above:
        content = content[int(key) if isinstance(content, list) else key]
    content[int(last) if isinstance(content, list) else last] = value


def without_folders(text: str, settings: Mapping[str, Any]) -> str:
    """A text about a run without the folders that its files lay in, which mean nothing on another machine: their names stay (what they held is in the
    record's `inputs`). Also as plotly writes a slash in HTML.

    >>> without_folders('"/home/me/birds", \\u002fhome\\u002fme\\u002fbirds', {"dataset": "/home/me/birds", "seed": 0})
    '"birds", birds'
    """
    given = [part.strip() for value in re.findall(r'"([^"]*/[^"]*)"', json.dumps(settings, default=float)) for part in value.split(",")]
    folders = {f"{path.parent}/" for path in map(PurePath, given) if path.is_absolute() and path.parent != path.parent.parent}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, "").replace(folder.replace("/", "\\u002f"), "")
    return text


def present_commit() -> str:
    """The commit of this checkout, with "-dirty" where files differ from it, as of five seconds ago at most; "unknown" where git cannot say."""
    return _described(int(time.monotonic() / 5))


@lru_cache(maxsize=1)  # many a stage takes less time than git
def _described(moment: int) -> str:
    return _git("describe", "--always", "--dirty", "--abbrev=10") or "unknown"


def check_commit(commit: str) -> None:
    """Refuse a commit that nobody could go back to.

    Raises:
        ValueError: it has changes on top, is unknown, or is not in the history of this checkout.
    """
    if commit.endswith("-dirty"):
        raise ValueError(f"commit {commit!r}: the run was made with changes that no commit holds; expected a clean working "
                         "tree: commit, then run again")
    found = re.fullmatch(r"\w[\w./-]*", commit) and _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if not found or _git("merge-base", found, "HEAD") != found:
        shallow = " (this clone is shallow: git fetch --unshallow)" * (_git("rev-parse", "--is-shallow-repository") == "true")
        raise ValueError(f"commit {commit!r} is not in the history of {PROJECT}{shallow}: expected one that others can have")


def _git(*arguments: str) -> str:
    """What git says of the project, "" where it cannot say."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=PROJECT, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
