"""The steps of `prune` behind the first: draw, survey, plan, fit, write. Each takes what those before it gave."""

import shutil
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.run_folder import PARTIAL_OUTPUT
from secateur.base.words import first_few, format_count
from secateur.commands.fitted import FittedBlocks, perplexity_ratio, plan_key
from secateur.commands.open import OpenRun
from secateur.commands.request import check_plan
from secateur.commands.result import block_record, dissimilar_experts, record, summarize, unfitted
from secateur.commands.resume import check_rows
from secateur.commands.survey_file import check_survey_file, read_survey, split_survey_rows, survey_key
from secateur.fit.final_norm import scaled_final_norm
from secateur.formats.format import PrunedModel
from secateur.model.axes import AxisKind, Width, axis_kinds, present
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.plan.meters import parameter_meter
from secateur.plan.plan import plan
from secateur.plan.problem import FirstHeads, Plan
from secateur.plan.search import smallest_within
from secateur.plan.target import Target
from secateur.report.card import CARD
from secateur.report.folder import described, text_of
from secateur.report.summary import Summary
from secateur.survey.curves import Survey, save_survey
from secateur.survey.survey import survey
from secateur.text.draw import CalibrationRows, draw
from secateur.text.resample import resample_tokens
from secateur.write.hub import upload
from secateur.write.slice import slice_fitted


@dataclass(frozen=True)
class Findings:
    """What was measured of the dense model to make a plan by."""

    survey: Survey | None = None
    """Errors and prices of every width; None where there is but one plan."""
    first: FirstHeads | None = None
    """Heads that leave before all others, where the criterion measures which."""
    plan: Plan | None = None
    """The plan in which these heads go, where the criterion asks for nothing else."""


def draw_rows(run: OpenRun, *, fitted: bool = True, dry: bool = False) -> CalibrationRows:
    """Read, draw or write the calibration rows.

    Args:
        run: from `open_model`.
        fitted: whether a fit follows, which takes resampled rows as well.
        dry: only the number of rows matters.

    Raises:
        SecateurError: a text that cannot be read or is too short, or a survey of other rows.
    """
    check_survey_file(run)
    rows = draw(run.stream, run.tokenizer, run.row_request, begins_with_bos=run.begins_with_bos, dry=dry)
    check_survey_file(run, rows.selection)
    check_rows(run, rows)
    _describe(run, rows)
    return rows if dry or not fitted else resample_rows(run, rows)


def resample_rows(run: OpenRun, rows: CalibrationRows) -> CalibrationRows:
    """Return the rows together with the resampled rows of each fit, which one pass of the dense model draws."""
    count, seed = rows.request.resamplings, rows.request.seed
    if not count:
        return rows

    def made() -> list[Any]:
        checkpoint = PassCheckpoint(run.services, "resampled")
        return resample_tokens(run.stream, rows.fit, count=count, seed=seed, checkpoint=checkpoint).tolist()

    return replace(rows, resampled=torch.tensor(run.services.saved_result("resampled", made)))


def _describe(run: OpenRun, rows: CalibrationRows) -> None:
    """Say which model it is, and what it is calibrated on."""
    checkpoint, options = run.stream.checkpoint, run.options
    run.watcher.note(
        f"Opened {checkpoint.source}: {checkpoint.config.model_type}, {len(run.stream)} blocks, "
        f"{format_count(parameter_meter(run.stream).dense, 1)} parameters, {_name(checkpoint.dtype)}"
    )
    if checkpoint.quantised:
        run.watcher.note(f"Its weights are quantised; they are read, and written, as {_name(checkpoint.dtype)}")
    if checkpoint.left_out:
        run.watcher.note(
            f"Left out tensors that the model has no place for: {first_few(checkpoint.left_out)} (for example heads "
            "that predict later tokens, or blocks beyond the number in config.json)"
        )
    own = "" if rows.separate_refit is None else f", fitting to {len(rows.separate_refit):,} others"
    run.watcher.note(
        f"Calibrating on {options.samples} rows of {options.length} tokens{own}, computing on {run.stream.device}; "
        f"the output is {run.request.format.number_type}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def survey_model(run: OpenRun, rows: CalibrationRows) -> Findings:
    """Measure what a plan is made by: heads that leave first, and what each width costs, which a file may hold already.

    Raises:
        SecateurError: a threshold that removes nothing or too much; a survey of another model or with other options.
    """
    found = _preselected(run, rows.selection)
    if not run.request.needs_survey:
        return found
    file, wanted = run.run_options.survey, survey_key(run, rows.selection)
    if file is not None and run.processes.broadcast(file.exists):
        return replace(found, survey=Survey.of(run.processes.broadcast(lambda: asdict(read_survey(run, file, wanted)))))
    few, probe_rows = split_survey_rows(rows.selection)
    fitted = Rows.of(few) if rows.random is None else Rows.of(few).scored_by(Rows.of(rows.random))

    def made_anew() -> dict[str, Any]:
        result = survey(
            run.stream,
            fitted,
            probe_rows=probe_rows,
            blocks=run.request.block_range,
            kinds=run.request.problem.kinds,
            criterion=run.criteria("survey", fitted, found.first, blocks=run.request.block_range),
            ridge=run.options.ridge,
            seed=run.options.seed,
            checkpoint=PassCheckpoint(run.services, "survey"),
        )
        return asdict(result)

    made = replace(Survey.of(run.services.saved_result("survey", made_anew)), settings=wanted)
    if file is not None and run.processes.is_first:
        save_survey(made, file)
    return replace(found, survey=made)


def plan_widths(run: OpenRun, rows: CalibrationRows, found: Findings) -> Plan:
    """Choose the width of every module, or take the plan of a file.

    Raises:
        SecateurError: no plan meets the target.
    """
    decided = _plan(run, rows, found)
    run.watcher.note(_described(run, decided))
    if found.survey is not None and (alert := dissimilar_experts(run.stream.blocks, found.survey.curves, decided)):
        run.watcher.note(alert)
    return decided


def fit_blocks(run: OpenRun, rows: CalibrationRows, decided: Plan) -> FittedBlocks:
    """Choose and refit the units of the plan's blocks, in order, as they are asked for."""
    name = f"fit-{plan_key(decided)}"
    state = run.services.run_folder
    if state is not None and not (state.path / PARTIAL_OUTPUT).exists():
        # Its blocks are gone: what was written had just been put in place.
        shutil.rmtree(state.folder(name), ignore_errors=True)
    return FittedBlocks(run, rows, decided, PassCheckpoint(run.services, name))


def write_model(run: OpenRun, rows: CalibrationRows, decided: Plan, blocks: FittedBlocks, out: str | Path) -> Summary:
    """Write the pruned model with its record; it appears whole or not at all."""
    stream, out, state = run.stream, Path(out), run.services.run_folder
    # What a run that was stopped had taken counts as well.
    earlier = blocks.checkpoint.value("seconds", lambda: time.perf_counter() - run.started, 0.0)
    run = replace(run, started=run.started - earlier)
    done: list[dict[str, Any]] = blocks.checkpoint.value("blocks", lambda: done, [])

    def sliced() -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        for block in blocks:
            done.append(block_record(stream.blocks[block.index], decided, block))
            yield block.index, slice_fitted(stream, block, dtype=run.dtype)
            # It must not stay in memory while the next one is fitted.
            del block

    def timings() -> dict[str, float]:
        found = summarize(run, rows, decided)
        crossed = (
            {}
            if run.processes.is_single
            else {"processes": run.processes.size, "moved_bytes": run.processes.bytes_moved}
        )
        return {"seconds": found.seconds, "peak_bytes": found.peak_bytes} | crossed

    @cache
    def said() -> dict[str, Any]:
        return record(run, rows, decided, done, blocks.norm_scale)

    records = {"secateur.json": said, "timings.json": timings} | described(text_of(stream.checkpoint.path / CARD), said)
    if not run.processes.is_first:
        # Its share of the work is all that is wanted.
        for _ in blocks:
            pass
        return summarize(run, rows, decided)
    # Closed at once where writing fails: temporary files go, and no bar is drawn after the error.
    with closing(sliced()) as tensors, closing(blocks):
        pruned = PrunedModel(
            decided,
            tensors,
            records=records,
            final_norm=lambda: {} if blocks.norm_scale is None else scaled_final_norm(stream, blocks.norm_scale),
            fit_checkpoint=blocks.checkpoint,
            state=None if state is None else state.path,
            overwrite=run.run_options.overwrite,
            watcher=run.watcher,
        )
        run.request.format.write(out, pruned)
    if few := unfitted(done):
        run.watcher.note(few)
    if run.run_options.push_to_hub is not None:
        run.watcher.note(f"Sent to {upload(out, run.run_options.push_to_hub, run.watcher)}")
    return summarize(run, rows, decided)


def _preselected(run: OpenRun, text: Tensor) -> Findings:
    """Find the heads that leave first, where the criterion measures which."""
    preselection, given = run.options.preselection, run.request.plan_from_file
    if preselection is None or (given is not None and given.lists_units):
        return Findings()
    found = preselection.find(run.stream, text, run.request.problem, run.watcher)
    run.watcher.note(found.first_heads.describe().capitalize())
    return Findings(first=found.first_heads, plan=found.plan)


def _plan(run: OpenRun, rows: CalibrationRows, found: Findings) -> Plan:
    """The plan; see `plan_widths`."""
    options, problem, first = run.options, run.request.problem, found.first

    def checked(one: Plan) -> Plan:
        return replace(check_plan(run.request.format, one), first_heads=first)

    if run.request.plan_from_file is not None:
        return replace(run.request.plan_from_file, first_heads=first)
    if found.plan is not None:
        return checked(found.plan)
    if isinstance(problem.target, Target) and options.targets_perplexity:
        assert found.survey is not None

        def loss(one: Plan) -> float:
            one = checked(one)
            return float(run.services.saved_result(f"trial-{plan_key(one)}", lambda: perplexity_ratio(run, rows, one)))

        return checked(smallest_within(problem, options.widths, found.survey, problem.target.value, loss))
    return checked(plan(problem, options.widths, found.survey))


def _described(run: OpenRun, decided: Plan) -> str:
    """Which widths were chosen, in one line."""
    dense = [run.stream.blocks[index].width for index in decided.widths]
    price = "" if decided.cost is None else f", expected to cost {decided.cost:.2f} nats per token, module by module"
    kept = list(decided.widths.values())
    if decided.uniform:
        width, full = max(zip(kept, dense, strict=True), key=lambda pair: len(pair[1]))
        parts = [f"{width[name]:,} of {number:,} {axis_kinds()[name].label}" for name, number in full.items()]
        what = f"{', '.join(parts)} in every block"
    else:
        what = " and ".join(_kept(kind, kept, dense) for kind in present(dense))
    return f"Keeping {what}: {decided.sparsity:.1%} goes{price}"


def _kept(kind: AxisKind, kept: list[Width], dense: list[Width]) -> str:
    """Say how many units along an axis a plan keeps, and between which numbers in a block."""
    counts = [kind.count(width) for width in kept if kind.name in width]
    full = sum(map(kind.count, dense))
    each = f"{min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else counts[0]
    return f"{sum(counts):,} of {full:,} {kind.total} ({each} in a block)"
