"""A fit of one block: its stages are pruned and refitted in the order in which they run.

A stage is made of modules whose outputs are added to the residual stream together: an attention or a feed-forward is a
stage of one module, a mixture of experts one of many (`secateur.fit.mixture_stage`). The target of every module is the
dense stream after the stage, minus the pruned stream without this module.
"""

from secateur.fit.block_regression import BlockRegression
from secateur.fit.block_state import BlockState
from secateur.fit.fitted_block import FittedBlock, ModuleReport
from secateur.fit.mixture_stage import MixtureStage
from secateur.fit.module import fit_module
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.structure import KeptUnits, PrunableModule


def fit_block(state: BlockState, pruned: Activations, width: Width, kept: KeptUnits) -> FittedBlock:
    """Prune and refit one block, and advance its pruned stream in place.

    Args:
        state: The block, not pruned yet.
        pruned: The pruned stream before the block.
        width: Width that the block gets.
        kept: Units that stay, by kind; kinds that are missing here are chosen.
    """
    keep: dict[str, tuple[int, ...]] = dict.fromkeys(state.block.kinds, ())
    unfitted: dict[str, tuple[int, ...]] = {}
    for module in state.block.modules_left:
        units, unfitted[module.kind] = prune_stage(state, module, pruned, width, kept)
        keep |= units
    errors = state.advance(pruned)
    reports = (
        ModuleReport(module.kind, len(keep[module.kind]), module.units, *errors[module.kind], unfitted[module.kind])
        for module in state.block.modules_left
    )
    return FittedBlock(state.index, keep, state.changed, tuple(reports))


def prune_stage(
    state: BlockState, module: PrunableModule, pruned: Activations, width: Width, kept: KeptUnits
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Choose the units of a stage, refit its modules, and store its outputs in the pruned stream.

    Args:
        state: The block.
        module: The attention, the feed-forward or the mixture.
        pruned: The pruned stream before the block.
        width: Number of units that are kept along each axis.
        kept: Units that are kept, by kind, if they are chosen already.

    Returns:
        The units that are kept, by kind, and the experts with too few tokens for a refit.
    """
    # Experts are units that have units inside: each is a module of its own.
    stage = MixtureStage if module.kind_inside is not None else SingleStage
    return stage(state, module, pruned).prune(width, kept)


class SingleStage:
    """Stage of one module."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.module, self.regression = module, BlockRegression(state, module, pruned)

    def prune(self, width: Width, kept: KeptUnits) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
        """Choose units, refit and store the outputs, as `prune_stage` describes."""
        module, regression = self.module, self.regression
        axis = next((axis.name for axis in module.axes if width[axis.name] < axis.units), module.axes[0].name)
        fitted = fit_module(regression, axis, width[axis], kept.get(module.kind))
        regression.store(fitted)
        regression.advance(fitted)
        return {module.kind: fitted.keep}, ()
