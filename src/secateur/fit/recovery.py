"""Recoveries: how the remaining weights compensate for removed units; and the method of a run.

A recovery is a dataclass; `secateur.base.names` has its name. The fields are the recovery's settings, and the class
attributes are its requirements of the pipeline. The methods are called for every module, in the order prepare,
choice_output, fit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

from secateur.base.names import RECOVERIES, find
from secateur.criteria.registry import Criteria
from secateur.fit.output_projection import OutputFit


@dataclass(frozen=True)
class Recovery(ABC):
    """Settings and steps of a recovery."""

    ridge: float = 0.3
    """Strength of the penalty toward the old weights, relative to the energy of each input."""

    input_steps = 0
    """Steps of conjugate gradients in the fit of the input projections; 0 leaves them unchanged."""
    cauchy_scale = math.inf
    """Inherited squared error, in multiples of its median, at which a token's weight is one half (Cauchy weights of
    robust regression); infinity weights all tokens equally."""
    fits: ClassVar[bool] = False
    """Whether weights are refitted."""
    biases: ClassVar[Literal["kept", "fitted", "added"]] = "fitted"
    """Treatment of an output projection's bias: `kept` as it is, `fitted` if the model has one, or `added` as well."""
    fits_own_output: ClassVar[bool] = False
    """Whether the target is the module's own dense output instead of the error-aware target."""
    sums_kept_inputs: ClassVar[bool] = False
    """Whether a fit with given units reads moments of the kept inputs only."""
    needs_dense_inputs: ClassVar[bool] = False
    """Whether the dense inputs of the modules are stored while a block is pruned."""
    uses_effort: ClassVar[bool] = False
    """Whether `--effort` applies, and some rows are held out for the final-norm scale."""
    summary: ClassVar[str] = ""
    """Sentence about the remaining weights, for the model card."""

    @classmethod
    def of(cls, options: Any) -> "Recovery":
        """Return the recovery with settings from the options of `prune`."""
        return cls(options.ridge)

    def prepare(self, module_fit: Any) -> None:
        """Change a module before the moments of its rows are taken.

        Args:
            module_fit: The fit of the module, a `secateur.fit.module.ModuleFit`.
        """
        return

    def choice_output(self, module_fit: Any) -> OutputFit | None:
        """Return an output projection for all inputs by which units are chosen; None for the old one."""
        return None

    @abstractmethod
    def fit(self, module_fit: Any) -> OutputFit:
        """Fit the remaining weights of a module whose units are chosen, and return its output projection."""


@cache
def all_recoveries() -> Mapping[str, type[Recovery]]:
    """Return every recovery by its name."""
    return {name: find(place) for name, place in RECOVERIES.items()}


def recovery_of(method: str = "refit", **settings: Any) -> Recovery:
    """Return the recovery of a name, with values for some of its fields."""
    return all_recoveries()[method](**settings)


@dataclass(frozen=True)
class Method:
    """Criterion and recovery of a run."""

    criterion: str | Criteria = "surgeon"
    """Criteria, or a value of `--criterion`."""
    recovery: Recovery = field(default_factory=recovery_of)
    seed: int = 0
    """Seed of the criterion `random`."""

    @property
    def criteria(self) -> Criteria:
        """Criteria of all modules."""
        return Criteria.of(self.criterion)
