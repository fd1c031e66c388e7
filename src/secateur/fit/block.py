"""A fit of one block: its modules are pruned and refitted in the order in which they run.

The target of an attention, a feed-forward or a mixture of experts is the dense stream after it, minus the pruned stream
without it. Experts are units that have units inside: each is a module of its own (`secateur.fit.mixture`).
"""

from secateur.fit.block_state import BlockState
from secateur.fit.fitted_block import FittedBlock, ModuleReport
from secateur.fit.mixture import MixtureFit
from secateur.fit.module import ModuleFit
from secateur.fit.regression import BlockRegression
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
        if module.kind_inside is not None:
            units, unfitted[module.kind] = MixtureFit(state, module, pruned).run(width, kept)
            keep |= units
        else:
            axis = next((axis.name for axis in module.axes if width[axis.name] < axis.units), module.axes[0].name)
            regression = BlockRegression(state, module, pruned)
            fitted = ModuleFit(regression).run(axis, width[axis], kept.get(module.kind))
            regression.store(fitted)
            keep[module.kind] = fitted.keep
    errors = state.advance(pruned)
    reports = (
        ModuleReport(one.kind, len(keep[one.kind]), one.units, *errors[one.kind], unfitted.get(one.kind, ()))
        for one in state.block.modules_left
    )
    return FittedBlock(state.index, keep, state.changed, tuple(reports))
