"""Refit: least squares for the output projection and, in a feed-forward, for the input projections.

1. W_K = argmin ||X_K W_K - T||^2 + ridge penalty, T the error-aware target
2. one Gauss-Newton step on the input projections of a feed-forward, to the same target
3. step 1 again; both steps are undone if the error did not fall
"""

from dataclasses import dataclass
from typing import Any

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import ROUNDING, OutputFit
from secateur.fit.recovery import Recovery


@dataclass(frozen=True)
class Refit(Recovery):
    """Least squares to the error-aware target: each module also repairs errors of the modules before it."""

    input_steps: int = 2
    cauchy_scale: float = 1.0

    fits = sums_kept_inputs = uses_effort = True
    summary = "The remaining weights were fitted by least squares to reproduce the model before pruning."

    @classmethod
    def of(cls, options: Any) -> "Refit":
        """Return the refit with the ridge and the effort of the options."""
        return cls(options.ridge, options.input_steps)

    def fit(self, module_fit: ModuleFit) -> OutputFit:
        """Fit the output projection, then the input projections, then the output projection again."""
        first = module_fit.solve(module_fit.fit_kept_inputs)
        # Free the statistics, which are as large as everything that the next steps hold.
        module_fit.release_statistics()
        if not self._fits_inputs(module_fit, first):
            return first
        return module_fit.fit_input_projections(first)

    def _fits_inputs(self, module_fit: ModuleFit, output: OutputFit) -> bool:
        """Return whether the module has input projections to fit, and an error that is more than rounding."""
        fittable = self.input_steps and module_fit.regression.fits_inputs and module_fit.keep
        return bool(fittable) and output.error > ROUNDING * module_fit.moments.fit.energy()
