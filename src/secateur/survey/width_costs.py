"""Cost of every width of a module: the expected rise of the loss, from a survey's error curves and probes.

The divergence of the logits grows with a module's error by a power that differs from module to module, and between
small and large errors. Between two probes, the divergence is therefore interpolated linearly on a double logarithmic
scale. Below the first probe, the divergence is taken to be proportional to the error.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.model.axes import Width
from secateur.model.structure import Block, PrunableModule
from secateur.survey.curves import ErrorCurve, Survey

SMALLEST = 1e-9
"""Lower limit of errors and divergences before their logarithms are taken."""

Key = tuple[int, str]
"""Index of the block and kind of units of a module."""


class WidthCosts:
    """Cost of every width of every surveyed module, in nats per token."""

    def __init__(self, survey: Survey):
        """Fit the relation between error and divergence for each module.

        Without probes, the cost is the share of its own output that a module loses.
        """
        self._removal_costs: dict[Key, float] = {}
        if not survey.probes:
            self._removal_costs = {(curve.block, curve.kind): 1.0 for curve in survey.curves}
        partial_cuts: defaultdict[Key, list[tuple[float, float]]] = defaultdict(list)
        for probe in survey.probes:
            if probe.removes_module:
                self._removal_costs[probe.block, probe.kind] = probe.divergence
            else:
                partial_cuts[probe.block, probe.kind].append((probe.error, probe.divergence))
        self._curves: defaultdict[Key, dict[str, NDArray[np.float64]]] = defaultdict(dict)
        for curve in survey.curves:
            key = curve.block, curve.kind
            points = [*partial_cuts[key], (curve.energy, self._removal_costs[key])]
            self._curves[key][curve.axis] = _costs(curve, points)

    def total(self, blocks: Sequence[Block], widths: Mapping[int, Width]) -> float:
        """Return the cost of a plan, the sum over its modules.

        Args:
            blocks: All blocks of the model.
            widths: Width of each pruned block, by its index. All other blocks stay dense.
        """
        modules = [(index, module, width) for index, width in widths.items() for module in blocks[index].modules]
        return sum(self.module_cost(*module) for module in modules)

    def module_cost(self, block: int, module: PrunableModule, width: Width) -> float:
        """Return the cost of one module at a width; zero for a dense module, surveyed or not.

        Args:
            block: Index of the module's block.
            module: The module.
            width: Width of the block.
        """
        key = block, module.kind
        narrower = [axis for axis in module.axes if width[axis.name] < axis.units]
        if narrower and not all(width[axis.name] for axis in module.axes):
            return self._removal_costs[key]
        return sum(float(self._curves[key][axis.name][axis.units - width[axis.name]]) for axis in narrower)


def _costs(curve: ErrorCurve, points: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Return the cost once 0, 1, 2, ... units are removed; it never falls.

    Args:
        curve: The error curve along one axis.
        points: Pairs of error and divergence to interpolate between; one of them is the removal of the module.
    """
    errors = np.maximum(np.asarray(curve.errors) - curve.errors[0], 0.0) * curve.left_after_refit
    # If removing the module costs less than a partial cut, the removal gets the cost of the partial cut.
    known = sorted({(max(error, SMALLEST), max(divergence, SMALLEST)) for error, divergence in points})
    log_errors = np.log([error for error, _ in known])
    log_divergences = np.log(np.maximum.accumulate([divergence for _, divergence in known]))
    at = np.log(np.maximum(errors, SMALLEST))
    costs = np.exp(np.interp(at, log_errors, log_divergences) + np.minimum(at - log_errors[0], 0.0))
    costs[errors <= 0] = 0.0
    return np.maximum.accumulate(costs)
