"""The central loop: block by block, the dense stream sets targets and the pruned stream is fitted to them.

Each block is read once; what is done with its two modules is in `secateur.fit.module`. Where there are several
versions of the rows, each has a fit of its own from the first block to the last, with streams of its own, and only
the weights that come out are averaged. Rows that count nowhere follow the averaged model.
"""

from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.progress import Silent, Watcher
from secateur.fit.average import FittedBlock, mean_of, put_in
from secateur.fit.block import BlockState, Method
from secateur.fit.module import ModuleState
from secateur.model.arena import Activations, Arena
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import KINDS, Keep, Kind, Width
from secateur.model.surgery import restored
from secateur.plan.problem import Plan


def refit(
    stream: BlockStream,
    plan: Plan,
    rows: Tensor | Rows,
    *,
    method: Method | None = None,
    dtype: torch.dtype | None = None,
    arena_limit: int | None = None,
    watcher: Watcher | None = None,
    judge: Callable[[Activations, Activations], None] | None = None,
) -> Generator[FittedBlock, None, None]:
    """Prune and refit the plan's blocks in order, each seeing what the pruned ones before it produce.

    Args:
        plan: widths of the blocks to prune.
        rows: calibration tokens (rows x length), or several groups of them. Weights are fitted to each group by its
            weight, and units chosen by its score; groups with neither only run along. Where groups are versions,
            each is fitted to on its own, and the fits are averaged.
        method: criterion and recovery.
        dtype: of the tensors that come out; the checkpoint's by default. Later blocks see the rounded weights.
        arena_limit: bytes of activations to hold in memory before files are used.
        judge: called at the end with the dense and the pruned stream behind the last block, of the groups that only
            run along; blocks behind the plan's last one are then run as well.

    Raises:
        SecateurError: where activations are NaN or infinite, with the block and the module.
    """
    method = method or Method()
    dtype = dtype or stream.checkpoint.dtype
    watcher = watcher or Silent()
    rows = Rows.of(rows)
    with Arena(arena_limit) as arena, stream.quick():
        embedded = stream.embed(rows, arena)
        fits = [_Streams.of(part, embedded, stream, arena) for part in rows.fits()]
        beside = [] if judge is None else [_Streams.of(rows.beside(), embedded, stream, arena)]
        arena.release(embedded)
        stop = max(plan.widths) + 1 if judge is None else len(stream)
        for index in watcher.track(range(stop), "Prune"):
            with stream.filled(index) as layer:
                if index not in plan.widths:
                    for one in (*fits, *beside):
                        stream.advance(index, layer, one.rows, one.dense)
                        stream.advance(index, layer, one.rows, one.pruned)
                    continue
                found: list[FittedBlock] = []
                for one in fits:
                    # The first fit chooses the units, where the plan does not name them; the others follow.
                    chosen = {kind: found[0].keep.units(kind) for kind in KINDS} if found else plan.units.get(index, {})
                    with restored(layer):
                        state = BlockState(stream, index, layer, method, dtype, one.rows, arena)
                        found.append(_fit(state, one, plan.widths[index], chosen))
                        del state
                fitted = mean_of(found, layer, dtype)
                for one in beside:
                    stream.advance(index, layer, one.rows, one.dense)
                    with restored(layer):
                        put_in(stream, layer, fitted)
                        stream.advance(index, layer, one.rows, one.pruned)
                # The dense weights must not stay in memory while the caller works on the block.
                del layer, found
            yield fitted
        if judge is not None:
            judge(beside[0].dense, beside[0].pruned)


class _Streams(NamedTuple):
    """What the dense model, and the model pruned so far, give for the rows of one fit."""

    rows: Rows
    dense: Activations
    pruned: Activations

    @classmethod
    def of(cls, rows: Rows, embedded: Activations, stream: BlockStream, arena: Arena) -> "_Streams":
        """Both streams in front of the first block, from what is embedded of all rows."""
        result = cls(rows, arena.empty(rows, stream.width), arena.empty(rows, stream.width))
        for at in rows.batches():
            result.dense[at] = result.pruned[at] = embedded[at]
        return result


def _fit(state: BlockState, streams: _Streams, width: Width, chosen: Mapping[Kind, tuple[int, ...]]) -> FittedBlock:
    """One fit of one block; both streams are then behind it."""
    state.run_dense(streams.dense)
    kept, reports = {}, []
    for kind in KINDS:
        kept[kind], report = ModuleState(state, kind, streams.pruned).prune(width, chosen.get(kind))
        reports.append(report)
    state.run_pruned(streams.pruned)
    return FittedBlock(state.index, Keep(kept["heads"], kept["channels"]), state.changed, tuple(reports))
