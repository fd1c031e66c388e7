"""The result of a run: its figures, and the contents of secateur.json."""

import platform
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

import secateur
from secateur.base.files import existing_path
from secateur.base.hashes import hash_rows
from secateur.base.options import changed_options, command_line
from secateur.criteria.choice import SIMILARITY
from secateur.fit.fitted_block import FittedBlock
from secateur.fit.mixture import MIN_TOKENS
from secateur.model.structure import Block
from secateur.model.units.experts import EXPERTS
from secateur.plan.meters import Meter
from secateur.plan.problem import Plan
from secateur.report.summary import Summary
from secateur.steps.open_model import OpenRun
from secateur.survey.curves import ErrorCurve
from secateur.text.draw import CalibrationRows
from secateur.write.record import earlier_prunings

SIZES = ("parameters", "bytes", "cache_bytes", "vocabulary")
"""Fields of a `Summary` that secateur.json lists as sizes before and after."""
DISSIMILAR = 0.1
"""Share of a mixture's output energy whose loss costs much. In a mixture built from SmolLM2, experts with 8 % of the
energy cost 0.42 nats per token before the refit and 0.21 after it; experts with 20 % cost 1.34 and 0.31
(docs/results.md)."""


def summarize(run: OpenRun, rows: CalibrationRows, plan: Plan) -> Summary:
    """Return the figures of a plan, with the time and the peak memory of the run so far."""
    stream, options, format = run.stream, run.options, run.request.format
    dense = [block.width for block in stream.blocks]

    def before_and_after(meter: Meter) -> tuple[int, int]:
        return round(meter.original), round(meter.total(plan.widths))

    return Summary(
        parameters=before_and_after(run.request.problem.parameters),
        bytes=before_and_after(format.byte_meter()),
        cache_bytes=before_and_after(format.cache_meter()),
        dense=tuple(dense),
        widths=plan.widths,
        format=format.declaration.name,
        auto_class=stream.checkpoint.auto_class.__name__,
        sparsity=plan.sparsity,
        blocks=options.blocks,
        note=plan.note,
        vllm_unsupported=format.vllm_unsupported_reason(
            [plan.widths.get(index, width) for index, width in enumerate(dense)]
        ),
        begins_with_bos=run.begins_with_bos,
        tokens=rows.tokens,
        vocabulary=None if run.vocabulary is None else run.vocabulary.tokens,
        seconds=time.perf_counter() - run.started,
        peak_bytes=_peak_memory(stream.device),
        effort_seconds={},
    )


def make_record(
    run: OpenRun, rows: CalibrationRows, plan: Plan, done: list[dict[str, Any]], norm_scale: float | None
) -> dict[str, Any]:
    """Return the contents of secateur.json.

    Args:
        run: The result of `open_model`.
        rows: The calibration rows.
        plan: The widths of the pruned blocks.
        done: The `block_record` of every pruned block.
        norm_scale: The final-norm scale; None if none was fitted.
    """
    stream, grouped = run.stream, rows.grouped
    summary = summarize(run, rows, plan)
    record = {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": stream.checkpoint.source,
        "revision": run.run_options.revision,
        "on_hub": existing_path(stream.checkpoint.source) is None,
        **stream.checkpoint.identity,
        "command": command_line("prune", stream.checkpoint.source, changed_options(run.options)),
        "options": asdict(run.options),
        "calibration": {
            "groups": [list(group.shape) for group in grouped.groups],
            "rows": [hash_rows(group) for group in grouped.groups],
            "weights": list(grouped.weights),
            "choice_weights": list(grouped.choice_weights or grouped.weights),
            "resampled": list(grouped.resampled),
            "begins_with_bos": rows.begins_with_bos,
        },
        "sparsity": {
            "wanted": plan.requested_sparsity,
            "reached": plan.sparsity,
            "note": plan.note,
        },
        "cost": plan.cost,
        "vocabulary": None if run.vocabulary is None else run.vocabulary.as_record(),
        "sizes": {name: getattr(summary, name) for name in SIZES if getattr(summary, name) is not None},
        "dense": [dict(width) for width in summary.dense],
        "loads": {
            "class": summary.auto_class,
            "format": summary.format,
            "task": "text-generation" if stream.checkpoint.multimodal_config is None else "image-text-to-text",
            "vllm": summary.vllm_unsupported,
        },
        "final_norm_scale": 1.0 if norm_scale is None else norm_scale,
        "blocks": done,
    }
    if earlier := earlier_prunings(stream.checkpoint.path):
        record["earlier"] = earlier
    similar = plan.similar_heads
    return record if similar is None else record | {SIMILARITY: similar.as_dict()}


def block_record(dense: Block, plan: Plan, block: FittedBlock) -> dict[str, Any]:
    """Return what secateur.json says of a pruned block: its width, the units kept and the errors of its modules."""
    return {
        "block": block.index,
        "width": dict(plan.widths[block.index]),
        **{kind: list(units) for kind, units in block.keep.items()},
        "modules": [asdict(report) for report in block.reports],
    }


def dissimilar_experts_note(blocks: Sequence[Block], curves: Iterable[ErrorCurve], plan: Plan) -> str | None:
    """Return a warning if the remaining experts cannot do the work of the removed ones, before any is removed.

    Args:
        blocks: Every block of the model.
        curves: The error curves of the survey.
        plan: The widths of the pruned blocks.
    """
    lost = []
    for curve in curves:
        if curve.axis == EXPERTS and curve.energy and (width := plan.widths.get(curve.block)):
            removed = blocks[curve.block].width[EXPERTS] - width[EXPERTS]
            lost.append(curve.errors[removed] / curve.energy if removed < len(curve.errors) else 1.0)
    if not lost or (share := sum(lost) / len(lost)) < DISSIMILAR:
        return None
    return (
        f"The experts of this model are dissimilar: removing these experts loses {share:.0%} of the mixtures' output "
        "energy before the refit, so expect a large loss. A lower sparsity, or --modules heads,channels, keeps more"
    )


def unfitted_experts_note(done: list[dict[str, Any]]) -> str | None:
    """Return a note if too few tokens were routed to some experts to refit them.

    Args:
        done: The `block_record` of every pruned block.
    """
    modules = [module for block in done for module in block["modules"] if module["kind"] == "experts"]
    unfitted, kept = sum(len(module["unfitted"]) for module in modules), sum(module["kept"] for module in modules)
    if not unfitted:
        return None
    advice = "; use more rows (--samples), or a more varied text" if 2 * unfitted > kept else ""
    return (
        f"{unfitted:,} of {kept:,} experts were not refitted, because fewer than {MIN_TOKENS} tokens were routed to "
        f"each{advice}"
    )


def _peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes that this process has used so far, in memory or on the device."""
    unit = 1 if platform.system() == "Darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(resident, torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else resident
