"""The method of a run: the criterion that chooses units, and the recovery that refits the remaining weights."""

from dataclasses import dataclass, field

from secateur.criteria.registry import Criteria
from secateur.fit.recovery import Recovery, recovery_of


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
