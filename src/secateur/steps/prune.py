"""`prune`: all the steps in order, from a checkpoint on disk to a smaller one beside it."""

from __future__ import annotations

import platform
import resource
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import secateur
from secateur.activations import Rows
from secateur.calibration import calibration_rows, check_calibration
from secateur.checkpoint import open_checkpoint
from secateur.costs import floor_flops, memory_bytes, product_rate
from secateur.errors import SecateurError
from secateur.families import head_dim
from secateur.formats.writer import OutputFolder
from secateur.options import Options
from secateur.progress import Silent, Watcher, reading
from secateur.recovery import Recovery
from secateur.steps.plan import Plan, candidates, plan
from secateur.steps.refit import FittedBlock, Method, refit
from secateur.steps.slice import slice
from secateur.steps.survey import survey
from secateur.steps.write import obstacle, output_folder, write
from secateur.stream import BlockStream
from secateur.structure import Width
from secateur.tokens import begins_with_bos

SURVEY_SHARE = 4
"""One calibration row in so many is enough to weigh heads against channels."""


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


def prune(
    model: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Summary:
    """Prune a model in one shot and write the smaller one.

    Args:
        model: a folder, a .gguf file or a hub id.
        out: the folder to write; it appears whole or not at all.
        options: what to do; or give any of its fields by name (`sparsity=0.25`, `criterion="wanda"`, ...).
        device: where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        revision: of a hub id.
        trust_remote_code: let the checkpoint's own code run.
        dry_run: say what would come out and what it would take, and stop.
        overwrite: replace a model folder at `out`.
        watcher: told about progress.

    Raises:
        SecateurError: for anything wrong with the input or the request, before anything is written.
    """
    start = time.perf_counter()
    options = options or Options(**settings)
    watcher = watcher or Silent()
    where = pick_device(device)
    check_calibration(options.calibration, samples=options.samples, length=options.length)
    # Once more with the sizes below; here before anything is downloaded or dequantised.
    OutputFolder(out, overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None).check()
    wanted_dtype = getattr(torch, options.dtype) if options.dtype else None
    with reading(watcher, "Opening", str(model)):
        checkpoint = open_checkpoint(
            model, revision=revision, trust_remote_code=trust_remote_code, dtype=wanted_dtype or torch.bfloat16
        )
        dtype = wanted_dtype or checkpoint.dtype
        stream = BlockStream(checkpoint, device=where)
    chosen = options.chosen_blocks(len(stream))
    output_folder(stream, out, None, overwrite=overwrite, dtype=dtype).check()

    wishes: dict[str, Any] = {
        "sparsity": options.sparsity,
        "chosen": chosen,
        "of": options.of,
        "kinds": options.modules,
        "multiple": options.multiple,
        "model_parameters": parameters(stream),
        "obstacle": lambda width: obstacle(stream, chosen, width, intercept=options.intercept),
    }
    possible = candidates(stream.blocks, **wishes)
    with reading(watcher, "Reading", options.calibration):
        tokenizer, text = _calibrate(stream, options)
    bos = begins_with_bos(tokenizer)
    rows = Rows.of(text) if bos else Rows.of(text).with_openings()
    watcher.note(
        f"Opened {checkpoint.source}: {checkpoint.config.model_type}, {len(stream)} blocks, "
        f"{wishes['model_parameters'] / 1e6:,.1f} M parameters, {str(checkpoint.dtype).removeprefix('torch.')}"
    )
    watcher.note(
        f"Calibrating on {options.samples} rows of {options.length} tokens, computing on {where}; "
        f"the output is {str(dtype).removeprefix('torch.')}"
    )
    if dry_run:
        if len(possible) > 1:
            watcher.note(f"Shown is the first of {len(possible)} splits between heads and channels; a run weighs them")
        with watcher.busy("Measuring this machine"):
            return _summary(stream, possible[0], dtype, bos, rows, time.perf_counter() - start, dry=True)

    found = None
    if len(possible) > 1:
        few = text[: max(1, len(text) // SURVEY_SHARE)]
        found = survey(
            stream,
            few,
            blocks=chosen,
            least=_least(possible),
            kinds=options.modules,
            criterion=options.criterion,
            ridge=options.ridge,
            seed=options.seed,
            watcher=watcher,
        )
    decided = plan(stream.blocks, survey=found, **wishes)
    watcher.note(_choice(stream.blocks[chosen.start].width, decided, len(possible)))
    method = Method(
        options.criterion,
        Recovery(options.recovery, options.recover, options.ridge, options.intercept),
        options.seed,
    )
    done: list[FittedBlock] = []

    def sliced() -> Any:
        for block in refit(stream, decided, rows, method=method, dtype=dtype, watcher=watcher):
            done.append(FittedBlock(block.index, block.keep, {}, block.reports))
            yield block.index, slice(stream, block, dtype=dtype)

    def summary() -> Summary:
        return _summary(stream, decided, dtype, bos, rows, time.perf_counter() - start)

    records = {
        "secateur.json": lambda: _record(stream, options, decided, done, rows, bos),
        "timings.json": lambda: {"seconds": summary().seconds, "peak_bytes": summary().peak_bytes},
    }
    # Closed at once where writing fails: temporary files go, and no bar is drawn after the error.
    with closing(sliced()) as blocks:
        write(stream, out, decided, blocks, dtype=dtype, overwrite=overwrite, records=records)
    return summary()


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` takes a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SecateurError(f"device '{name}' is not available here; use --device auto or cpu") from error
    if device.type == "meta":
        raise SecateurError("device 'meta' computes nothing; use --device auto or cpu")
    return device


def parameters(stream: BlockStream) -> int:
    """Parameters of the whole model as stored: tied ones once."""
    checkpoint = stream.checkpoint
    total = 0
    for name, info in checkpoint.tensors.items():
        if name not in checkpoint.ignorable:
            count = 1
            for extent in info.shape:
                count *= extent
            total += count
    return total


def _least(plans: list[Plan]) -> Width:
    """The narrowest width of all plans, each way of counting taken alone."""
    widths = [width for option in plans for width in option.widths.values()]
    return Width(*(min(getattr(w, name) for w in widths) for name in ("groups", "per_group", "channels")))


def _calibrate(stream: BlockStream, options: Options) -> tuple[Any, Tensor]:
    config = stream.checkpoint.config
    tokenizer = stream.checkpoint.tokenizer()
    rows = calibration_rows(
        tokenizer,
        options.calibration,
        samples=options.samples,
        length=options.length,
        seed=options.seed,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
    return tokenizer, rows


def _choice(dense: Width, decided: Plan, count: int) -> str:
    """Which width was chosen and why, in one line."""
    width = next(iter(decided.widths.values()))
    why = f"the least error of {count} splits between heads and channels" if count > 1 else "the nearest to the target"
    return (
        f"Keeping {width.heads} of {dense.heads} query heads in {width.groups} of {dense.groups} groups, "
        f"{width.channels:,} of {dense.channels:,} channels: {why}, {decided.sparsity:.1%} goes"
    )


def _summary(
    stream: BlockStream,
    decided: Plan,
    dtype: torch.dtype,
    bos: bool,
    rows: Rows,
    seconds: float,
    dry: bool = False,
) -> Summary:
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


def _record(
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
