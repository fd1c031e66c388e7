"""Heads that leave before all others: the measurement that finds them, as plug-ins provide it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from secateur.base.progress import Watcher
from secateur.model.stream import BlockStream
from secateur.plan.problem import FirstHeads, Plan, PlanProblem


@dataclass(frozen=True)
class Preselected:
    """What a measurement has found."""

    first_heads: FirstHeads
    plan: Plan | None = None
    """The plan in which these heads go, and nothing else."""


class Preselection(Protocol):
    """A measurement of the dense model ahead of pruning, by which some heads leave before all others."""

    def check(self, problem: PlanProblem) -> None:
        """Check that some head can go, before anything is measured."""

    def find(self, stream: BlockStream, rows: Tensor, problem: PlanProblem, watcher: Watcher) -> Preselected:
        """Measure the dense model on calibration rows (rows x length).

        Raises:
            SecateurError: it leaves nothing to remove, or no heads.
        """
