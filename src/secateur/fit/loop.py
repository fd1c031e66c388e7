"""The loop over blocks: the dense stream gives the targets of a fit, and the pruned stream gives its inputs.

    for each block:
        run the dense stream through the dense block        block_state.py
        for each fit: prune and refit each module           module.py, mixture.py
        take the mean of the fits                           fitted_block.py
        advance the held-out rows

Each block is read once, and its dense forward pass runs once. With resampled rows there are several fits. Each of them
has a pruned stream of its own from the first block to the last; only the weights that are written are averaged. The
held-out rows run through the averaged model.
"""

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.fit.block_state import BlockState, DenseBlock
from secateur.fit.fitted_block import FittedBlock, ModuleReport, as_fitted, mean_of
from secateur.fit.mixture import MixtureFit
from secateur.fit.module import ModuleFit
from secateur.fit.recovery import Method
from secateur.fit.regression import BlockRegression
from secateur.model.arena import Activations, Arena
from secateur.model.axes import Width
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import KeptUnits
from secateur.model.surgery import restored
from secateur.plan.problem import Plan


def refit(
    stream: BlockStream,
    plan: Plan,
    rows: Tensor | Rows,
    *,
    method: Method | None = None,
    dtype: torch.dtype | None = None,
    compare: Callable[[Activations, Activations], None] | None = None,
    checkpoint: PassCheckpoint | None = None,
) -> Generator[FittedBlock, None, None]:
    """Prune and refit the blocks of a plan in order, each on the outputs of the pruned blocks before it.

    Args:
        stream: The dense model.
        plan: Widths of the blocks to prune, or the units that they keep.
        rows: Calibration rows, or several groups of rows with a weight in fits and a weight in the choice of units.
            Groups with neither weight are held out. With resampled groups, one fit is made for each of them.
        method: Criterion and recovery.
        dtype: Dtype of the new tensors, by default the checkpoint's. Later blocks read the rounded weights.
        compare: Function that is called at the end with the dense and the pruned stream after the last block, on this
            process's held-out rows. If it is given, these rows also run through the blocks after the last pruned one.
        checkpoint: Saves the streams after each block, and resumes after the last block that was saved.

    Yields:
        Each pruned block, with its weights still at full width.

    Raises:
        SecateurError: Activations are NaN or infinite; the message names the block and the module.
    """
    method = method or Method()
    dtype = dtype or stream.checkpoint.dtype
    checkpoint = checkpoint or PassCheckpoint(stream.services)
    rows = stream.local_rows(Rows.of(rows))
    with stream.arena() as arena, stream.fast_products():
        streams = _Streams.start(stream, rows, arena, held_out=compare is not None)
        last = max(plan.widths)
        stop = last + 1 if compare is None else len(stream)
        for index in checkpoint.blocks(stop, "Prune", lambda: streams.all):
            with stream.filled(index) as layer:
                if index not in plan.widths:
                    streams.advance(stream, index, layer, only_held_out=index > last)
                    continue
                fitted = _fit_and_average(stream, index, layer, plan, streams, method, dtype, arena)
                # The dense weights must not stay in memory while the caller works on the block.
                del layer
            yield fitted
            # Nor may a finished block stay while the next one is fitted.
            del fitted
        for _, pruned in streams.held_out:
            assert compare is not None
            compare(streams.dense, pruned)


@dataclass(frozen=True)
class _Streams:
    """The dense stream of all rows, and the pruned streams."""

    rows: Rows
    dense: Activations
    fits: list[tuple[Rows, Activations]]
    """Rows and pruned stream of each fit."""
    held_out: list[tuple[Rows, Activations]]
    """Held-out rows and their pruned stream; empty if the streams are not compared at the end."""

    @classmethod
    def start(cls, stream: BlockStream, rows: Rows, arena: Arena, held_out: bool) -> "_Streams":
        """Embed the rows; all streams are then equal."""
        dense = stream.embed(rows, arena)
        fits = [(part, arena.copy(part, dense)) for part in rows.fits()]
        others = [rows.weighted(False)] if held_out else []
        return cls(rows, dense, fits, [(part, arena.copy(part, dense)) for part in others])

    @property
    def pruned(self) -> list[tuple[Rows, Activations]]:
        """Rows and pruned stream of each fit, and of the held-out rows."""
        return [*self.fits, *self.held_out]

    @property
    def all(self) -> list[Activations]:
        """Every stream."""
        return [self.dense, *(pruned for _, pruned in self.pruned)]

    def advance(self, stream: BlockStream, index: int, layer: nn.Module, *, only_held_out: bool) -> None:
        """Run every stream through a block that is not pruned, in place; or only the held-out rows of each."""
        dense, pruned = [(self.rows, self.dense)], self.pruned
        if only_held_out:
            dense, pruned = [(rows, self.dense) for rows, _ in self.held_out], self.held_out
        for rows, hidden in (*dense, *pruned):
            stream.advance(index, layer, rows, hidden)


def _fit_and_average(
    stream: BlockStream,
    index: int,
    layer: nn.Module,
    plan: Plan,
    streams: _Streams,
    method: Method,
    dtype: torch.dtype,
    arena: Arena,
) -> FittedBlock:
    """Make all fits of one block, return their mean, and advance every stream through the block, in place."""
    rows, dense = streams.rows.weighted(), streams.dense
    outputs = DenseBlock.run(stream, index, layer, rows, dense, arena, with_inputs=method.recovery.needs_dense_inputs)
    fits: list[FittedBlock] = []
    for part, pruned in streams.fits:
        # The first fit chooses the units, unless the plan names them; the other fits keep the same units.
        kept = fits[0].keep if fits else plan.units.get(index, {})
        # With a single pruned stream, no later step reads the dense weights, and they are not kept.
        with restored(layer) if len(streams.pruned) > 1 else nullcontext():
            state = BlockState(stream, index, layer, method, dtype, part, arena, outputs)
            fits.append(fit_block(state, pruned, plan.widths[index], kept))
            del state
    outputs.release(arena)
    fitted = mean_of(fits, layer, dtype)
    for part, pruned in streams.held_out:
        stream.advance(index, layer, part, dense)
        with restored(layer), as_fitted(stream, layer, fitted):
            stream.advance(index, layer, part, pruned)
    return fitted


def fit_block(state: BlockState, pruned: Activations, width: Width, kept: KeptUnits) -> FittedBlock:
    """Prune and refit one block, and advance its pruned stream in place.

    The modules are fitted in the order in which they run. The target of an attention, a feed-forward or a mixture of
    experts is the dense stream after it, minus the pruned stream without it.

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
