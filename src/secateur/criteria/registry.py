"""Criteria by name: which units of a module leave first.

A criterion is one file of this folder: a function from a module's statistics to a score per unit (units; higher =
keep), under the decorator that gives its name and says what it needs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

from secateur.base.discovery import import_modules
from secateur.criteria.choice import parse_choice
from secateur.criteria.statistics import Statistics
from secateur.model.structure import PrunableModule

Score = Callable[[Statistics], Tensor]
Ranking = Callable[[Statistics, str, int], Tensor]
"""Function of statistics, axis and number: the units in the order in which they leave, until that number is left."""
Named = Mapping[str, Tensor]
"""Tensors of a module by their names inside the block."""
GradientScore = Callable[[PrunableModule, Named, Named, Named], Tensor]
"""A module's scores from its weights, their gradients and the mean squares of these."""
Function = TypeVar("Function", bound=Callable[..., Tensor])
SCORED_KINDS: tuple[str, ...] = ("heads", "channels")
"""Kinds of units that are ordered by a module's statistics; experts are in `secateur.criteria.experts`."""
UnitScores = Mapping[tuple[int, str], Tensor]
"""One score for each unit (units), float64, by block and module."""


@dataclass(frozen=True)
class Criterion:
    """Which units of a module leave first: those of the lowest scores, or those that come first in a ranking."""

    score: Score | None = None
    ranking: Ranking | None = None
    """In place of scores, where what a unit is worth depends on those that went before it."""
    from_gradients: GradientScore | None = None
    """In place of both: scores that are taken from a backward pass over the dense model, ahead of pruning."""
    squared_gradients: bool = False
    """The squares of single rows' gradients are needed too."""
    input_moments: bool = False
    """The moments of the module's own input are needed, not only those of the level-2 layer's."""
    removed_first: frozenset[int] = frozenset()
    """Heads that leave before all others."""


_CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, *, kind: str = "score", input_moments: bool = False, squared_gradients: bool = False
) -> Callable[[Function], Function]:
    """Register a function under a name: a `score`, or by its kind a `ranking` or scores `from_gradients`."""

    def register(function: Function) -> Function:
        how: dict[str, Any] = {kind: function, "input_moments": input_moments, "squared_gradients": squared_gradients}
        _CRITERIA[name] = Criterion(**how)
        return function

    return register


@cache
def all_criteria() -> Mapping[str, Criterion]:
    """Every criterion by its name, out of the files of this folder."""
    import_modules("secateur.criteria")
    return _CRITERIA


class Criteria:
    """The criterion of every module of a model, with all that is measured ahead of pruning."""

    def __init__(
        self,
        choice: str,
        gradients: UnitScores | None = None,
        first: Mapping[int, Iterable[int]] | None = None,
    ):
        """Put together what a person has chosen, see `secateur.criteria.choice.parse_choice`.

        Args:
            choice: one criterion, or one each for heads and channels.
            gradients: scores of modules whose criterion needs gradients.
            first: heads of each block that leave before all others.
        """
        self.choice = parse_choice(choice)
        self._gradients, self._first = gradients or {}, first or {}

    @classmethod
    def of(cls, choice: "str | Criteria") -> "Criteria":
        """Criteria by their names, unless they are such already."""
        return choice if isinstance(choice, Criteria) else cls(choice)

    def of_kind(self, kind: str) -> Criterion:
        """The criterion of one kind of unit, without what is measured of single modules."""
        # Where a preselection decides alone, the plan names the units.
        return Criterion() if self.choice.preselection_only else all_criteria()[self.choice.of(kind)]

    def of_module(self, index: int, kind: str) -> Criterion:
        """The criterion of one module of a block."""
        found = self.of_kind(kind)
        if found.from_gradients is not None:
            scores = self._gradients.get((index, kind))
            if scores is None:
                raise ValueError(f"{self.choice.of(kind)} needs gradients: give Criteria those of `gradient_scores`")
            found = Criterion(score=lambda _: scores)
        first = frozenset(self._first.get(index, ())) if kind == "heads" else frozenset[int]()
        return replace(found, removed_first=first)

    @property
    def needs_gradients(self) -> bool:
        """Scores of a module come from a backward pass."""
        return any(self.of_kind(kind).from_gradients is not None for kind in SCORED_KINDS)

    @property
    def needs_squared_gradients(self) -> bool:
        """The backward pass must run the rows one by one."""
        return any(self.of_kind(kind).squared_gradients for kind in SCORED_KINDS)
