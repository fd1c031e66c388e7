"""No recovery: the remaining weights stay as they are."""

from dataclasses import dataclass

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import OutputFit
from secateur.fit.recovery import Recovery, recovery


@recovery("none")
@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Weights are only cut."""

    biases = "kept"
    summary = "What is left is as it was."

    def fit(self, fit: ModuleFit) -> OutputFit:
        """Return the old weights of the units that stay."""
        return fit.solve(fit.keep_old_weights)
