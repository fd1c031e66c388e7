"""Recovery of the paper: level 1 and level 2 of a module are fitted to their dense outputs (Algorithms 1, 3 and 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.fit.block_regression import BlockRegression
from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import OutputFit
from secateur.fit.recoveries.refit import Refit
from secateur.fit.recovery import Recovery
from secateur.model.structure import PrunableModule
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares, normal_equations


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
        is_fitted = self.before and not _is_expert(module_fit)
        return module_fit.solve(module_fit.fit_all_inputs) if is_fitted else None

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
