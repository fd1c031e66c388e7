"""What came of a run: the figures for the table, and the record of what was kept where and why."""

from __future__ import annotations

import platform
import resource
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

import secateur
from secateur.activations import Rows
from secateur.costs import floor_flops, memory_bytes, product_rate
from secateur.families import head_dim
from secateur.options import Options
from secateur.steps.plan import Plan
from secateur.steps.refit import FittedBlock
from secateur.stream import BlockStream
from secateur.structure import Width


@dataclass(frozen=True)
class Summary:
    """Before and after; what the command prints as its table."""

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    """Of the weights, both at the output's dtype."""
    cache_bytes: tuple[int, int]
    """Keys and values of one token in all blocks, at the output's dtype."""
    dense: Width
    width: Width
    blocks: int
    sparsity: float
    of: str
    note: str | None
    bos: bool
    tokens: int
    seconds: float
    peak_bytes: int
    """Peak resident memory of the process; on a dry run the expected peak above the libraries' own."""
    dry: bool


def parameters(stream: BlockStream) -> int:
    """Parameters of the whole model as stored: tied ones once."""
    checkpoint = stream.checkpoint
    return sum(info.entries for name, info in checkpoint.tensors.items() if name not in checkpoint.ignorable)


def summarise(
    stream: BlockStream,
    decided: Plan,
    dtype: torch.dtype,
    bos: bool,
    rows: Rows,
    seconds: float,
    dry: bool = False,
) -> Summary:
    """Count sizes before and after; on a dry run, also estimate time and memory."""
    block, width = stream.blocks[min(decided.widths)], decided.widths[min(decided.widths)]
    before = parameters(stream)
    after = before - sum(
        stream.blocks[i].parameters - stream.blocks[i].kept_parameters(w) for i, w in decided.widths.items()
    )
    entry = 2 * head_dim(stream.checkpoint.config) * dtype.itemsize
    dense_cache = sum(b.attention.groups for b in stream.blocks) * entry
    less = sum(block.attention.groups - w.groups for w in decided.widths.values()) * entry
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    hidden = stream.checkpoint.config.hidden_size
    if dry:
        seconds = 1.5 * floor_flops(stream.blocks, hidden, rows.tokens) / product_rate(stream.device)
        peak = memory_bytes(stream.blocks, hidden, rows.tokens)
    elif stream.device.type == "cuda":
        peak = max(peak, torch.cuda.max_memory_allocated(stream.device))
    return Summary(
        parameters=(before, after),
        bytes=(before * dtype.itemsize, after * dtype.itemsize),
        cache_bytes=(dense_cache, dense_cache - less),
        dense=block.width,
        width=width,
        blocks=len(decided.widths),
        sparsity=decided.sparsity,
        of=decided.of,
        note=decided.note,
        bos=bos,
        tokens=rows.groups[0].numel(),
        seconds=seconds,
        peak_bytes=peak,
        dry=dry,
    )


def timings(summary: Summary) -> dict[str, float]:
    """What differs from run to run: timings.json."""
    return {"seconds": summary.seconds, "peak_bytes": summary.peak_bytes}


def record(
    stream: BlockStream, options: Options, decided: Plan, done: list[FittedBlock], rows: Rows, bos: bool
) -> dict[str, Any]:
    """What was kept where and why: secateur.json."""
    dense = stream.blocks[min(decided.widths)].width
    return {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": stream.checkpoint.source,
        "options": asdict(options),
        "calibration": {
            "groups": [list(group.shape) for group in rows.groups],
            "weights": list(rows.weights),
            "begins_with_bos": bos,
        },
        "sparsity": {
            "of": decided.of,
            "wanted": decided.wanted,
            "reached": decided.sparsity,
            "note": decided.note,
        },
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
    }
