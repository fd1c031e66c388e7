"""Interface of plug-ins that measure the dense model and select heads to remove before all others."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from secateur.base.progress import Watcher
from secateur.model.stream import BlockStream
from secateur.plan.problem import FirstHeads, Plan, PlanProblem


@dataclass(frozen=True)
class Preselected:
    """Result of a preselection."""

    first_heads: FirstHeads
    """Heads to remove before all others."""
    plan: Plan | None = None
    """Plan that removes these heads and nothing else; None if other units are removed as well."""


class Preselection(Protocol):
    """Measurement of the dense model that selects heads to remove before all others."""

    def check(self, problem: PlanProblem) -> None:
        """Raise `SecateurError` if no head can be removed; called before anything is measured."""

    def find(self, stream: BlockStream, rows: Tensor, problem: PlanProblem, watcher: Watcher) -> Preselected:
        """Measure the dense model on calibration rows (rows x length) and select the heads.

        Raises:
            SecateurError: No head is selected, or the selection leaves a block without heads.
        """
