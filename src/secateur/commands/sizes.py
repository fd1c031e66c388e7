"""`secateur sizes`: several sizes of one model from one survey, and what each costs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import secateur
from secateur.base.digests import hash_of
from secateur.base.errors import SecateurError
from secateur.base.json_text import parse_json
from secateur.base.progress import Watcher, reading
from secateur.base.whole_file import write_whole
from secateur.commands.open import Job, open_job
from secateur.commands.options import Options
from secateur.commands.prune import finish, summary_of
from secateur.measure.compare import evaluate, scored_rows
from secateur.plan.decide import check_survey, decide, request, surveyed
from secateur.report.plots import plot_sizes
from secateur.text.calibration import check_calibration
from secateur.write.writer import OutputFolder

TABLE, PLOT = "sizes.json", "sizes.png"


@dataclass(frozen=True)
class Size:
    """One model."""

    folder: str
    sparsity: float
    parameters: int
    bytes: int
    perplexity: dict[str, float]
    """By text."""


def sizes(
    model: str | Path,
    out: Path,
    options: list[Options],
    *,
    texts: list[str],
    tokens: int | None,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    survey_file: Path | None,
    overwrite: bool,
    watcher: Watcher,
) -> list[Size]:
    """Prune to each size and score it; the dense model comes first in the result.

    Args:
        model: see `prune`.
        out: the folder for the models, `sizes.json` and `sizes.png`; a model in it appears whole or not at all.
        options: one for each size, alike in all that a survey depends on.
        texts: to measure the perplexity of.
        tokens: of each text; all of them by default.
        device: see `prune`.
        revision: see `prune`.
        trust_remote_code: see `prune`.
        survey_file: where the survey is kept; by default in `out`.
        overwrite: replace models that are there. Those that this very call has made are taken as they are otherwise, so
            that it goes on where it was stopped.
        watcher: told about progress.

    Raises:
        SecateurError: as `prune` does, before the first model is written.
    """
    own = survey_file is None
    survey_file = survey_file or out / "survey.json"
    folders = _folders(out, options, survey_file, overwrite)
    for text in texts:
        check_calibration(text, length=options[-1].length)
    new = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        source = Path(model) if Path(model).is_dir() else None
        for folder in folders:
            if overwrite or not folder.exists():
                OutputFolder(folder, overwrite=overwrite, source=source).check()
        job = open_job(
            model,
            options[-1],
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            survey_file=None if own else survey_file,
            watcher=watcher,
        )
        jobs = [replace(job, options=one, request=request(job.stream, one, job.dtype, watcher)) for one in options]
        tokenizer = job.stream.checkpoint.tokenizer() if texts else None
        for text in texts:
            with reading(watcher, "Reading", text):
                scored_rows(job.stream.checkpoint, tokenizer, text, job.options.length, tokens)
    except BaseException:
        if new:
            out.rmdir()
        raise
    more = job.with_more(watcher).more
    jobs = [replace(one, more=more) for one in jobs]
    there = [folder for folder in folders if folder.exists() and not overwrite]
    for one, folder in zip(jobs, folders, strict=True):
        if folder in there and not _made_from(one, folder):
            raise SecateurError(f"{folder}: of other weights or another text; add --overwrite to replace it")
    weighing = next((one for one in jobs if one.request.weighs), job)
    if own:
        # What this command put there is its own to replace.
        try:
            check_survey(weighing.request, job.text, survey_file)
        except SecateurError:
            survey_file.unlink()
    found = surveyed(weighing.request, job.text, watcher, survey_file)
    plans = [decide(one.request, found) for one in jobs]
    results: list[Size] = []
    for one, decided, folder in zip(jobs, plans, folders, strict=True):
        if folder in there:
            watcher.note(f"{folder}: made already")
            summary = summary_of(one, decided, 0.0, 0)
        else:
            watcher.note(f"{folder}: {decided.note or f'{decided.sparsity:.1%} goes'}")
            summary = finish(one, decided, folder, overwrite=overwrite, start=time.perf_counter(), watcher=watcher)
        if not results:
            results.append(Size(str(model), 0.0, summary.parameters[0], summary.bytes[0], {}))
        results.append(Size(str(folder), decided.sparsity, summary.parameters[1], summary.bytes[1], {}))
        _keep(results, out)
    # A plot of other models would be taken for one of these.
    (out / PLOT).unlink(missing_ok=True)
    if texts:
        results = [replace(one, perplexity=_score(one.folder, texts, tokens, job, watcher)) for one in results]
        _keep(results, out)
        scored = {text: [one.perplexity[text] for one in results] for text in results[0].perplexity}
        plot_sizes([one.parameters for one in results], scored, out / PLOT)
    return results


def _folders(out: Path, options: list[Options], survey_file: Path, overwrite: bool) -> list[Path]:
    """Where each size goes, if nothing else is there."""
    if out.exists() and not out.is_dir():
        raise SecateurError(f"{out}: a file is there; name a folder")
    folders = [out / f"sparsity-{one.sparsity:g}" for one in options]
    for folder, one in zip(folders, options, strict=True):
        if folder.exists() and not overwrite and _made(folder, one) is None:
            raise SecateurError(f"{folder}: exists already; add --overwrite to replace it")
    if not out.absolute().parent.is_dir():
        raise SecateurError(f"{out}: the folder {out.absolute().parent} does not exist; create it first")
    if len(set(folders)) < len(folders):
        raise SecateurError(
            f"{', '.join(folder.name for folder in folders)}: two sizes would have one name; leave one of them out"
        )
    if survey_file.absolute() in {(out / name).absolute() for name in (TABLE, PLOT)}:
        raise SecateurError(f"{survey_file}: that is where the table and the plot go; name the survey otherwise")
    return folders


def _made(folder: Path, options: Options) -> dict[str, Any] | None:
    """The record of a model that was made with these options by this version; None if there is none."""
    try:
        record = parse_json((folder / "secateur.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = {"secateur": secateur.__version__, "options": json.loads(json.dumps(asdict(options)))}
    return record if isinstance(record, dict) and record.items() >= same.items() else None


def _made_from(job: Job, folder: Path) -> bool:
    """Whether a folder is what a job would give."""
    record, rows = _made(folder, job.options), [hash_of(group) for group in job.rows.groups]
    weights = job.stream.checkpoint.fingerprint
    return record is not None and record.get("fingerprint") == weights and record["calibration"].get("rows") == rows


def _keep(results: list[Size], out: Path) -> None:
    write_whole(out / TABLE, json.dumps([asdict(one) for one in results], indent=2) + "\n")


def _score(folder: str, texts: list[str], tokens: int | None, job: Any, watcher: Watcher) -> dict[str, float]:
    """Perplexity of each text, in rows as long as those of the calibration."""
    result = evaluate(
        folder,
        texts=texts,
        length=job.options.length,
        tokens=tokens,
        device=str(job.stream.device),
        trust_remote_code=job.stream.checkpoint.trust_remote_code,
        watcher=watcher,
    )
    return {text.source: text.perplexity for text in result.models[0].texts}
