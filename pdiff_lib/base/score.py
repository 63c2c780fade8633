"""By what networks are judged, as far as tables and figures need to know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Score:
    """A number per network.

    Attributes:
        name: in words ("accuracy", "R²").
        unit: behind a number that is shown ("%").
        better: "higher" or "lower".
        scale: from the number that is kept to the one that is shown (100 for fractions in percent).
        column: its name in a frame of networks.
        similarity: what similarity (a frame's `max_similarity`) is made of.

    Raises:
        ValueError: `better` is neither.
    """

    name: str
    unit: str = ""
    better: str = "higher"
    scale: float = 1.0
    column: str = "score"
    similarity: str = "IoU"

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better is {self.better!r}: expected 'higher' or 'lower'")

    @property
    def label(self) -> str:
        """The name with its unit, for axes and heads of columns."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def shown(self, value: float, digits: int = 2) -> str:
        """One number with its unit.

        >>> ACCURACY.shown(0.51234), Score("R²").shown(0.4)
        ('51.23 %', '0.40')
        """
        return f"{self.scale * value:.{digits}f} {self.unit}".rstrip()

    @property
    def aggregates(self) -> dict[str, tuple[str, Any]]:
        """Number, mean, deviation (ddof 0) and best of groups of a frame's rows, for `DataFrameGroupBy.agg`."""
        return {"n": (self.column, "size"), "mean": (self.column, "mean"), "std": (self.column, lambda s: s.std(ddof=0)),
                "best": (self.column, "max" if self.better == "higher" else "min")}

    def of_frame(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame, as `of` finds this score in it again, also when it was written to Parquet in between."""
        frame.attrs["score"] = asdict(self)
        return frame


ACCURACY = Score("accuracy", "%", scale=100.0, column="accuracy")


def of(frame: pd.DataFrame) -> Score:
    """The score that a frame of networks holds: that which it names, accuracy where it has a column of that name.

    Raises:
        ValueError: there is none.
    """
    if "score" in frame.attrs:
        return Score(**frame.attrs["score"])
    if ACCURACY.column in frame:
        return ACCURACY
    if "score" in frame:
        return Score("score")
    raise ValueError(f"the frame has columns {', '.join(map(str, frame))}: expected 'accuracy' or 'score' among them")
