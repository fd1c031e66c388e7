"""The central loop: block by block, the dense stream sets targets and the pruned stream is fitted to them.

Each block is read once; what is done with its two modules is in `secateur.steps.fit_block`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.activations import Activations, Arena, Rows
from secateur.choice import parse_choice
from secateur.criteria import NEEDS_GRADIENTS
from secateur.progress import Silent, Watcher
from secateur.steps.fit_block import BlockWork, Method, ModuleReport
from secateur.steps.gradients import gradient_scores
from secateur.steps.plan import Plan
from secateur.stream import BlockStream
from secateur.structure import KINDS, Keep


@dataclass(frozen=True)
class FittedBlock:
    """One block whose units have been chosen and whose weights have been refitted, not yet cut."""

    index: int
    keep: Keep
    changed: dict[str, Tensor]
    """Tensors with new values at full width, float32, already rounded to the dtype of the output."""
    reports: tuple[ModuleReport, ...]


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
        stream: an open model.
        plan: widths of the blocks to prune.
        rows: calibration tokens (rows x length), or several groups of them. Weights are fitted to each group by its
            weight, and units chosen by its score; groups with neither only run along.
        method: criterion and recovery.
        dtype: of the tensors that come out; the checkpoint's by default. Later blocks see the rounded weights.
        arena_limit: bytes of activations to hold in memory before files are used.
        watcher: told about progress.
        judge: called at the end with the dense and the pruned stream behind the last block; blocks behind the plan's
            last one are then run as well.

    Raises:
        SecateurError: where activations are NaN or infinite, with the block and the module.
    """
    method = method or Method()
    dtype = dtype or stream.checkpoint.dtype
    watcher = watcher or Silent()
    rows = Rows.of(rows)
    if parse_choice(method.criterion).uses(NEEDS_GRADIENTS) and method.scores is None and not plan.keeps:
        scores = gradient_scores(stream, rows, method.criterion, arena_limit=arena_limit, watcher=watcher)
        method = replace(method, scores=scores)
    with Arena(arena_limit) as arena:
        dense = stream.embed(rows, arena)
        pruned = arena.empty(rows, stream.width)
        pruned.copy_(dense)
        stop = max(plan.widths) + 1 if judge is None else len(stream)
        for index in watcher.track(range(stop), "Prune"):
            with stream.filled(index) as layer:
                if index not in plan.widths:
                    for hidden in (dense, pruned):
                        stream.advance(index, layer, rows, hidden)
                    continue
                work = BlockWork(stream, index, layer, method, dtype, rows, arena)
                work.run_dense(dense)
                kept, reports = {}, []
                for kind in KINDS:
                    given = plan.keeps[index].units(kind) if plan.keeps else None
                    kept[kind], report = work.prune_module(kind, pruned, plan.widths[index], given)
                    reports.append(report)
                work.run_pruned(pruned)
                keep = Keep(kept["heads"], kept["channels"])
                fitted = FittedBlock(index, keep, work.changed, tuple(reports))
                # The dense weights must not stay in memory while the caller works on the block.
                del work, layer
            yield fitted
        if judge is not None:
            judge(dense, pruned)
