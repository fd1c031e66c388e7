"""`sizes`: several sizes of one model from one survey, and what each costs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import secateur
from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically
from secateur.base.hashes import hash_rows
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.services import Services
from secateur.commands.draw_rows import draw_rows, resample_rows
from secateur.commands.fit_blocks import fit_blocks
from secateur.commands.open_model import OpenRun, open_model
from secateur.commands.options import Options, RunOptions
from secateur.commands.plan_widths import plan_widths
from secateur.commands.result import summarize
from secateur.commands.resume import check_rows, resumable, retry_in_smaller_batches
from secateur.commands.survey_file import check_survey_file
from secateur.commands.survey_model import survey_model
from secateur.commands.write_model import write_model
from secateur.measure.evaluation import evaluate, scored_rows
from secateur.report.plots import plot_sizes
from secateur.report.summary import ModelSize
from secateur.text.calibration import check_calibration
from secateur.text.draw import CalibrationRows
from secateur.write.record import RECORD, read_record

TABLE, PLOT = "sizes.json", "sizes.png"


def sizes(
    model: str | Path,
    out: Path,
    options: list[Options],
    run_options: RunOptions | None = None,
    *,
    texts: list[str],
    tokens: int | None,
    watcher: Watcher | None = None,
) -> list[ModelSize]:
    """Prune to each size and score it; the dense model comes first in the result.

    Args:
        model: see `prune`.
        out: the folder for the models, `sizes.json` and `sizes.png`; a model in it appears whole or not at all.
        options: one for each size, alike in all that a survey depends on.
        run_options: see `prune`; the survey is kept in `out` where it names no file. With `overwrite`, models that are
            there are replaced; otherwise those that this very call has made are taken as they are. The one that it
            was stopped in goes on where it was: the state stands beside `out`.
        texts: to measure the perplexity of.
        tokens: of each text; all of them by default.

    Raises:
        SecateurError: as `prune` does, before the first model is written.
    """

    def sized(services: Services) -> list[ModelSize]:
        return _sizes(model, out, options, run_options or RunOptions(), texts, tokens, services)

    return retry_in_smaller_batches(Services(watcher=watcher or Silent()), sized)


def _sizes(
    model: str | Path,
    out: Path,
    options: list[Options],
    run_options: RunOptions,
    texts: list[str],
    tokens: int | None,
    services: Services,
) -> list[ModelSize]:
    """Prune to each size and score it; see `sizes`."""
    own, file = run_options.survey is None, run_options.survey or out / "survey.json"
    folders = _folders(out, options, file)
    for text in texts:
        check_calibration(text, length=options[-1].length)
    new = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        source = Path(model) if Path(model).is_dir() else None
        there = [folder for folder in folders if (folder / RECORD).exists() and not run_options.overwrite]
        for folder in folders:
            if folder not in there:
                Output(folder, overwrite=run_options.overwrite, source=source).check()
        last = open_model(model, options[-1], run_options, services=services)
        runs = [last.with_options(one).with_run_options(survey=file) for one in options]
        # All that can be wrong with the rows is found before they are resampled.
        plain = draw_rows(last, resample=False)
        for text in texts:
            with busy_reading(last.watcher, "Reading", text):
                scored_rows(last.stream.checkpoint, last.tokenizer, text, last.options.length, tokens)
        for run, folder in zip(runs, folders, strict=True):
            if folder in there and not _made(run, plain, folder):
                raise SecateurError(
                    f"{folder}: made with other options, weights or another text; add --overwrite to replace it"
                )
    except BaseException:
        if new:
            out.rmdir()
        raise
    # A model in the making goes on as what it was to be: the sizes decide which that is.
    with resumable(last, out, sparsities=[one.sparsity for one in options]) as last:
        check_rows(last, plain)
        runs = [replace(run, stream=last.stream) for run in runs]
        results = _pruned(last, runs, plain, folders, there, file if own else None)
    # A plot of other models would be taken for one of these.
    (out / PLOT).unlink(missing_ok=True)
    if texts:
        results = [replace(one, perplexity=_score(one.folder, texts, tokens, last)) for one in results]
        _keep(results, out)
        scored = {text: [one.perplexity[text] for one in results] for text in results[0].perplexity}
        plot_sizes([one.parameters for one in results], scored, out / PLOT)
    return results


def _pruned(
    last: OpenRun,
    runs: list[OpenRun],
    plain: CalibrationRows,
    folders: list[Path],
    there: list[Path],
    own: Path | None,
) -> list[ModelSize]:
    """The dense model and a model of each size, from one survey.

    Args:
        last: the run of the last size, which stands for what all have in common.
        runs: one for each size.
        plain: the rows, before they are resampled.
        folders: one for each size.
        there: those of them that are made already.
        own: the file of the survey, where a person named none.
    """
    rows = resample_rows(last, plain)
    weighing = next((run for run in runs if run.request.needs_survey), last)
    if own:
        # What this command put there is its own to replace.
        try:
            check_survey_file(weighing, rows.selection)
        except SecateurError:
            own.unlink()
    found = survey_model(weighing, rows)
    plans = [plan_widths(run, rows, found) for run in runs]
    results: list[ModelSize] = []
    for run, decided, folder in zip(runs, plans, folders, strict=True):
        if folder in there:
            run.watcher.note(f"{folder}: made already")
            summary = summarize(run, rows, decided)
        else:
            run.watcher.note(f"{folder}: {decided.note or f'{decided.sparsity:.1%} goes'}")
            run = run.timed_from_now()
            summary = write_model(run, rows, decided, fit_blocks(run, rows, decided), folder)
        if not results:
            results.append(ModelSize(last.stream.checkpoint.source, 0.0, summary.parameters[0], summary.bytes[0], {}))
        results.append(ModelSize(str(folder), decided.sparsity, summary.parameters[1], summary.bytes[1], {}))
        _keep(results, folders[0].parent)
    return results


def _folders(out: Path, options: list[Options], survey_file: Path) -> list[Path]:
    """The folder of each size."""
    if out.exists() and not out.is_dir():
        raise SecateurError(f"{out}: a file is there; name a folder")
    if not out.absolute().parent.is_dir():
        raise SecateurError(f"{out}: the folder {out.absolute().parent} does not exist; create it first")
    folders = [out / f"sparsity-{one.sparsity:g}" for one in options]
    if len(set(folders)) < len(folders):
        raise SecateurError(
            f"{', '.join(folder.name for folder in folders)}: two sizes would have one name; leave one of them out"
        )
    if survey_file.absolute() in {(out / name).absolute() for name in (TABLE, PLOT)}:
        raise SecateurError(f"{survey_file}: that is where the table and the plot go; name the survey otherwise")
    return folders


def _made(run: OpenRun, rows: CalibrationRows, folder: Path) -> bool:
    """Whether a folder is what a run of this version would give; rows decide their copies."""
    try:
        record = read_record(folder)
        same = {
            "secateur": secateur.__version__,
            "fingerprint": run.stream.checkpoint.fingerprint,
            "options": json.loads(json.dumps(asdict(run.options))),
        }
        return record.items() >= same.items() and record["calibration"]["rows"][0] == hash_rows(rows.fit)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _keep(results: list[ModelSize], out: Path) -> None:
    write_atomically(out / TABLE, json.dumps([asdict(one) for one in results], indent=2) + "\n")


def _score(folder: str, texts: list[str], tokens: int | None, run: OpenRun) -> dict[str, float]:
    """Perplexity of each text, in rows as long as those of the calibration."""
    result = evaluate(
        folder,
        texts=texts,
        length=run.options.length,
        tokens=tokens,
        device=str(run.stream.device),
        trust_remote_code=run.stream.checkpoint.trust_remote_code,
        watcher=run.watcher,
    )
    return {source: text.perplexity for source, text in result.models[0].texts.items()}
