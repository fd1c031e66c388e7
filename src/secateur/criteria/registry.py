"""Criteria by name, and the decorator that makes one.

A criterion is one function in a file of this folder. It maps a module's statistics to a score for each unit (u), higher
for units to keep. The decorator takes the measurements that the function needs; `secateur.base.names` has the names.

Shapes: u units of a module.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from secateur.base.names import CRITERIA, find
from secateur.criteria.choice import parse_choice
from secateur.criteria.statistics import Statistics
from secateur.model.structure import PrunableModule

Score = Callable[[Statistics], Tensor]
"""Function from statistics to scores (u)."""
Ranking = Callable[[Statistics, str, int], Tensor]
"""Function from statistics, an axis and the number of units that are left along it, to units in order of removal."""
Named = Mapping[str, Tensor]
"""Tensors of a module, by their names inside the block."""
GradientScore = Callable[[PrunableModule, Named, Named, Named], Tensor]
"""Function from a module, its weights, their gradients and the mean squared gradients of single rows, to scores (u)."""
SCORED_KINDS: tuple[str, ...] = ("heads", "channels")
"""Kinds of units that the criteria of this folder's files order; `secateur.criteria.experts` orders experts."""
UnitScores = Mapping[tuple[int, str], Tensor]
"""Scores (u, float64) by block and kind of unit."""


@dataclass(frozen=True)
class Criterion:
    """Criterion of one module: scores, a ranking, or scores from gradients."""

    score: Score | None = None
    """Scores; the units with the lowest ones are removed first."""
    ranking: Ranking | None = None
    """Ranking, for criteria under which a unit's value depends on the units removed before it."""
    from_gradients: GradientScore | None = None
    """Scores from a backward pass over the dense model, which runs before pruning."""
    squared_gradients: bool = False
    """Whether the scores also need the mean squared gradients of single rows."""
    input_moments: bool = False
    """Whether the moments of the module's own input are needed."""
    removed_first: frozenset[int] = frozenset()
    """Heads that are removed before all others."""


def criterion(
    *, field: str = "score", input_moments: bool = False, squared_gradients: bool = False
) -> Callable[[Callable[..., Tensor]], Criterion]:
    """Return the decorator that makes a criterion of a function.

    Args:
        field: Field of `Criterion` that the function becomes: `score`, `ranking` or `from_gradients`.
        input_moments, squared_gradients: What the function needs, see `Criterion`.
    """

    def made(function: Callable[..., Tensor]) -> Criterion:
        fields: dict[str, Any] = {field: function}
        return Criterion(**fields, input_moments=input_moments, squared_gradients=squared_gradients)

    return made


@cache
def all_criteria() -> Mapping[str, Criterion]:
    """Return every criterion by its name."""
    return {name: find(place) for name, place in CRITERIA.items()}


class Criteria:
    """Criteria of all modules of a model, with everything that is measured before pruning.

    Attributes:
        choice: Names of the criteria, one for each kind of unit.
    """

    def __init__(
        self,
        choice: str,
        gradients: UnitScores | None = None,
        first: Mapping[int, Iterable[int]] | None = None,
    ):
        """Combine the user's choice with measurements.

        Args:
            choice: Value of `--criterion`, see `secateur.criteria.choice`.
            gradients: Scores of the modules whose criterion needs gradients.
            first: Heads of each block that are removed before all others.
        """
        self.choice = parse_choice(choice)
        self._gradients, self._first = gradients or {}, first or {}

    @classmethod
    def of(cls, choice: "str | Criteria") -> "Criteria":
        """Return the criteria that a value of `--criterion` names; `Criteria` are returned unchanged."""
        return choice if isinstance(choice, Criteria) else cls(choice)

    def of_kind(self, kind: str) -> Criterion:
        """Return the criterion of one kind of unit, without measurements of single modules."""
        # If only similar heads are removed, the plan names the units.
        return Criterion() if self.choice.only_compares_heads else all_criteria()[self.choice.of(kind)]

    def of_module(self, index: int, kind: str) -> Criterion:
        """Return the criterion of the module of block `index` that has units of a kind.

        Raises:
            ValueError: The criterion needs gradients, and none are given for this module.
        """
        found = self.of_kind(kind)
        if found.from_gradients is not None:
            scores = self._gradients.get((index, kind))
            if scores is None:
                raise ValueError(f"{self.choice.of(kind)} needs gradients: give Criteria the result of gradient_scores")
            found = Criterion(score=lambda _: scores)
        first = frozenset(self._first.get(index, ())) if kind == "heads" else frozenset[int]()
        return replace(found, removed_first=first)

    @property
    def needs_gradients(self) -> bool:
        """Whether the scores of any module come from a backward pass."""
        return any(self.of_kind(kind).from_gradients is not None for kind in SCORED_KINDS)
