"""One module's fit: choose units, refit the output projection, then the input projections, and the output once more.

A module is an attention, a feed-forward or a single expert; `secateur.fit.regression` has its rows. The moments of the
output projection's input with the target decide which units stay and what the output projection becomes.

Shapes: a inputs of the output projection, k of them kept, d residual width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur.criteria.order import removal_order, survivors
from secateur.criteria.statistics import Statistics
from secateur.fit.recovery import Fit, compensation, fit_level2, intercept
from secateur.fit.regression import Regression, Sums
from secateur.fit.tangent import Tangent
from secateur.fit.target import ROUNDING
from secateur.model.surgery import inner_entries
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import residual


@dataclass(frozen=True)
class Fitted:
    """The fit of one module; its output projection is still to be stored."""

    keep: tuple[int, ...]
    """Units that stay."""
    kept: Tensor
    """Inputs of the output projection that stay."""
    sums: Sums
    fit: Fit
    """The new output projection; `plain` is the error of the old weights of the units that stay."""


def fit_module(regression: Regression, axis: str, stop: int, given: tuple[int, ...] | None = None) -> Fitted:
    """Choose a module's units and refit the module; new input projections are in place already.

    Args:
        regression: the module's rows.
        axis: along which units leave.
        stop: number that stays along the axis.
        given: the units that stay, where they are settled.
    """
    return _ModuleFit(regression).run(axis, stop, given)


class _ModuleFit:
    """The fit of one module, while it is made."""

    def __init__(self, regression: Regression):
        self.regression, self.recovery, self.module = regression, regression.recovery, regression.module
        self.team, self.device = regression.stream.team, regression.stream.device

    def run(self, axis: str, stop: int, given: tuple[int, ...] | None) -> Fitted:
        """Choose, refit, and return what is found."""
        regression, recovery = self.regression, self.recovery
        if recovery.before:
            regression.refit_inputs()
        old = regression.norm.scale(regression.weight)
        # Where units are given, a refit does not look at inputs that go.
        spared = bool(given) and recovery.method == "refit"
        sums = regression.collect(given if spared else None)
        stats = self._statistics(sums.weights(old), sums.fitted, sums.source)
        choice = stats if sums.scored is sums.fitted else self._statistics(old, sums.scored, sums.source)
        weight, bias = old, None
        if recovery.before:
            weight, bias, *_ = self._solved(partial(self._of_all, sums, stats))
            choice.weight_ao, choice.pull_ao = weight, old
            choice.tensors = {**regression.tensors, **regression.stored(weight)}
        keep = self._choose(choice, axis, stop) if given is None else given
        # Its Gram matrix is as large as the one that is solved next.
        del choice
        sums = replace(sums, scored=sums.fitted, source=None)
        kept = inner_entries(self.module, keep).to(self.device)
        if recovery.method == "paper" and not recovery.before:
            regression.refit_inputs()
            sums = regression.collect()
            stats = self._statistics(old, sums.fitted)
        if not recovery.after:
            fit = self._solved(partial(self._unchanged, stats, weight, kept))._replace(bias=bias)
            return Fitted(keep, kept, sums, self._with_bias(sums, old, kept, fit))
        first = fit = self._solved(partial(self._refitted, sums, stats, kept))
        # As large as all that the steps behind it hold.
        del stats
        # An error that is rounding alone asks for nothing.
        if recovery.fits_level1 and self.module.scored and keep and fit.error > ROUNDING * sums.fitted.energy():
            sums, fit = self._fit_inputs(keep, kept, sums, fit)
        return Fitted(keep, kept, sums, fit._replace(plain=first.plain))

    def _solved(self, make: Callable[[], Fit]) -> Fit:
        """Return a fit that the module's owner makes of the sums."""

        def made() -> dict[str, Tensor]:
            fit = make()
            found = {"weight": fit.weight_ko, "errors": torch.tensor([fit.error, fit.plain], dtype=torch.float64)}
            return found if fit.bias is None else found | {"bias": fit.bias}

        found = self.team.solved(self.regression.owner, made, self.device)
        return Fit(found["weight"], found.get("bias"), *found["errors"].tolist())

    def _statistics(self, old: Tensor, moments: Moments, source: Moments | None = None) -> Statistics:
        """Return the statistics of the module that a criterion and a refit read."""
        return Statistics(
            module=self.module,
            tensors=self.regression.tensors,
            weight_ao=old,
            moments=moments,
            inputs=source,
            ridge=self.recovery.ridge,
            own_target=False,
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

        gone = self.team.solved(self.regression.owner, made, self.device)["gone"]
        return survivors(module, axis, gone)

    def _of_all(self, sums: Sums, stats: Statistics) -> Fit:
        """Return a fit of the output projection to the inputs of all units."""
        return fit_level2(sums.fitted, stats.normal, sums.entries)

    def _refitted(self, sums: Sums, stats: Statistics, kept: Tensor) -> Fit:
        """Return a fit of the output projection, with the error of the old weights where it is reported."""
        normal, places = stats.normal, sums.among(kept)
        plain = residual(normal, normal.old_ao[places], places) if self.regression.reports else float("nan")
        return fit_level2(sums.fitted, normal, places)._replace(plain=plain)

    def _unchanged(self, stats: Statistics, weight: Tensor, kept: Tensor) -> Fit:
        """Return the weights as they are, with their error where it is reported."""
        error = residual(stats.normal, weight[kept], kept) if self.regression.reports else float("nan")
        return Fit(weight[kept], None, error, error)

    def _with_bias(self, sums: Sums, old: Tensor, kept: Tensor, fit: Fit) -> Fit:
        """Return unchanged weights with the bias that makes up for removed units, where the recovery is `bias`."""
        if self.recovery.method != "bias" or not self.regression.fits_bias:
            return fit
        bias = compensation(sums.fitted, old, kept, self.regression.tensors.get(self.module.bias_name))
        # Centred moments leave the mean out of the error.
        lost = float((intercept(sums.fitted, fit.weight_ko, kept) - bias).double().square().sum())
        return fit._replace(bias=bias, error=fit.error + sums.fitted.count * lost)

    def _fit_inputs(self, keep: tuple[int, ...], kept: Tensor, sums: Sums, fit: Fit) -> tuple[Sums, Fit]:
        """Fit the input projections, then the output projection once more; undo both where that gains nothing.

        Returns:
            The sums over kept units that hold afterwards, and the better fit.
        """
        regression = self.regression
        before = {slab.name: regression.tensors[slab.name] for slab in self.module.scored}
        regression.change(self._step(sums, kept, fit))
        sums = regression.collect(keep)
        old = sums.weights(regression.norm.scale(regression.weight))
        everything = sums.among(sums.entries)
        again = self._solved(lambda: fit_level2(sums.fitted, self._statistics(old, sums.fitted).normal, everything))
        if again.error < fit.error:
            return sums, again
        regression.change(before)
        return regression.collect(keep), fit

    def _step(self, sums: Sums, kept: Tensor, fit: Fit) -> dict[str, Tensor]:
        """Return new input projections, from one Gauss-Newton step at a fit of the output projection."""
        regression, module = self.regression, self.module
        width = regression.stream.width
        tangent = Tangent(fit.weight_ko, len(module.scored), width, regression.tokens, self.team)
        with regression.linearised(sums, kept, fit, tangent.add) as parts:
            changes = tangent.step(parts, self.recovery.ridge, self.recovery.level1)
        tensors = regression.tensors
        result = {slab.name: tensors[slab.name].clone() for slab in module.scored}
        for slab, change in zip(module.scored, changes, strict=True):
            result[slab.name].index_add_(slab.axis, slab.offset + kept, change.movedim(0, slab.axis))
        return result
