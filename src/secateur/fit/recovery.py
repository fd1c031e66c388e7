"""Recoveries: how the remaining weights compensate for removed units.

A recovery is one file of `secateur.fit.recoveries`, or of a plug-in: a dataclass under the decorator that gives its
name. Its fields are its settings, its class attributes say what it asks of the pipeline, and its methods are called in
this order while a module is fitted (`secateur.fit.module`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar

from secateur.base.plugins import recovery_modules
from secateur.fit.output_projection import OutputFit
from secateur.fit.recoveries import NAMES


@dataclass(frozen=True)
class Recovery(ABC):
    """How a module is repaired."""

    ridge: float = 0.3

    input_steps = 0
    """Steps of conjugate gradients by which input projections are fitted along."""
    cauchy_scale = math.inf
    """Factor on the median of the squared error that tokens inherit, at which a token counts half."""
    fits: ClassVar[bool] = False
    """Whether weights get new values."""
    biases: ClassVar[Literal["kept", "fitted", "added"]] = "fitted"
    """What becomes of the bias of an output projection; `added` also where the architecture has none."""
    fits_own_output: ClassVar[bool] = False
    """Whether the target is the module's own dense output, and not the dense stream behind it."""
    sums_kept_inputs: ClassVar[bool] = False
    """Whether a fit to given units does not look at inputs that go."""
    needs_dense_inputs: ClassVar[bool] = False
    """Whether the dense inputs of modules are kept while a block is pruned."""
    uses_effort: ClassVar[bool] = False
    """Whether an effort says how much is fitted, and some rows are left out for the scale of the final norm."""
    summary: ClassVar[str] = ""
    """One sentence about the remaining weights, for the model card."""

    @classmethod
    def of(cls, options: Any) -> "Recovery":
        """Return the recovery with the settings that options of `prune` give."""
        return cls(options.ridge)

    def prepare(self, fit: Any) -> None:
        """Change a module before its rows are summed; `fit` is a `secateur.fit.module.ModuleFit`."""
        return

    def choice_output(self, fit: Any) -> OutputFit | None:
        """Return an output projection for all inputs by which units are chosen, where it is not the old one."""
        return None

    @abstractmethod
    def fit(self, fit: Any) -> OutputFit:
        """Fit what is left of a module, whose units are chosen."""


Class = TypeVar("Class", bound=type[Recovery])
_RECOVERIES: dict[str, type[Recovery]] = {}


def recovery(name: str) -> Callable[[Class], Class]:
    """Register a class under a name."""

    def register(owner: Class) -> Class:
        _RECOVERIES[name] = owner
        return owner

    return register


@cache
def all_recoveries() -> Mapping[str, type[Recovery]]:
    """Return every recovery by its name."""
    for module in (*(f"secateur.fit.recoveries.{name}" for name in NAMES), *recovery_modules().values()):
        import_module(module)
    return _RECOVERIES


def recovery_of(method: str = "refit", **settings: Any) -> Recovery:
    """Return a recovery by its name, with settings by the names of its fields."""
    return all_recoveries()[method](**settings)
