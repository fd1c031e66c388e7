"""What a comparison has found so far, as frozen data: rows over seeds, and the paper's figures beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

AVERAGE = "average"
"""Column of the mean accuracy over all tasks."""


@dataclass(frozen=True)
class Column:
    """Something measured."""

    name: str
    kind: Literal["perplexity", "accuracy"]
    """Accuracy is in percent."""


@dataclass(frozen=True)
class Spread:
    """One figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all values; never outside them, as a rounded sum of equal values may be."""
        return min(max(fmean(self.values), self.least), self.most)

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest value."""
        return max(self.values)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"mean": self.mean, "least": self.least, "most": self.most, "values": list(self.values)}


@dataclass(frozen=True)
class Row:
    """One method on one model; the dense model is a row too."""

    model: str
    name: str
    label: str
    """The name without its place in the grid."""
    axes: Mapping[str, Any]
    """Its place in the grid, seeds aside."""
    results: tuple[Mapping[str, Any], ...]
    """Of each seed that is finished; none for what only the paper has measured."""
    published: Mapping[str, float]

    def spread(self, column: str) -> Spread | None:
        """A measured figure, None where there is none yet."""
        values = tuple(found for result in self.results if (found := figure(result, column)) is not None)
        return Spread(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """All rows of a recipe."""

    title: str
    protocol: tuple[str, ...]
    """How all of it was measured, one sentence each."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    planned: int
    """Runs in all, the dense models counted."""
    failed: tuple[str, ...] = ()
    """What went wrong in runs that could not be carried out."""

    @property
    def finished(self) -> int:
        """Runs that are done."""
        return sum(len(row.results) for row in self.rows)


def figure(result: Mapping[str, Any], column: str) -> float | None:
    """One figure of a stored result: a size, a perplexity, an accuracy, or the mean accuracy."""
    if column in ("sparsity", "parameters", "heads", "channels", "seconds"):
        return float(result[column])
    if column == AVERAGE:
        return sum(result["accuracy"].values()) / len(result["accuracy"]) if result["accuracy"] else None
    found = result["perplexity"].get(column, result["accuracy"].get(column))
    return None if found is None else float(found)
