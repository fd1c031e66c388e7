"""The sixth step of `prune`: write the model with its records."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.checkpoints.expert_matrices import BlockTensor
from secateur.fit.final_norm import scaled_final_norm
from secateur.formats.format import PrunedModel
from secateur.plan.problem import Plan
from secateur.report.folder import readme_and_report
from secateur.report.summary import Summary
from secateur.steps.fit_blocks import FittedBlocks
from secateur.steps.open_model import OpenRun
from secateur.steps.result import block_record, make_record, summarize, unfitted_experts_note
from secateur.text.draw import CalibrationRows
from secateur.vocabulary.kept import map_contents, original_ids
from secateur.write.hub import upload
from secateur.write.record import MAP_FILE
from secateur.write.slice import slice_fitted

BlockRecords = list[dict[str, Any]]
"""Entries of secateur.json, one for each pruned block."""


def write_model(run: OpenRun, rows: CalibrationRows, plan: Plan, blocks: FittedBlocks, out: str | Path) -> Summary:
    """Fit the blocks one after the other, write each, and put the complete output in place.

    Args:
        run: The result of `open_model`.
        rows: The calibration rows.
        plan: The result of `plan_widths`.
        blocks: The result of `fit_blocks`.
        out: Folder or .gguf file to write. It appears once it is complete; an error leaves nothing there.

    Raises:
        SecateurError: The blocks were written before, or the output cannot be written.
    """
    if blocks.begun:
        raise SecateurError("blocks were taken from this iterator before; call fit_blocks again")
    # Seconds that the run took before it was stopped count too.
    earlier = blocks.checkpoint.value("seconds", lambda: time.perf_counter() - run.started, 0.0)
    run = replace(run, started=run.started - earlier)
    done: BlockRecords = blocks.checkpoint.value("blocks", lambda: done, [])
    if run.processes.is_first:
        _write(run, rows, plan, blocks, done, Path(out))
    else:
        # Other ranks only share the work of the fits.
        for _ in blocks:
            pass
    # A script may open the output next, in any process.
    run.processes.wait()
    return summarize(run, rows, plan)


def _write(
    run: OpenRun, rows: CalibrationRows, plan: Plan, blocks: FittedBlocks, done: BlockRecords, out: Path
) -> None:
    """Write the output, upload it if requested, and print notes."""
    with pruned_model(run, plan, blocks, done) as pruned:
        run.request.format.write(out, replace(pruned, records=_records(run, rows, plan, blocks, done), rows=rows.fit))
    if (note := unfitted_experts_note(done)) is not None:
        run.watcher.note(note)
    if run.run_options.push_to_hub is not None:
        run.watcher.note(f"Uploaded to {upload(out, run.run_options.push_to_hub, run.watcher)}")


@contextmanager
def pruned_model(run: OpenRun, plan: Plan, blocks: FittedBlocks, done: BlockRecords) -> Iterator[PrunedModel]:
    """Yield the pruned model, whose blocks are fitted one by one while a format takes them.

    Args:
        run: The result of `open_model`.
        plan: The result of `plan_widths`.
        blocks: The result of `fit_blocks`.
        done: List that gets the record of each block.
    """
    stream, state = run.stream, run.services.run_folder
    # Both are closed before an error is shown, so that temporary files are gone and no progress bar follows it.
    with closing(_narrowed(run, plan, blocks, done)) as tensors, closing(blocks):
        yield PrunedModel(
            plan,
            tensors,
            final_norm=lambda: {} if blocks.norm_scale is None else scaled_final_norm(stream, blocks.norm_scale),
            fit_checkpoint=blocks.checkpoint,
            state=None if state is None else state.path,
            overwrite=run.run_options.overwrite,
            watcher=run.watcher,
        )


def _narrowed(
    run: OpenRun, plan: Plan, blocks: FittedBlocks, done: BlockRecords
) -> Generator[tuple[int, dict[str, BlockTensor]], None, None]:
    """Yield the number and the narrowed tensors of each block, and add its record to `done`."""
    for block in blocks:
        done.append(block_record(run.stream.blocks[block.index], plan, block))
        yield block.index, slice_fitted(run.stream, block, dtype=run.dtype)
        # Free the block before the next one is fitted.
        del block


def _records(
    run: OpenRun, rows: CalibrationRows, plan: Plan, blocks: FittedBlocks, done: BlockRecords
) -> dict[str, Any]:
    """Return the files that describe the model: name to contents, or to a function that is called at the end."""

    @cache
    def record() -> dict[str, Any]:
        return make_record(run, rows, plan, done, blocks.norm_scale)

    def timings() -> dict[str, float]:
        summary, processes = summarize(run, rows, plan), run.processes
        team = {} if processes.is_single else {"processes": processes.size, "moved_bytes": processes.bytes_moved}
        return {"seconds": summary.seconds, "peak_bytes": summary.peak_bytes} | team

    checkpoint = run.stream.checkpoint
    files = {"secateur.json": record, "timings.json": timings}
    ids = original_ids(checkpoint)
    files |= {} if ids is None else {MAP_FILE: map_contents(ids)}
    return files | readme_and_report(checkpoint.path, record)
