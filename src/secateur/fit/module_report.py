"""Report of one module's fit: the error of the residual stream after the module."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleReport:
    """Result of the fit of an attention, a feed-forward or a mixture."""

    kind: str
    kept: int
    """Number of units that it keeps."""
    units: int
    """Number of units of the dense module."""
    error: float
    """Mean squared error per token of the residual stream after the module: pruned minus dense stream, over the
    calibration rows with their weights. It includes the errors of earlier blocks."""
    relative: float
    """The error divided by the mean energy per token of the dense residual stream after the module."""
    unfitted: tuple[int, ...] = ()
    """Experts with too few tokens for a refit, which keep their weights."""
