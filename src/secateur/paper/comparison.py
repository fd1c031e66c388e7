"""Results of a comparison as frozen data: rows with their spread over seeds, and published figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

AVERAGE = "average"
"""Column of the mean accuracy over all tasks."""


@dataclass(frozen=True)
class Column:
    """Quantity that is measured of every model."""

    name: str
    kind: Literal["perplexity", "accuracy"]
    """Kind of the quantity; accuracy is in percent."""


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of all values, kept between the smallest and the largest in spite of rounding."""
        return min(max(fmean(self.values), self.least), self.most)

    @property
    def least(self) -> float:
        """Smallest value."""
        return min(self.values)

    @property
    def most(self) -> float:
        """Largest value."""
        return max(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return the contents for a JSON file."""
        return {"mean": self.mean, "least": self.least, "most": self.most, "values": list(self.values)}


@dataclass(frozen=True)
class Row:
    """Results of one method on one model; the dense model has a row too."""

    model: str
    name: str
    label: str
    """Name of the method, without its place in the grid."""
    axes: Mapping[str, Any]
    """Place in the grid: values by option, without the seed."""
    results: tuple[Mapping[str, Any], ...]
    """Results of the finished seeds; empty for a row that only the paper measured."""
    published: Mapping[str, float]
    """Figures of the paper by column."""

    def spread(self, column: str) -> Spread | None:
        """Return the measured values of a column over seeds, or None if there are none yet."""
        values = tuple(value for result in self.results if (value := figure(result, column)) is not None)
        return Spread(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """All rows of a recipe."""

    title: str
    protocol: tuple[str, ...]
    """Sentences about how everything was measured."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    planned: int
    """Number of all runs, dense models included."""
    failed: tuple[str, ...] = ()
    """Error messages of runs that failed."""

    @property
    def finished(self) -> int:
        """Number of finished runs."""
        return sum(len(row.results) for row in self.rows)


def figure(result: Mapping[str, Any], column: str) -> float | None:
    """Return one figure of a stored result: a size, perplexity, accuracy or mean accuracy; None if missing."""
    if column in ("sparsity", "parameters", "heads", "channels", "seconds"):
        return float(result[column])
    if column == AVERAGE:
        return sum(result["accuracy"].values()) / len(result["accuracy"]) if result["accuracy"] else None
    found = result["perplexity"].get(column, result["accuracy"].get(column))
    return None if found is None else float(found)
