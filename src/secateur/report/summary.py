"""What came of a run: the figures for the table, and the record of what was kept where and why."""

from __future__ import annotations

import platform
import resource
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

import secateur
from secateur.base.files import hash_of
from secateur.fit.average import FittedBlock
from secateur.formats.vllm import vllm_obstacle
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Width
from secateur.plan.meters import Meter, cache_meter
from secateur.plan.problem import Plan


@dataclass(frozen=True)
class Summary:
    """Before and after; what the command prints as its table."""

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    """Of the weights, both in the output's format and type."""
    cache_bytes: tuple[int, int]
    """Keys and values of one token in all blocks, at the output's dtype."""
    dense: tuple[Width, ...]
    """The dense width of every block."""
    widths: dict[int, Width]
    """The width of every pruned block."""
    format: str
    sparsity: float
    of: str
    note: str | None
    vllm: str | None
    """Why vLLM does not serve it; None where it does, or where it is no folder."""
    bos: bool
    tokens: int
    seconds: float
    peak_bytes: int
    """Peak resident memory of the process; on a dry run the expected peak above the libraries' own."""
    dry: bool

    @property
    def uniform(self) -> bool:
        """Whether the pruned blocks have one width."""
        return len(set(self.widths.values())) == 1

    def now(self) -> list[Width]:
        """The width of every block after pruning."""
        return [self.widths.get(index, dense) for index, dense in enumerate(self.dense)]


def summarise(
    stream: BlockStream,
    decided: Plan,
    rows: Rows,
    *,
    format: str,
    parameters: Meter,
    taken: Meter,
    dtype: torch.dtype,
    bos: bool,
    seconds: float,
    peak_bytes: int,
    dry: bool = False,
) -> Summary:
    """Count sizes before and after.

    `parameters` and `taken`, which counts bytes, measure it; all that follow are only handed on.
    """
    cached = cache_meter(stream, dtype)

    def before_and_after(meter: Meter) -> tuple[int, int]:
        return round(meter.dense), round(meter.total(decided.widths))

    every = [decided.widths.get(index, block.width) for index, block in enumerate(stream.blocks)]
    return Summary(
        parameters=before_and_after(parameters),
        bytes=before_and_after(taken),
        cache_bytes=before_and_after(cached),
        dense=tuple(block.width for block in stream.blocks),
        widths=decided.widths,
        format=format,
        sparsity=decided.sparsity,
        of=decided.of,
        note=decided.note,
        vllm=None if format == "gguf" else vllm_obstacle(stream.checkpoint.config, every, per_layer=format == "hf"),
        bos=bos,
        tokens=rows.groups[0].numel(),
        seconds=seconds,
        peak_bytes=peak_bytes,
        dry=dry,
    )


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most, resident or on the device."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return max(resident, torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else resident


def timings(summary: Summary) -> dict[str, float]:
    """What differs from run to run: timings.json."""
    return {"seconds": summary.seconds, "peak_bytes": summary.peak_bytes}


def record(
    stream: BlockStream,
    options: dict[str, Any],
    decided: Plan,
    done: list[FittedBlock],
    rows: Rows,
    bos: bool,
    norm_scale: float | None = None,
) -> dict[str, Any]:
    """What was kept where and why: secateur.json."""
    dense = stream.blocks[min(decided.widths)].width
    return {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": stream.checkpoint.source,
        "fingerprint": stream.checkpoint.fingerprint,
        "options": options,
        "calibration": {
            "groups": [list(group.shape) for group in rows.groups],
            "rows": [hash_of(group) for group in rows.groups],
            "weights": list(rows.weights),
            "scores": list(rows.scores or rows.weights),
            "versions": list(rows.versions),
            "begins_with_bos": bos,
        },
        "sparsity": {
            "of": decided.of,
            "wanted": decided.wanted,
            "reached": decided.sparsity,
            "note": decided.note,
        },
        "price": decided.price,
        "final_norm_scale": 1.0 if norm_scale is None else norm_scale,
        "dense_width": asdict(dense),
        "blocks": [
            {
                "block": block.index,
                "width": asdict(decided.widths[block.index]),
                "heads": list(block.keep.heads),
                "channels": list(block.keep.channels),
                "modules": [asdict(report) for report in block.reports],
            }
            for block in done
        ],
    } | ({"similarity": decided.similar.as_dict()} if decided.similar else {})
