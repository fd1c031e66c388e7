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
    """Mean of ||XW - T||^2 over the tokens with their weights, without the penalty, in error units."""
    relative: float
    """The error divided by the mean energy per token of the dense residual stream after the module."""
    relative_before: float
    """The same before the refit: with the old weights of the units that are kept."""
    unfitted: tuple[int, ...] = ()
    """Experts with too few tokens for a refit, which keep their weights."""


def report_module(target: ModuleTarget, kept: int, error: float, old_error: float, tokens: float) -> ModuleReport:
    """Return the report of a module.

    Args:
        target: The module's target.
        kept: Number of units that it keeps.
        error, old_error: Sum of ||XW - T||^2 with the token weights, after the refit and with the old weights.
        tokens: Sum of the token weights.
    """
    state, module = target.state, target.module
    total, energies = state.stream.processes.total, state.dense_residual[module.kind].energies
    count = total(at.weight * state.rows.ids(at).numel() for at in state.rows.batches())
    energy = total(energies(state.rows, target.norm.reading_scale_o)) / count
    # Targets are divided by the multiplier of the module's output.
    error, old_error = (value / tokens * target.multiplier**2 for value in (error, old_error))
    relative, relative_before = (value / energy if energy else 0.0 for value in (error, old_error))
    return ModuleReport(module.kind, kept, module.units, error, relative, relative_before)
