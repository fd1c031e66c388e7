"""Fit of one module: choose its units, refit its output projection and its input projections.

    1. moments of the rows X and targets T                               regression.py
    2. the units K that are kept, by a criterion                         criteria/order.py
    3. output projection: argmin ||X_K W_K - T||^2 + ridge penalty       output_projection.py
    4. input projections: one Gauss-Newton step on the same error        input_projections.py
    5. moments again, and step 3 again

A module is an attention, a feed-forward or a single expert. The recovery decides which of these steps run: it calls the
methods of `ModuleFit`.

Shapes: a inputs of the output projection, k kept inputs, d residual width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from secateur.criteria.order import remaining_units, removal_order
from secateur.criteria.statistics import Statistics
from secateur.fit.input_projections import GaussNewtonStep
from secateur.fit.output_projection import OutputFit, fit_output_projection
from secateur.fit.regression import FittedModule, ModuleMoments, Regression
from secateur.model.surgery import entries, kept_inputs
from secateur.numerics.moments import Moments


class ModuleFit:
    """Fit of one module while it is made. A recovery calls its methods.

    Attributes:
        regression: Rows of the module.
        recovery: Settings of the fit.
        module: Description of the module.
        moments: Moments of the rows.
        statistics: Statistics of the rows with the old weights; `Refit` deletes them to free their memory.
        old_ad: The old output projection, in error units.
        choice_ad: The output projection by which units are chosen; the old one unless the recovery fits it first.
        choice_bias: The bias (d) that belongs to `choice_ad`; None for the old one.
        keep: Units that are kept, once they are chosen.
        kept_inputs: Inputs of the output projection that belong to `keep` (k), once the units are chosen.
    """

    moments: ModuleMoments
    statistics: Statistics
    old_ad: Tensor
    choice_ad: Tensor
    choice_bias: Tensor | None = None
    keep: tuple[int, ...]
    kept_inputs: Tensor

    def __init__(self, regression: Regression):
        self.regression, self.recovery, self.module = regression, regression.recovery, regression.module
        self.processes, self.device = regression.stream.processes, regression.stream.device

    def run(self, axis: str, stop: int, kept: tuple[int, ...] | None = None) -> FittedModule:
        """Choose the units of the module, and refit the module.

        Args:
            axis: Axis along which units are removed.
            stop: Number of units that are left along the axis.
            kept: Units that are kept, if they are chosen already.
        """
        regression, recovery = self.regression, self.recovery
        recovery.prepare(self)
        self.choice_ad = self.old_ad = regression.norm.scale(regression.weight)
        self.moments = regression.collect(kept if kept and recovery.sums_kept_inputs else None)
        old = self.moments.rows(self.old_ad)
        self.statistics = self._make_statistics(old, self.moments.fit, self.moments.module_input)
        choice = self._choice_statistics()
        self.keep = self._choose(choice, axis, stop) if kept is None else kept
        # Free the Gram matrix of the choice, which is as large as that of the fit.
        del choice
        self.moments = replace(self.moments, choice=self.moments.fit, module_input=None)
        self.kept_inputs = kept_inputs(self.module, self.keep).to(self.device)
        output = recovery.fit(self)
        return FittedModule(self.keep, self.kept_inputs, self.moments, output)

    def collect_again(self) -> None:
        """Take the moments of all inputs anew, after a change of the input projections."""
        del self.statistics
        self.moments = self.regression.collect()
        self.statistics = self._make_statistics(self.old_ad, self.moments.fit)

    def solve(self, make: Callable[[], OutputFit]) -> OutputFit:
        """Make a fit at the owner rank of the module, and return it at every rank."""

        def make_tensors() -> dict[str, Tensor]:
            fit = make()
            tensors = {"weight": fit.weight_kd, "error": torch.tensor(fit.error, dtype=torch.float64)}
            return tensors if fit.bias_d is None else tensors | {"bias": fit.bias_d}

        tensors = self.processes.compute_at(self.regression.owner, make_tensors, self.device)
        return OutputFit(tensors["weight"], tensors.get("bias"), float(tensors["error"]))

    def fit_kept_inputs(self) -> OutputFit:
        """Fit the output projection to the inputs of the kept units."""
        positions = self.moments.positions(self.kept_inputs)
        return fit_output_projection(self.moments.fit, self.statistics.normal, positions)

    def without_refit(self) -> OutputFit:
        """Return the kept rows of the output projection by which units were chosen, unchanged."""
        return OutputFit(self.choice_ad[self.kept_inputs], self.choice_bias)

    def fit_input_projections(self, output: OutputFit) -> OutputFit:
        """Fit the input projections, then the output projection again; undo both if the error did not fall.

        Args:
            output: A fit of the output projection.

        Returns:
            The better fit. Afterwards, `moments` covers the kept inputs only.
        """
        regression = self.regression
        before = {slab.name: regression.tensors[slab.name] for slab in self.module.channel_projections}
        regression.set_tensors(self._step_input_projections(output))
        self.moments = moments = regression.collect(self.keep)
        old = moments.rows(regression.norm.scale(regression.weight))
        everything = moments.positions(moments.entries)
        refitted = self.solve(
            lambda: fit_output_projection(moments.fit, self._make_statistics(old, moments.fit).normal, everything)
        )
        if refitted.error < output.error:
            return refitted
        regression.set_tensors(before)
        self.moments = regression.collect(self.keep)
        return output

    def _step_input_projections(self, output: OutputFit) -> dict[str, Tensor]:
        """Return new input projections, after one Gauss-Newton step at a fit of the output projection."""
        regression, slabs = self.regression, self.module.channel_projections
        step = GaussNewtonStep(output.weight_kd, len(slabs), regression.stream.width, regression.tokens, self.processes)
        with regression.linearised(self.moments, self.kept_inputs, output, step.add) as parts:
            changes = step.solve(parts, self.recovery.ridge, self.recovery.input_steps)
        result = {slab.name: regression.tensors[slab.name].clone() for slab in slabs}
        for slab, change_kd in zip(slabs, changes, strict=True):
            rows = entries(slab, self.keep).to(self.device)
            result[slab.name].index_add_(slab.axis, rows, change_kd.movedim(0, slab.axis))
        return result

    def _choice_statistics(self) -> Statistics:
        """Return the statistics by which units are chosen."""
        moments, choice = self.moments, self.statistics
        if moments.choice is not moments.fit:
            choice = self._make_statistics(self.old_ad, moments.choice, moments.module_input)
        if (output := self.recovery.choice_output(self)) is not None:
            self.choice_ad, self.choice_bias = output.weight_kd, output.bias_d
            choice.weight_ao, choice.ridge_centre_ao = self.choice_ad, self.old_ad
            choice.tensors = {**self.regression.tensors, **self.regression.as_tensor(self.choice_ad)}
        return choice

    def _make_statistics(self, old_ad: Tensor, moments: Moments, module_input: Moments | None = None) -> Statistics:
        """Return what a criterion and a refit read of the module."""
        return Statistics(
            module=self.module,
            tensors=self.regression.tensors,
            weight_ao=old_ad,
            moments=moments,
            input_moments=module_input,
            ridge=self.recovery.ridge,
            target_is_old_output=False,
            seed=self.regression.seed,
        )

    def _choose(self, statistics: Statistics, axis: str, stop: int) -> tuple[int, ...]:
        """Return the units that the criterion keeps."""
        module, criterion = self.module, self.regression.criterion
        if stop == 0:
            return ()
        if stop == module.axis(axis).units:
            return tuple(range(module.units))

        def order() -> dict[str, Tensor]:
            return {"order": removal_order(criterion(), statistics, axis, stop)}

        removed = self.processes.compute_at(self.regression.owner, order, self.device)["order"]
        return remaining_units(module, axis, removed)
