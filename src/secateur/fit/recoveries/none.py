"""No recovery: the remaining weights are unchanged."""

from dataclasses import dataclass

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import OutputFit
from secateur.fit.recovery import Recovery


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Removal of units, and nothing else."""

    biases = "kept"
    summary = "The remaining weights are unchanged."

    def fit(self, module_fit: ModuleFit) -> OutputFit:
        """Return the old weights of the kept units."""
        return module_fit.without_refit()
