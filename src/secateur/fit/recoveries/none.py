"""No recovery: the remaining weights stay as they are."""

from dataclasses import dataclass

from secateur.fit.module import ModuleFit
from secateur.fit.output import Fit
from secateur.fit.recovery import Recovery, recovery


@recovery("none")
@dataclass(frozen=True)
class Unchanged(Recovery):
    """Weights are only cut."""

    biases = "kept"
    said = "What is left is as it was."

    def fit(self, fit: ModuleFit) -> Fit:
        """Return the old weights of the units that stay."""
        return fit.solved(fit.unchanged)
