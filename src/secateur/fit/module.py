"""One module's fit: choose units, refit the output projection, then the input projections, and the output once more.

A module is an attention, a feed-forward or a single expert; `secateur.fit.regression` has its rows. The moments of the
output projection's input with the target decide which units stay and what the output projection becomes.

Shapes: a inputs of the output projection, k of them kept, d residual width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.criteria.order import remaining_units, removal_order
from secateur.criteria.statistics import Statistics
from secateur.fit.input_projections import Tangent
from secateur.fit.output_projection import OutputFit, fit_output_projection
from secateur.fit.regression import Regression, Sums
from secateur.model.surgery import inner_entries
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import squared_error


@dataclass(frozen=True)
class Fitted:
    """The fit of one module; its output projection is still to be stored."""

    keep: tuple[int, ...]
    """Units that stay."""
    kept: Tensor
    """Inputs of the output projection that stay."""
    sums: Sums
    fit: OutputFit
    """The new output projection; `old_error` is the error of the old weights of the units that stay."""


def fit_module(regression: Regression, axis: str, stop: int, given: tuple[int, ...] | None = None) -> Fitted:
    """Choose a module's units and refit the module; new input projections are in place already.

    Args:
        regression: the module's rows.
        axis: along which units leave.
        stop: number that stays along the axis.
        given: the units that stay, where they are settled.
    """
    return ModuleFit(regression).run(axis, stop, given)


class ModuleFit:
    """The fit of one module, while it is made; a recovery (`secateur.fit.recovery`) calls its methods."""

    keep: tuple[int, ...]
    """Units that stay, once they are chosen."""
    kept: Tensor
    """Inputs of the output projection that stay."""
    old: Tensor
    """The output projection as it was (a x d), in the units in which errors count."""
    weight: Tensor
    """The same by which units are chosen."""
    bias: Tensor | None = None
    """The bias (d) that goes with `weight`, where that is not the old one."""
    sums: Sums

    def __init__(self, regression: Regression):
        self.regression, self.recovery, self.module = regression, regression.recovery, regression.module
        self.processes, self.device = regression.stream.processes, regression.stream.device
        self._stats: Statistics | None = None

    def run(self, axis: str, stop: int, given: tuple[int, ...] | None) -> Fitted:
        """Choose, refit, and return what is found."""
        regression, recovery = self.regression, self.recovery
        recovery.prepare(self)
        self.weight = self.old = old = regression.norm.scale(regression.weight)
        self.sums = sums = regression.collect(given if given and recovery.sums_kept_inputs else None)
        self._stats = stats = self._statistics(sums.weights(old), sums.fitted, sums.source)
        choice = stats if sums.scored is sums.fitted else self._statistics(old, sums.scored, sums.source)
        if (revised := recovery.choice_output(self)) is not None:
            self.weight, self.bias = revised.weight_ko, revised.bias
            choice.weight_ao, choice.ridge_centre_ao = self.weight, old
            choice.tensors = {**regression.tensors, **regression.stored(self.weight)}
        self.keep = self._choose(choice, axis, stop) if given is None else given
        self.sums = replace(sums, scored=sums.fitted, source=None)
        # The Gram matrix of the choice is as large as the one that is solved next.
        del choice, sums, stats
        self.kept = inner_entries(self.module, self.keep).to(self.device)
        fit = recovery.fit(self)
        return Fitted(self.keep, self.kept, self.sums, fit)

    @property
    def stats(self) -> Statistics:
        """Statistics of the sums with the old weights."""
        assert self._stats is not None
        return self._stats

    def forget_statistics(self) -> None:
        """Give the memory of the statistics back."""
        self._stats = None

    def collect(self) -> None:
        """Sum over the inputs of all units once more, after a change of the module."""
        self._stats = None
        self.sums = self.regression.collect()
        self._stats = self._statistics(self.old, self.sums.fitted)

    def solve(self, make: Callable[[], OutputFit]) -> OutputFit:
        """Return a fit that the module's owner makes of the sums."""

        def made() -> dict[str, Tensor]:
            fit = make()
            found = {"weight": fit.weight_ko, "errors": torch.tensor([fit.error, fit.old_error], dtype=torch.float64)}
            return found if fit.bias is None else found | {"bias": fit.bias}

        found = self.processes.compute_at(self.regression.owner, made, self.device)
        return OutputFit(found["weight"], found.get("bias"), *found["errors"].tolist())

    def _statistics(self, old: Tensor, moments: Moments, source: Moments | None = None) -> Statistics:
        """Return the statistics of the module that a criterion and a refit read."""
        return Statistics(
            module=self.module,
            tensors=self.regression.tensors,
            weight_ao=old,
            moments=moments,
            input_moments=source,
            ridge=self.recovery.ridge,
            target_is_old_output=False,
            seed=self.regression.seed,
        )

    def _choose(self, stats: Statistics, axis: str, stop: int) -> tuple[int, ...]:
        """Return the units that stay, by the criterion."""
        module, criterion = self.module, self.regression.criterion
        if stop == 0:
            return ()
        if stop == module.axis(axis).units:
            return tuple(range(module.units))

        def made() -> dict[str, Tensor]:
            return {"gone": removal_order(criterion(), stats, axis, stop)}

        gone = self.processes.compute_at(self.regression.owner, made, self.device)["gone"]
        return remaining_units(module, axis, gone)

    def fit_all_inputs(self) -> OutputFit:
        """Return a fit of the output projection to the inputs of all units."""
        return fit_output_projection(self.sums.fitted, self.stats.normal, self.sums.entries)

    def fit_kept_inputs(self) -> OutputFit:
        """Return a fit of the output projection, with the error of the old weights where it is reported."""
        normal, places = self.stats.normal, self.sums.among(self.kept)
        old_error = squared_error(normal, normal.old_ao[places], places) if self.regression.reports else float("nan")
        return fit_output_projection(self.sums.fitted, normal, places)._replace(old_error=old_error)

    def keep_old_weights(self) -> OutputFit:
        """Return the weights as they are, with their error where it is reported."""
        weight = self.weight[self.kept]
        error = squared_error(self.stats.normal, weight, self.kept) if self.regression.reports else float("nan")
        return OutputFit(weight, self.bias, error, error)

    def fit_input_projections(self, fit: OutputFit) -> OutputFit:
        """Fit the input projections, then the output projection once more; undo both where that gains nothing.

        Returns:
            The better fit; the sums are then over kept units.
        """
        regression = self.regression
        before = {slab.name: regression.tensors[slab.name] for slab in self.module.channel_projections}
        regression.change(self._step(fit))
        self.sums = sums = regression.collect(self.keep)
        old = sums.weights(regression.norm.scale(regression.weight))
        everything = sums.among(sums.entries)
        again = self.solve(
            lambda: fit_output_projection(sums.fitted, self._statistics(old, sums.fitted).normal, everything)
        )
        if again.error < fit.error:
            return again
        regression.change(before)
        self.sums = regression.collect(self.keep)
        return fit

    def _step(self, fit: OutputFit) -> dict[str, Tensor]:
        """Return new input projections, from one Gauss-Newton step at a fit of the output projection."""
        regression, module = self.regression, self.module
        width = regression.stream.width
        tangent = Tangent(fit.weight_ko, len(module.channel_projections), width, regression.tokens, self.processes)
        with regression.linearised(self.sums, self.kept, fit, tangent.add) as parts:
            changes = tangent.step(parts, self.recovery.ridge, self.recovery.input_steps)
        tensors = regression.tensors
        result = {slab.name: tensors[slab.name].clone() for slab in module.channel_projections}
        for slab, change in zip(module.channel_projections, changes, strict=True):
            result[slab.name].index_add_(slab.axis, slab.offset + self.kept, change.movedim(0, slab.axis))
        return result
