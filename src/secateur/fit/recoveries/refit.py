"""Refit: output projections by ridge least squares to the error-aware target, and input projections along with them."""

from dataclasses import dataclass
from typing import Any

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import ROUNDING, OutputFit
from secateur.fit.recovery import Recovery, recovery


@recovery("refit")
@dataclass(frozen=True)
class Refit(Recovery):
    """Each module repairs errors of those before it, too."""

    input_steps: int = 2
    cauchy_scale: float = 1.0

    fits = sums_kept_inputs = uses_effort = True
    summary = "What is left was fitted, without training, to give what the whole model gives."

    @classmethod
    def of(cls, options: Any) -> "Refit":
        """Return the refit with the ridge and the effort of options."""
        return cls(options.ridge, options.input_steps)

    def fit(self, fit: ModuleFit) -> OutputFit:
        """Fit the output projection, then the input projections, then the output projection once more."""
        first = found = fit.solve(fit.fit_kept_inputs)
        # As large as all that the steps behind it hold.
        fit.forget_statistics()
        # An error that is rounding alone asks for nothing.
        if (
            self.input_steps
            and fit.module.channel_projections
            and fit.keep
            and found.error > ROUNDING * fit.sums.fitted.energy()
        ):
            found = fit.fit_input_projections(found)
        return found._replace(old_error=first.old_error)
