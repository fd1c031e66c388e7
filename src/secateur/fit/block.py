"""A fit of one block: prune and refit its stages in the order in which they run."""

from secateur.fit.block_state import BlockState
from secateur.fit.fitted_block import FittedBlock
from secateur.fit.module_report import ModuleReport
from secateur.fit.stage import prune_stage
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.structure import KeptUnits


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
