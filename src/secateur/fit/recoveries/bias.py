"""Bias compensation: the mean output of the removed units is added to the bias, and no weight changes.

    b = b_old + mean(x_R) W_R        R: inputs of the removed units

Source: An et al., 2023, *Fluctuation-based Adaptive Structured Pruning for Large Language Models* (FLAP).
"""

from dataclasses import dataclass

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import OutputFit, compensation
from secateur.fit.recovery import Recovery


@dataclass(frozen=True)
class BiasCompensation(Recovery):
    """Recovery by biases alone, with the means of the pruned stream."""

    biases = "added"
    summary = (
        "The remaining weights are unchanged; biases, where modules can have them, compensate for the mean output of "
        "the removed units."
    )

    def fit(self, module_fit: ModuleFit) -> OutputFit:
        """Return the old weights of the kept units with the new bias."""
        output = module_fit.without_refit()
        if not module_fit.regression.fits_bias:
            return output
        old_bias = module_fit.regression.tensors.get(module_fit.module.bias_name)
        bias = compensation(module_fit.moments.fit, module_fit.old_ad, module_fit.kept_inputs, old_bias)
        return output._replace(bias_d=bias)
