"""`prune`: all the steps in order, from a checkpoint on disk to a smaller one beside it."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.commands.dry_run import backward, fits, fitting_level1, speed, surveying, writing
from secateur.commands.open import Job, open_job
from secateur.commands.options import Options
from secateur.criteria import NEEDS_GRADIENTS
from secateur.fit.average import FittedBlock
from secateur.fit.temper import scaled
from secateur.model.activations import Activations
from secateur.model.stream import BlockStream
from secateur.plan.decide import decide, measured, surveyed
from secateur.plan.meters import byte_meter
from secateur.plan.plan import Plan, plan
from secateur.report.summary import Summary, peak_memory, record, summarise, timings
from secateur.write.export import export
from secateur.write.slice import slice
from secateur.write.write import write


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
    survey_file: Path | None = None,
    save_calibration: Path | None = None,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Summary:
    """Prune a model in one shot and write the smaller one.

    Args:
        model: a folder, a .gguf file or a hub id.
        out: the folder, or the .gguf file, to write; it appears whole or not at all.
        options: what to do; or give any of its fields by name (`sparsity=0.25`, `criterion="wanda"`, ...).
        device: where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        revision: of a hub id.
        trust_remote_code: let the checkpoint's own code run.
        dry_run: say what would come out and what it would take, and stop.
        overwrite: replace a model that is at `out`.
        survey_file: where the survey is kept: read if it is there, written otherwise.
        save_calibration: a new .jsonl file for the rows that the model writes, to calibrate on again.
        watcher: told about progress.

    Raises:
        SecateurError: for anything wrong with the input or the request, before anything is written.
    """
    start = time.perf_counter()
    options = options or Options(**settings)
    watcher = watcher or Silent()
    if dry_run and options.searches:
        raise SecateurError("the size for a target of perplexity is found by pruning; leave out --dry-run")
    if dry_run and options.choice.settles:
        raise SecateurError("how many heads are similar is found by running the model; leave out --dry-run")
    job = open_job(
        model,
        options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        out=Path(out),
        overwrite=overwrite,
        survey_file=survey_file,
        save_calibration=save_calibration,
        dry=dry_run,
        watcher=watcher,
    )
    if dry_run:
        return _expected(job, watcher, survey_file)
    return carry_out(job, Path(out), survey_file=survey_file, overwrite=overwrite, start=start, watcher=watcher)


def carry_out(
    job: Job, out: Path, *, survey_file: Path | None, overwrite: bool, start: float, watcher: Watcher
) -> Summary:
    """All that `prune` does with an open job."""
    job = replace(job, request=measured(job.request, job.text, watcher))
    found = surveyed(job.request, job.text, watcher, survey_file, job.drawn.sigma)
    job = job.with_more(watcher)
    decided = decide(job.request, found, lambda one: job.loss(one, watcher))
    watcher.note(_choice(job.stream, decided))
    return finish(job, decided, out, overwrite=overwrite, start=start, watcher=watcher)


def finish(job: Job, decided: Plan, out: Path, *, overwrite: bool, start: float, watcher: Watcher) -> Summary:
    """Carry a plan out and write the result."""
    stream, dtype, rows = job.stream, job.dtype, job.rows
    done: list[FittedBlock] = []
    scales: list[float] = []

    def judge(dense: Activations, pruned: Activations) -> None:
        scales.append(job.scale(rows, dense, pruned))

    def sliced() -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        for block in job.refit(decided, rows, watcher, judge if len(job.unseen) else None):
            done.append(FittedBlock(block.index, block.keep, {}, block.reports))
            yield block.index, slice(stream, block, dtype=dtype)

    def norm() -> dict[str, Tensor]:
        return scaled(stream, scales[0]) if scales else {}

    def summary() -> Summary:
        return summary_of(job, decided, time.perf_counter() - start, peak_memory(stream.device))

    similar = job.request.similar
    records = {
        "secateur.json": lambda: (
            record(stream, job.options, decided, done, rows, job.bos, *scales)
            | ({"similarity": similar.as_dict()} if similar else {})
        ),
        "timings.json": lambda: timings(summary()),
    }
    file = job.options.format == "gguf"
    folder = out.with_name(f".{out.name}.folder-{secrets.token_hex(4)}") if file else out
    try:
        # Closed at once where writing fails: temporary files go, and no bar is drawn after the error.
        with closing(sliced()) as blocks:
            write(
                stream,
                folder,
                decided,
                blocks,
                format=job.request.format,
                dtype=dtype,
                overwrite=overwrite and not file,
                records=records,
                late=norm,
            )
        if file:
            export(folder, out, format="gguf", type=job.options.type, overwrite=overwrite, watcher=watcher)
    finally:
        if file:
            shutil.rmtree(folder, ignore_errors=True)
    return summary()


def _expected(job: Job, watcher: Watcher, survey_file: Path | None) -> Summary:
    """What would come out and what it would take."""
    if job.request.weighs:
        watcher.note("Shown is a plan by size alone; a run measures where cuts cost least")
    wish = job.request.wish
    decided = job.request.given if wish is None else plan(wish, job.options.widths)
    assert decided is not None
    # As many rows as a run has; what is in them changes nothing here.
    job = replace(job, more=job.fitted.repeat(job.options.fits_more, 1, 1))
    with watcher.busy("Measuring this machine"):
        rate = speed(job.stream)
        parts = [fits(job.stream, job.rows, rate), writing(job.stream, job.options, job.drawn, job.more)]
        if job.method.recovery.fits_level1:
            parts.append(fitting_level1(job.stream, job.rows, job.options.level1, rate))
    if job.request.weighs and not (survey_file and survey_file.exists()):
        parts.append(surveying(job.request, job.text, rate))
    if job.options.choice.uses(NEEDS_GRADIENTS) and not decided.keeps:
        parts.append(backward(job.stream, job.rows, rate))
    seconds, peaks = zip(*parts, strict=True)
    return summary_of(job, decided, sum(seconds), max(peaks), dry=True)


def summary_of(job: Job, decided: Plan, seconds: float, peak: int, *, dry: bool = False) -> Summary:
    """What a plan comes to, in figures."""
    gguf_type = job.options.type if job.options.format == "gguf" else None
    return summarise(
        job.stream,
        decided,
        job.rows,
        format="gguf" if gguf_type else job.request.format,
        parameters=job.request.parameters,
        taken=byte_meter(job.stream, job.dtype, gguf_type, job.options.adds_biases),
        dtype=job.dtype,
        bos=job.bos,
        seconds=seconds,
        peak_bytes=peak,
        dry=dry,
    )


def _choice(stream: BlockStream, decided: Plan) -> str:
    """Which widths were chosen, in one line."""
    dense = [stream.blocks[index].width for index in decided.widths]
    price = "" if decided.price is None else f", expected to cost {decided.price:.2f} nats per token, module by module"
    if decided.uniform:
        width = next(iter(decided.widths.values()))
        what = (
            f"{width.heads} of {dense[0].heads} query heads in {width.groups} of {dense[0].groups} groups, "
            f"{width.channels:,} of {dense[0].channels:,} channels in every block"
        )
    else:
        kept = list(decided.widths.values())
        what = (
            f"{sum(w.heads for w in kept)} of {sum(w.heads for w in dense)} query heads and "
            f"{sum(w.channels for w in kept):,} of {sum(w.channels for w in dense):,} channels, "
            f"{min(w.channels for w in kept):,} to {max(w.channels for w in kept):,} a block"
        )
    return f"Keeping {what}: {decided.sparsity:.1%} goes{price}"
