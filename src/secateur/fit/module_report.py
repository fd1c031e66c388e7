"""Report of one module's fit: the error of its output before and after the refit, relative to the residual stream."""

from dataclasses import dataclass

from secateur.fit.target import ModuleTarget


@dataclass(frozen=True)
class ModuleReport:
    """Result of the fit of an attention, a feed-forward or a mixture."""

    kind: str
    kept: int
    """Number of units that it keeps."""
    units: int
    """Number of units of the dense module."""
    error: float
    """||XW - T||^2 per token, without the penalty, in error units."""
    relative: float
    """The error divided by the energy of the dense residual stream after the module."""
    relative_before: float
    """The same before the refit: with the old weights of the units that are kept."""
    unfitted: tuple[int, ...] = ()
    """Experts with too few tokens for a refit, which keep their weights."""


def report_module(target: ModuleTarget, kept: int, error: float, old_error: float, tokens: float) -> ModuleReport:
    """Return the report of a module.

    Args:
        target: The module's target.
        kept: Number of units that it keeps.
        error, old_error: ||XW - T||^2 over all tokens, after the refit and with the old weights.
        tokens: Sum of the token weights.
    """
    state, module = target.state, target.module
    energy = state.stream.processes.total(
        state.dense_residual[module.kind].energies(state.rows, target.norm.reading_scale_o)
    )
    # Targets are divided by the multiplier of the module's output.
    error, old_error = (value * target.multiplier**2 for value in (error, old_error))
    relative, relative_before = (value / energy if energy else 0.0 for value in (error, old_error))
    return ModuleReport(module.kind, kept, module.units, error / tokens, relative, relative_before)
