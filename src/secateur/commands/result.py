"""The result of a run: its figures, and the record of what was kept where and why."""

import platform
import resource
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import secateur
from secateur.base.hashes import hash_rows
from secateur.base.options import changed_options, cli_name, option_specs
from secateur.commands.open_model import OpenRun
from secateur.commands.options import Options
from secateur.fit.expert_regression import MIN_TOKENS
from secateur.fit.fitted_block import FittedBlock
from secateur.model.structure import Block
from secateur.model.units.experts import EXPERTS
from secateur.plan.meters import Meter, cache_meter
from secateur.plan.problem import Plan
from secateur.report.summary import Summary
from secateur.survey.curves import ErrorCurve
from secateur.text.draw import CalibrationRows

UNLIKE = 0.1
"""The share of a mixture's output, as energy, that costs much to lose: of a mixture made of SmolLM2, 8 % were 0.42 nats
before the refit and 0.21 behind it, 20 % 1.34 and 0.31 (docs/results.md)."""


def summarize(
    run: OpenRun, rows: CalibrationRows, decided: Plan, expected: dict[str, tuple[float, int]] | None = None
) -> Summary:
    """The figures of a plan; `expected` are a dry run's seconds and peak by effort, in place of those so far."""
    stream, options, blocks, format = run.stream, run.options, run.stream.blocks, run.request.format
    every = [decided.widths.get(index, block.width) for index, block in enumerate(blocks)]
    seconds, peak = (expected or {}).get(options.effort) or (
        time.perf_counter() - run.started,
        _peak_memory(stream.device),
    )

    def before_and_after(meter: Meter) -> tuple[int, int]:
        return round(meter.dense), round(meter.total(decided.widths))

    return Summary(
        parameters=before_and_after(run.request.parameters),
        bytes=before_and_after(format.byte_meter()),
        cache_bytes=before_and_after(cache_meter(stream, run.dtype)),
        dense=tuple(block.width for block in blocks),
        widths=decided.widths,
        format=format.declaration.name,
        auto_class=stream.checkpoint.auto_class.__name__,
        sparsity=decided.sparsity,
        blocks=options.blocks,
        note=decided.note,
        vllm_unsupported=format.vllm_unsupported_reason(every),
        bos=run.begins_with_bos,
        tokens=rows.grouped.groups[0].numel(),
        seconds=seconds,
        peak_bytes=peak,
        effort_seconds={name: took for name, (took, _) in (expected or {}).items()},
    )


def make_record(
    run: OpenRun, rows: CalibrationRows, decided: Plan, done: list[dict[str, Any]], norm_scale: float | None
) -> dict[str, Any]:
    """The contents of secateur.json; `done` are the `block_record`s."""
    stream, groups = run.stream, rows.grouped
    summary = summarize(run, rows, decided)
    found = {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": stream.checkpoint.source,
        "fingerprint": stream.checkpoint.fingerprint,
        "command": command_line(stream.checkpoint.source, run.options),
        "options": asdict(run.options),
        "calibration": {
            "groups": [list(group.shape) for group in groups.groups],
            "rows": [hash_rows(group) for group in groups.groups],
            "weights": list(groups.weights),
            "scores": list(groups.scores or groups.weights),
            "versions": list(groups.versions),
            "begins_with_bos": rows.begins_with_bos,
        },
        "sparsity": {
            "wanted": decided.requested_sparsity,
            "reached": decided.sparsity,
            "note": decided.note,
        },
        "cost": decided.cost,
        "sizes": {name: getattr(summary, name) for name in ("parameters", "bytes", "cache_bytes")},
        "dense": [dict(width) for width in summary.dense],
        "loads": {
            "class": summary.auto_class,
            "format": summary.format,
            "task": "text-generation" if stream.checkpoint.around is None else "image-text-to-text",
            "vllm": summary.vllm_unsupported,
        },
        "final_norm_scale": 1.0 if norm_scale is None else norm_scale,
        "blocks": done,
    }
    first = decided.first_heads
    return found | ({} if first is None else {first.name: first.as_dict()})


def command_line(source: str, options: Options) -> str:
    """The command that makes the model once more; of files it has the names alone, as others read it too."""
    words = ["secateur", "prune", Path(source).name if Path(source).exists() else source, "OUT"]
    known = option_specs(Options)
    for name, value in changed_options(options, known).items():
        words += [
            f"--{cli_name(name)}",
            Path(value).name if known[name].may_name_file and Path(value).exists() else value,
        ]
    return shlex.join(words)


def block_record(dense: Block, decided: Plan, block: FittedBlock) -> dict[str, Any]:
    """What became of one block."""
    return {
        "block": block.index,
        "width": dict(decided.widths[block.index]),
        **{kind: list(units) for kind, units in block.keep.items()},
        "modules": [asdict(report) for report in block.reports],
    }


def dissimilar_experts_note(blocks: Sequence[Block], curves: Iterable[ErrorCurve], decided: Plan) -> str | None:
    """A line where the experts that stay cannot do the work of those that a plan takes, before it is carried out."""
    lost = []
    for curve in curves:
        if curve.axis == EXPERTS and curve.energy and (width := decided.widths.get(curve.block)):
            gone = blocks[curve.block].width[EXPERTS] - width[EXPERTS]
            lost.append(curve.errors[gone] / curve.energy if gone < len(curve.errors) else 1.0)
    if not lost or (share := sum(lost) / len(lost)) < UNLIKE:
        return None
    return (
        f"The experts are little alike: without those that go, mixtures lose {share:.0%} of their outputs' energy "
        "before the refit, and the model will lose much; a smaller size, or heads and channels alone, keep more"
    )


def unfitted_experts_note(done: list[dict[str, Any]]) -> str | None:
    """What is said where experts met too few tokens to be refitted; `done` are the `block_record`s."""
    modules = [module for block in done for module in block["modules"] if module["kind"] == "experts"]
    few, kept = sum(len(module["unfitted"]) for module in modules), sum(module["kept"] for module in modules)
    if not few:
        return None
    most = ", more than half; take more rows, or a text of more kinds" if 2 * few > kept else ""
    return f"{few:,} of {kept:,} experts met fewer than {MIN_TOKENS} tokens and keep their weights{most}"


def _peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most, resident or on the device."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return max(resident, torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else resident
