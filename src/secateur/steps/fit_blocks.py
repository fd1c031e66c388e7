"""The fifth step of `prune`: choose the units of each block and refit the weights that remain."""

import math
import shutil
from collections.abc import Callable, Generator, Iterator

from secateur.base.hashes import hash_json
from secateur.base.run_folder import PARTIAL_OUTPUT
from secateur.fit.final_norm import final_norm_scale, scaled_final_norm
from secateur.fit.fitted_block import FittedBlock
from secateur.fit.loop import refit
from secateur.fit.recovery import Method
from secateur.model.arena import Activations
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.plan.problem import Plan
from secateur.steps.open_model import OpenRun
from secateur.survey.loss import mean_loss
from secateur.text.draw import HELD_OUT, CalibrationRows

Observer = Callable[[Activations, Activations], None]
"""Function of the dense stream and the pruned stream after the last block, on rows that no weight is fitted to."""


class FittedBlocks(Iterator[FittedBlock]):
    """Iterator over the fitted blocks of a plan, which fits each block when it is requested.

    Attributes:
        checkpoint: Saves the state of the fit after each block.
        norm_scale: The final-norm scale, known after the last block; None if no rows are held out for it.
        begun: Whether a block was requested. An iterator gives each block once.
    """

    def __init__(
        self,
        run: OpenRun,
        rows: CalibrationRows,
        plan: Plan,
        checkpoint: PassCheckpoint,
        observe: Observer | None = None,
    ):
        """Prepare the fit without starting it.

        Args:
            run: The result of `open_model`.
            rows: The calibration rows.
            plan: The widths of the blocks to prune.
            checkpoint: Saves the state of the fit after each block, and resumes after the last saved block.
            observe: Is called with the streams after the last block.
        """
        self.checkpoint = checkpoint
        self.norm_scale: float | None = None
        self.begun = False
        self._blocks = self._fit(run, rows, plan, observe)

    def __next__(self) -> FittedBlock:
        self.begun = True
        return next(self._blocks)

    def close(self) -> None:
        """Free the memory and the files of a fit that is not finished."""
        self._blocks.close()

    def _fit(
        self, run: OpenRun, rows: CalibrationRows, plan: Plan, observe: Observer | None
    ) -> Generator[FittedBlock, None, None]:
        def after_last_block(dense: Activations, pruned: Activations) -> None:
            if len(rows.norm_scale):
                group = rows.grouped.weights.index(0.0)
                self.norm_scale = final_norm_scale(run.stream, rows.grouped, group, dense, pruned)
            if observe is not None:
                observe(dense, pruned)

        criteria = run.criteria("fit", Rows.of(rows.selection), plan.similar_heads, exact=plan.lists_units)
        yield from refit(
            run.stream,
            plan,
            rows.grouped,
            method=Method(criteria, run.recovery, run.options.seed),
            dtype=run.dtype,
            compare=after_last_block if observe is not None or len(rows.norm_scale) else None,
            checkpoint=self.checkpoint,
        )


def fit_blocks(run: OpenRun, rows: CalibrationRows, plan: Plan) -> FittedBlocks:
    """Return an iterator over the plan's blocks, in order, each with its units chosen and its weights refitted."""
    name = f"fit-{plan_key(plan)}"
    state = run.services.run_folder
    if state is not None and not (state.path / PARTIAL_OUTPUT).exists():
        # The output that held the earlier blocks was already moved into place, so the fit starts over.
        shutil.rmtree(state.folder(name), ignore_errors=True)
    return FittedBlocks(run, rows, plan, PassCheckpoint(run.services, name))


def plan_key(plan: Plan) -> str:
    """Return a short hash of a plan's widths and units, which names its files in the run folder."""
    return hash_json(repr((plan.widths, plan.units)))


def perplexity_ratio(run: OpenRun, rows: CalibrationRows, plan: Plan) -> float:
    """Prune by a plan, measure on the held-out rows, and discard the pruned model.

    Returns:
        Perplexity of the pruned model divided by the perplexity of the dense model.
    """
    stream, groups, losses = run.stream, rows.grouped, list[float]()
    held_out = len(groups.groups) - 1

    def measure(dense: Activations, pruned: Activations) -> None:
        norm = {} if blocks.norm_scale is None else scaled_final_norm(stream, blocks.norm_scale)
        losses.append(mean_loss(stream, groups, held_out, dense))
        losses.append(mean_loss(stream, groups, held_out, pruned, norm))

    blocks = FittedBlocks(run, rows, plan, PassCheckpoint(run.services, f"trial-{plan_key(plan)}"), measure)
    for _ in blocks:
        pass
    ratio = math.exp(losses[1] - losses[0])
    run.watcher.note(
        f"Tried {plan.sparsity:.1%} sparsity: {ratio:.3f} times the dense perplexity on {HELD_OUT} held-out rows"
    )
    return ratio
