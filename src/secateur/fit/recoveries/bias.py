"""Bias compensation (FLAP): the mean contribution of removed units is added to the bias, and no weight changes."""

from dataclasses import dataclass

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import OutputFit, compensation, intercept
from secateur.fit.recovery import Recovery, recovery


@recovery("bias")
@dataclass(frozen=True)
class BiasCompensation(Recovery):
    """Biases make up for the mean of removed units, in the pruned stream."""

    biases = "added"
    summary = "What is left is as it was, but for biases that make up for the mean of what is gone."

    def fit(self, fit: ModuleFit) -> OutputFit:
        """Return the old weights of the units that stay, with the new bias."""
        found = fit.solve(fit.keep_old_weights)
        if not fit.regression.fits_bias:
            return found
        moments, old = fit.sums.fitted, fit.regression.tensors.get(fit.module.bias_name)
        bias = compensation(moments, fit.old, fit.kept, old)
        # Centred moments leave the mean out of the error.
        lost = float((intercept(moments, found.weight_ko, fit.kept) - bias).double().square().sum())
        return found._replace(bias=bias, error=found.error + moments.count * lost)
