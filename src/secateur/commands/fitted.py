"""The fitted blocks of a run, one after the other, and the loss of a plan that is tried."""

import math
from collections.abc import Callable, Generator, Iterator

from secateur.base.hashes import hash_json
from secateur.commands.open import OpenRun
from secateur.fit.final_norm import final_norm_scale, scaled_final_norm
from secateur.fit.fitted_block import FittedBlock
from secateur.fit.loop import refit
from secateur.model.arena import Activations
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.plan.problem import Plan
from secateur.survey.loss import mean_loss
from secateur.text.draw import HELD_OUT, CalibrationRows

Judge = Callable[[Activations, Activations], None]
"""Sees the dense and the pruned stream behind the last block, of rows that count nowhere."""


class FittedBlocks(Iterator[FittedBlock]):
    """The fitted blocks of a plan, and behind the last one the scale of the final norm."""

    def __init__(
        self, run: OpenRun, rows: CalibrationRows, decided: Plan, checkpoint: PassCheckpoint, judge: Judge | None = None
    ):
        """Prepare; the first block is fitted when it is asked for.

        Args:
            checkpoint: saves the fit behind each block, and resumes behind the last one that was saved.
            judge: sees the streams behind the last block.
        """
        self.checkpoint = checkpoint
        self.norm_scale: float | None = None
        """At which the pruned model is as sure of itself as the dense one; None where no rows were left to tell."""
        self._run, self._rows, self._judge = run, rows, judge
        self._blocks = self._fit(decided)

    def __next__(self) -> FittedBlock:
        return next(self._blocks)

    def close(self) -> None:
        """Give back what a fit that is not finished holds."""
        self._blocks.close()

    def _fit(self, decided: Plan) -> Generator[FittedBlock, None, None]:
        run, rows = self._run, self._rows
        judged = self._judge is not None or len(rows.norm_scale)
        yield from refit(
            run.stream,
            decided,
            rows.grouped,
            method=run.method(rows, decided.first_heads, decided.lists_units),
            dtype=run.dtype,
            compare=self._behind if judged else None,
            checkpoint=self.checkpoint,
        )

    def _behind(self, dense: Activations, pruned: Activations) -> None:
        rows = self._rows
        if len(rows.norm_scale):
            group = rows.grouped.weights.index(0.0)
            self.norm_scale = final_norm_scale(self._run.stream, rows.grouped, group, dense, pruned)
        if self._judge is not None:
            self._judge(dense, pruned)


def plan_key(decided: Plan) -> str:
    """What tells a plan from others."""
    return hash_json(repr((decided.widths, decided.units)))


def perplexity_ratio(run: OpenRun, rows: CalibrationRows, decided: Plan) -> float:
    """Perplexity over dense on the held-out rows, of a plan that is carried out and thrown away."""
    stream, groups, losses = run.stream, rows.grouped, list[float]()
    last = len(groups.groups) - 1

    def judge(dense: Activations, pruned: Activations) -> None:
        norm = {} if blocks.norm_scale is None else scaled_final_norm(stream, blocks.norm_scale)
        losses.append(mean_loss(stream, groups, last, dense))
        losses.append(mean_loss(stream, groups, last, pruned, norm))

    blocks = FittedBlocks(run, rows, decided, PassCheckpoint(run.services, f"trial-{plan_key(decided)}"), judge)
    for _ in blocks:
        pass
    ratio = math.exp(losses[1] - losses[0])
    run.watcher.note(f"{decided.sparsity:.1%} gone: perplexity {ratio:.3f} x dense on {HELD_OUT} other rows")
    return ratio
