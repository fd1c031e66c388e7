"""The recoveries of secateur.

- `none`: units are removed, and nothing else changes.
- `bias`: the mean output of the removed units is added to the bias, and no weight changes:
  b = b_old + mean(x_R) W_R, with R the inputs of the removed units. Source: An et al., 2023, *Fluctuation-based
  Adaptive Structured Pruning for Large Language Models* (FLAP).
- `refit`: least squares for the output projection and, in a feed-forward, for the input projections.

      1. W_K = argmin ||X_K W_K - T||^2 + ridge penalty, T the error-aware target
      2. one Gauss-Newton step on the input projections of a feed-forward, to the same target
      3. step 1 again; both steps are undone if the error did not fall

- `paper`: level 1 and level 2 of a module are fitted to their dense outputs (Algorithms 1, 3 and 4 of the paper).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import ROUNDING, OutputFit, compensation, fit_output_projection
from secateur.fit.recovery import Recovery
from secateur.fit.regression import BlockRegression
from secateur.model.structure import PrunableModule
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares, normal_equations


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Removal of units, and nothing else."""

    biases = "kept"
    summary = "The remaining weights are unchanged."

    def fit(self, module_fit: ModuleFit) -> OutputFit:
        """Return the old weights of the kept units."""
        return module_fit.without_refit()


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
        del module_fit.statistics
        if not self._fits_inputs(module_fit, first):
            return first
        return module_fit.fit_input_projections(first)

    def _fits_inputs(self, module_fit: ModuleFit, output: OutputFit) -> bool:
        """Return whether the module has input projections to fit, and an error that is more than rounding."""
        fittable = self.input_steps and module_fit.regression.fits_inputs and module_fit.keep
        return bool(fittable) and output.error > ROUNDING * module_fit.moments.fit.energy()


@dataclass(frozen=True)
class PaperRecovery(Recovery):
    """Recovery that fits level 1, then level 2, each by least squares; no module repairs the errors of another one."""

    when: str = "after"
    """Moment of the fit: `after` units are chosen, `before`, so that the criterion sees fitted weights, or `both`."""

    fits = fits_own_output = needs_dense_inputs = True
    summary = Refit.summary

    @classmethod
    def of(cls, options: Any) -> "PaperRecovery":
        """Return the recovery with the ridge and the moment that the options give."""
        return cls(options.ridge, options.recover)

    @property
    def before(self) -> bool:
        """Whether all units are fitted before the choice."""
        return self.when in ("before", "both")

    def prepare(self, module_fit: ModuleFit) -> None:
        """Fit level 1 before the choice."""
        if self.before:
            self._refit_inputs(module_fit)

    def choice_output(self, module_fit: ModuleFit) -> OutputFit | None:
        """Return level 2 as it is fitted to the inputs of all units."""
        if not self.before or _is_expert(module_fit):
            return None
        moments, statistics = module_fit.moments, module_fit.statistics
        return module_fit.solve(lambda: fit_output_projection(moments.fit, statistics.normal, moments.entries))

    def fit(self, module_fit: ModuleFit) -> OutputFit:
        """Fit level 1 unless it is fitted already, then level 2 of the kept units."""
        if _is_expert(module_fit):
            return module_fit.solve(module_fit.fit_kept_inputs)
        if not self.before:
            self._refit_inputs(module_fit)
            module_fit.collect_again()
        return module_fit.without_refit() if self.when == "before" else module_fit.solve(module_fit.fit_kept_inputs)

    def _refit_inputs(self, module_fit: ModuleFit) -> None:
        """Fit level 1 to its dense outputs on all rows, for all units."""
        regression, module, width = module_fit.regression, module_fit.module, module_fit.regression.stream.width
        # Heads that share a latent vector read that vector, not the module's input.
        if _is_expert(module_fit) or not module.input_projections or module.input_reader is not None:
            return
        assert isinstance(regression, BlockRegression)
        state, device = regression.state, regression.stream.device
        biased = any(slab.name.endswith(".bias") for slab in module.input_projections)
        moments = Moments(width, width, centre=biased, device=device)
        for at in state.rows.batches():
            dense = state.dense_inputs[module.kind][at].to(device)
            source = state.layer_inputs(module, regression.pruned, at, module.input_layer)[module.input_layer]
            moments.update(source.reshape(-1, width), dense.reshape(-1, width), at.weight)
        moments.reduce(module_fit.processes, regression.owner)

        def made() -> dict[str, Tensor]:
            return fit_level1(module, state.tensors, moments, self.ridge)

        state.set_tensors(module_fit.processes.compute_at(regression.owner, made, device))


def _is_expert(module_fit: ModuleFit) -> bool:
    """Return whether a module is an expert, of which the paper has none: only level 2 is fitted, after the choice."""
    return not isinstance(module_fit.regression, BlockRegression)


def fit_level1(
    module: PrunableModule, tensors: Mapping[str, Tensor], inputs: Moments, ridge: float
) -> dict[str, Tensor]:
    """Return level-1 weights and biases that map the module's input in the pruned stream to the dense level-1 outputs.

    Args:
        module: The module.
        tensors: Weights and biases of the block by name.
        inputs: Gram matrix X_p'X_p of the module's input in the pruned stream, and cross moment X_p'X_d with the input
            in the dense stream. Dense outputs are linear in X_d, so these moments serve all level-1 layers.
        ridge: Ridge of the fit.
    """
    result: dict[str, Tensor] = {}
    # Slabs of one tensor share its axis and its bias.
    slabs = {slab.name: slab for slab in module.input_projections if slab.name.endswith(".weight")}
    everything = torch.arange(inputs.gram().shape[0], device=inputs.gram().device)
    for name, slab in slabs.items():
        old = tensors[name].movedim(slab.axis, 1)
        cross = inputs.cross() @ old
        weight, _ = least_squares(normal_equations(inputs.gram(), cross, 0.0, old, ridge), everything)
        result[name] = weight.movedim(1, slab.axis).contiguous()
        if slab.bias in tensors:
            shift = inputs.mean_o @ old.double() - inputs.mean_a @ weight.double()
            result[slab.bias] = (tensors[slab.bias].double() + shift).float()
    return result
