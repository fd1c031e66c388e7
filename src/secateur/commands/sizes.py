"""`sizes`: prune one model to several sizes from one survey, and measure what each size costs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import secateur
from secateur.base.errors import SecateurError
from secateur.base.files import existing_path, write_atomically
from secateur.base.hashes import hash_rows
from secateur.base.output import Output, json_kind
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.services import Services
from secateur.measure.evaluation import evaluate, scored_rows
from secateur.report.plots import plot_sizes
from secateur.report.summary import ModelSize
from secateur.steps.draw_rows import draw_rows, resample_rows
from secateur.steps.fit_blocks import fit_blocks
from secateur.steps.open_model import OpenRun, open_model
from secateur.steps.options import Options, RunOptions
from secateur.steps.plan_widths import plan_widths
from secateur.steps.result import summarize
from secateur.steps.resume import check_rows, resumable, retry_in_smaller_batches
from secateur.steps.survey_model import check_survey_file, survey_model
from secateur.steps.write_model import write_model
from secateur.survey.curves import is_survey
from secateur.text.calibration import check_calibration
from secateur.text.draw import CalibrationRows
from secateur.write.record import RECORD, read_record

TABLE, PLOT, SURVEY = "sizes.json", "sizes.png", "survey.json"
TABLE_KIND = json_kind("a table that secateur sizes wrote", lambda found: "sparsity" in found[0], TABLE)
SURVEY_KIND = json_kind("a survey by secateur", is_survey, SURVEY)


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
    """Prune a model to several sizes, and measure the perplexity of each.

    A stopped run leaves its state next to `out`; the same call resumes it and keeps the models that it finished.

    Args:
        model: A folder, a .gguf file or a Hugging Face Hub id.
        out: Folder for the models, `sizes.json` and `sizes.png`.
        options: One object for each size, which differ only in `sparsity`.
        run_options: Options that do not change the result. The survey is kept in `out` unless they name a file.
            With `overwrite`, existing models are replaced; without it, an existing model is kept if the same options
            made it, and refused otherwise.
        texts: Texts to measure the perplexity on.
        tokens: Number of tokens of each text to measure on; all of them by default.
        watcher: Receives progress and notes.

    Returns:
        The figures of the dense model, then the figures of each size.

    Raises:
        SecateurError: The model or an option is wrong. Such errors are raised before the first model is written.
    """
    run_options = run_options or RunOptions()
    survey_file = run_options.survey or out / SURVEY
    folders = _folders(out, options, survey_file)

    def run_all(services: Services) -> list[ModelSize]:
        with _folder_unless_error(out):
            for text in texts:
                check_calibration(text, length=options[-1].length)
            finished = _finished(folders, model, run_options)
            last = open_model(model, options[-1], run_options, services=services)
            with_survey = replace(last, run_options=replace(run_options, survey=survey_file))
            runs = [with_survey.with_options(one) for one in options]
            # Drawn without resampling, so that every error in the rows is found before that long step.
            rows = draw_rows(last, resample=False)
            for text in texts:
                with busy_reading(last.watcher, "Reading", text):
                    scored_rows(last.stream.checkpoint, last.tokenizer, text, last.options.length, tokens)
            _check_finished(runs, rows, folders, finished)
        # The sizes decide which model an unfinished output belongs to.
        with resumable(last, out, "sizes", sparsities=[one.sparsity for one in options]) as last:
            check_rows(last, rows)
            runs = [replace(run, stream=last.stream) for run in runs]
            own_survey = survey_file if run_options.survey is None else None
            results = _prune_all(runs, rows, folders, finished, own_survey)
        # A plot from an earlier call would be taken for a plot of these models.
        (out / PLOT).unlink(missing_ok=True)
        return _scored(results, out, texts, tokens, last) if texts else results

    return retry_in_smaller_batches(Services(watcher=watcher or Silent()), run_all)


@contextmanager
def _folder_unless_error(out: Path) -> Iterator[None]:
    """Create a folder, and remove it again after an error."""
    is_new = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            out.rmdir()
        raise


def _folders(out: Path, options: list[Options], survey_file: Path) -> list[Path]:
    """Return the folder of each size.

    Raises:
        SecateurError: `out` cannot be a folder; two sizes have one name; the survey would overwrite a result; or a
            file of another program would be replaced.
    """
    if out.exists() and not out.is_dir():
        raise SecateurError(f"{out}: a file with this name exists; choose another name")
    if not out.absolute().parent.is_dir():
        raise SecateurError(f"{out}: the folder {out.absolute().parent} does not exist; create it first")
    folders = [out / f"sparsity-{one.sparsity:g}" for one in options]
    if len(set(folders)) < len(folders):
        names = ", ".join(folder.name for folder in folders)
        raise SecateurError(f"{names}: two sizes would have the same name; leave one of them out")
    if survey_file.absolute() in {(out / name).absolute() for name in (TABLE, PLOT)}:
        raise SecateurError(f"{survey_file}: the table and the plot are written there; name another survey file")
    for name, kind in ((TABLE, TABLE_KIND), (PLOT, TABLE_KIND), (SURVEY, SURVEY_KIND)):
        if (out / name).exists() and not kind.is_one(out):
            raise SecateurError(f"{out / name}: would be replaced, but it is not {kind.what}; choose another --out")
    return folders


def _finished(folders: list[Path], model: str | Path, run_options: RunOptions) -> list[Path]:
    """Return the folders with a model to keep, and check that the others can be written.

    Raises:
        SecateurError: A folder cannot be written.
    """
    source = existing_path(model)
    finished = [folder for folder in folders if (folder / RECORD).exists() and not run_options.overwrite]
    for folder in folders:
        if folder not in finished:
            Output(folder, overwrite=run_options.overwrite, source=source).check()
    return finished


def _check_finished(runs: list[OpenRun], rows: CalibrationRows, folders: list[Path], finished: list[Path]) -> None:
    """Check that each finished model was made with the options, weights and rows of its run.

    Raises:
        SecateurError: A model was not.
    """
    for run, folder in zip(runs, folders, strict=True):
        if folder in finished and not _is_result_of(run, rows, folder):
            raise SecateurError(
                f"{folder}: made with other options, other weights or another text; add --overwrite to replace it"
            )


def _is_result_of(run: OpenRun, rows: CalibrationRows, folder: Path) -> bool:
    """Return whether a folder is the complete output of this version of secateur in this run."""
    try:
        record = read_record(folder)
        same = {
            "secateur": secateur.__version__,
            **run.stream.checkpoint.identity,
            "options": json.loads(json.dumps(asdict(run.options))),
        }
        return record.items() >= same.items() and record["calibration"]["rows"][0] == hash_rows(rows.fit)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _prune_all(
    runs: list[OpenRun], plain: CalibrationRows, folders: list[Path], finished: list[Path], own_survey: Path | None
) -> list[ModelSize]:
    """Return the figures of the dense model and of each size, whose models are pruned unless they are finished.

    Args:
        runs: One for each size.
        plain: The calibration rows, without resampled rows.
        folders: One for each size.
        finished: Folders whose models are kept.
        own_survey: The survey file if this command chose its name, so that it may replace the file.
    """
    rows = resample_rows(runs[-1], plain)
    surveying = next((run for run in runs if run.request.needs_survey), runs[-1])
    if own_survey is not None:
        try:
            check_survey_file(surveying, rows.selection)
        except SecateurError:
            own_survey.unlink()
    findings = survey_model(surveying, rows)
    plans = [plan_widths(run, rows, findings) for run in runs]
    results: list[ModelSize] = []
    for run, plan, folder in zip(runs, plans, folders, strict=True):
        if folder in finished:
            run.watcher.note(f"{folder}: already finished")
            summary = summarize(run, rows, plan)
        else:
            run.watcher.note(f"{folder}: {plan.note or f'removing {plan.sparsity:.1%}'}")
            run = replace(run, started=time.perf_counter())
            summary = write_model(run, rows, plan, fit_blocks(run, rows, plan), folder)
        if not results:
            results.append(ModelSize(run.stream.checkpoint.source, 0.0, summary.parameters[0], summary.bytes[0], {}))
        results.append(ModelSize(str(folder), plan.sparsity, summary.parameters[1], summary.bytes[1], {}))
        _write_table(results, folder.parent)
    return results


def _scored(results: list[ModelSize], out: Path, texts: list[str], tokens: int | None, run: OpenRun) -> list[ModelSize]:
    """Return the figures with the perplexity of every model, and write them as a table and a plot."""
    if run.vocabulary is not None:
        run.watcher.note(
            "The sizes have fewer tokens than the dense model and may cut a text into others: their perplexities are "
            "per token, so they can be compared with each other, but not with the dense model's"
        )
    results = [replace(one, perplexity=_perplexities(one.folder, texts, tokens, run)) for one in results]
    _write_table(results, out)
    scores = {text: [one.perplexity[text] for one in results] for text in results[0].perplexity}
    plot_sizes([one.parameters for one in results], scores, out / PLOT)
    return results


def _write_table(results: list[ModelSize], out: Path) -> None:
    write_atomically(out / TABLE, json.dumps([asdict(one) for one in results], indent=2) + "\n")


def _perplexities(model: str, texts: list[str], tokens: int | None, run: OpenRun) -> dict[str, float]:
    """Return a model's perplexity on each text, in rows as long as the calibration rows."""
    result = evaluate(
        model,
        texts=texts,
        length=run.options.length,
        tokens=tokens,
        device=str(run.stream.device),
        memory=run.run_options.memory,
        revision=run.run_options.revision if model == run.stream.checkpoint.source else None,
        trust_remote_code=run.stream.checkpoint.trust_remote_code,
        watcher=run.watcher,
    )
    return {source: text.perplexity for source, text in result.models[0].texts.items()}
