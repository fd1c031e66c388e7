"""What each width of a module costs at the model's output, from a survey's error curves and probes.

The divergence of the logits grows with the error by a power that differs from module to module and from small errors
to large ones. Between two probes it is taken to be that of the straight line between them on a double logarithmic
scale; below the first, to be proportional to the error.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.model.axes import Width
from secateur.model.structure import Block, PrunableModule
from secateur.survey.curves import ErrorCurve, Survey

SMALLEST = 1e-9
"""Errors and divergences below it count as this, for the logarithms."""


class WidthCosts:
    """The price of every width of every surveyed module, in nats per token."""

    def __init__(self, survey: Survey):
        """Fit the relation between error and divergence for each module.

        Without probes, the price is the share of its own output that a module loses.
        """
        self._curves: dict[tuple[int, str], dict[str, NDArray[np.float64]]] = {}
        self._whole: dict[tuple[int, str], float] = {}
        points: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for probe in survey.probes:
            if probe.removes_module:
                self._whole[probe.block, probe.kind] = probe.divergence
            else:
                points.setdefault((probe.block, probe.kind), []).append((probe.error, probe.divergence))
        for curve in survey.curves:
            key = curve.block, curve.kind
            if not survey.probes:
                self._whole[key] = 1.0
            energy = curve.energy, self._whole[key]
            self._curves.setdefault(key, {})[curve.axis] = _priced(curve, points.get(key, []), energy)

    def total(self, blocks: Sequence[Block], widths: Mapping[int, Width]) -> float:
        """What a plan costs, its modules taken one by one; blocks that are absent are dense."""
        modules = [(index, module, width) for index, width in widths.items() for module in blocks[index].modules]
        return sum(self.of(*module) for module in modules)

    def of(self, block: int, module: PrunableModule, width: Width) -> float:
        """What the module of a block costs at a width; zero for a module that was not surveyed and is dense."""
        key = block, module.kind
        total = 0.0
        for axis in module.axes:
            left = width[axis.name]
            if left == 0:
                return self._whole[key]
            if left < axis.units:
                total += float(self._curves[key][axis.name][axis.units - left])
        return total


def _priced(curve: ErrorCurve, points: list[tuple[float, float]], energy: tuple[float, float]) -> NDArray[np.float64]:
    """The price with 0, 1, 2, ... units gone; never falling."""
    errors = np.maximum(np.asarray(curve.errors) - curve.errors[0], 0.0) * curve.left_after_refit
    # A module whose loss costs less than the loss of a part of it is priced by the part.
    known = sorted({(max(e, SMALLEST), max(d, SMALLEST)) for e, d in [*points, energy]})
    x, y = np.log([e for e, _ in known]), np.log(np.maximum.accumulate([d for _, d in known]))
    at = np.log(np.maximum(errors, SMALLEST))
    prices = np.exp(np.interp(at, x, y) + np.minimum(at - x[0], 0.0))
    prices[errors <= 0] = 0.0
    return np.maximum.accumulate(prices)
