"""The central loop: block by block, the dense stream sets targets and the pruned stream is fitted to them.

Each block is read once, and its dense forward runs once; what is done with its stages is in
`secateur.fit.stage`. Where there are several versions of the rows, each has a fit of its own from the first block to
the last, with a pruned stream of its own, and only the weights that come out are averaged. Rows that count nowhere
follow the averaged model.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from secateur.fit.block import BlockState, DenseBlock, Method
from secateur.fit.fitted_block import FittedBlock, as_fitted, mean_of
from secateur.fit.stage import prune_stage
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
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
    """Prune and refit the plan's blocks in order, each seeing what the pruned ones before it produce.

    Args:
        plan: widths of the blocks to prune.
        rows: calibration tokens (rows x length), or several groups of them. Weights are fitted to each group by its
            weight, and units chosen by its score; groups with neither only run along. Where groups are versions,
            each is fitted to on its own, and the fits are averaged.
        method: criterion and recovery.
        dtype: of the tensors that come out; the checkpoint's by default. Later blocks see the rounded weights.
        compare: called at the end with the dense and the pruned stream behind the last block, of the groups that only
            run along, and of these with this process's share; blocks behind the plan's last one are then run as well.
        checkpoint: saves the streams behind each block, and resumes behind the last one that was saved.

    Raises:
        SecateurError: where activations are NaN or infinite, with the block and the module.
    """
    method = method or Method()
    dtype = dtype or stream.checkpoint.dtype
    checkpoint = checkpoint or PassCheckpoint(stream.services)
    rows = stream.own(Rows.of(rows))
    with stream.arena() as arena, stream.quick():
        dense = stream.embed(rows, arena)
        counted, beside = rows.counted(), rows.counted(False)
        # Each fit has a pruned stream of its own, and so have the rows that follow the averaged model.
        fits = [(part, arena.copy(part, dense)) for part in rows.fits()]
        follow = [] if compare is None else [(beside, arena.copy(beside, dense))]
        streams = [dense, *(pruned for _, pruned in (*fits, *follow))]
        stop = max(plan.widths) + 1 if compare is None else len(stream)
        for index in checkpoint.blocks(stop, "Prune", lambda: streams):
            with stream.filled(index) as layer:
                if index not in plan.widths:
                    stream.advance(index, layer, rows, dense)
                    for part, pruned in (*fits, *follow):
                        stream.advance(index, layer, part, pruned)
                    continue
                found: list[FittedBlock] = []
                given = DenseBlock.run(
                    stream, index, layer, counted, dense, arena, inputs=method.recovery.needs_dense_inputs
                )
                for part, pruned in fits:
                    # The first fit chooses the units, where the plan does not name them; the others follow.
                    chosen = found[0].keep if found else plan.units.get(index, {})
                    # Where nothing else asks for the dense weights, they need not stay.
                    with restored(layer) if len(fits) + len(follow) > 1 else nullcontext():
                        state = BlockState(stream, index, layer, method, dtype, part, arena, given)
                        found.append(_fit(state, pruned, plan.widths[index], chosen))
                        del state
                given.release(arena)
                fitted = mean_of(found, layer, dtype)
                for part, pruned in follow:
                    stream.advance(index, layer, part, dense)
                    with restored(layer), as_fitted(stream, layer, fitted):
                        stream.advance(index, layer, part, pruned)
                # The dense weights must not stay in memory while the caller works on the block.
                del layer, found
            yield fitted
            # Nor a block that is done while the next one is at work.
            del fitted
        for _, pruned in follow:
            assert compare is not None
            compare(dense, pruned)


def _fit(state: BlockState, pruned: Activations, width: Width, chosen: Mapping[str, tuple[int, ...]]) -> FittedBlock:
    """One fit of one block; its pruned stream is then behind it."""
    kept: dict[str, tuple[int, ...]] = {}
    reports = []
    for module in state.block.modules:
        units, report = prune_stage(state, module, pruned, width, chosen)
        kept |= units
        reports.append(report)
    state.run_pruned(pruned)
    return FittedBlock(state.index, kept, state.changed, tuple(reports))
