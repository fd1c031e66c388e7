"""`prune`: all the steps in order, from a checkpoint on disk to a smaller one beside it."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.activations import Rows
from secateur.calibration import calibration_rows, check_calibration
from secateur.checkpoint import open_checkpoint
from secateur.device import pick_device
from secateur.formats.writer import OutputFolder
from secateur.options import Options
from secateur.progress import Silent, Watcher, reading
from secateur.recovery import Recovery
from secateur.steps.plan import Plan, candidates, plan
from secateur.steps.refit import FittedBlock, Method, refit
from secateur.steps.slice import slice
from secateur.steps.summary import Summary, parameters, record, summarise, timings
from secateur.steps.survey import survey
from secateur.steps.write import obstacle, output_folder, write
from secateur.stream import BlockStream
from secateur.structure import Width
from secateur.tokens import begins_with_bos

SURVEY_SHARE = 4
"""One calibration row in so many is enough to weigh heads against channels."""


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
            return summarise(stream, possible[0], dtype, bos, rows, time.perf_counter() - start, dry=True)

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
        return summarise(stream, decided, dtype, bos, rows, time.perf_counter() - start)

    records = {
        "secateur.json": lambda: record(stream, options, decided, done, rows, bos),
        "timings.json": lambda: timings(summary()),
    }
    # Closed at once where writing fails: temporary files go, and no bar is drawn after the error.
    with closing(sliced()) as blocks:
        write(stream, out, decided, blocks, dtype=dtype, overwrite=overwrite, records=records)
    return summary()


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
