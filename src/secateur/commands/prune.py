"""`prune`: six steps, from a checkpoint on disk to a smaller one beside it."""

from pathlib import Path
from typing import Any

from secateur.base.progress import Watcher
from secateur.base.services import Services
from secateur.commands.dry_run import estimate
from secateur.commands.open import open_model
from secateur.commands.options import Options, RunOptions
from secateur.commands.resume import resumable, retry_in_smaller_batches
from secateur.commands.steps import draw_rows, fit_blocks, plan_widths, survey_model, write_model
from secateur.report.summary import Summary


def prune(
    model: str | Path,
    out: str | Path,
    options: Options | None = None,
    run_options: RunOptions | None = None,
    *,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Summary:
    """Prune a model in one shot and write the smaller one.

    A run that is stopped, by whatever, goes on where it was when it is called again: its state stands beside `out`.
    Processes that a launcher such as torchrun starts share the work, and the first of them writes.

    Args:
        model: a folder, a .gguf file or a hub id.
        out: the folder, or the .gguf file, to write; it appears whole or not at all.
        settings: in place of `options` and `run_options`, any of their fields by name: `sparsity=0.25`,
            `device="cpu"`, ...

    Raises:
        SecateurError: for anything wrong with the input or the request, before anything is written.
    """

    def pruned(services: Services) -> Summary:
        run = open_model(model, options, run_options, out=Path(out), services=services, **settings)
        if run.run_options.dry_run:
            return estimate(run)
        with resumable(run, Path(out)) as run:
            rows = draw_rows(run)
            findings = survey_model(run, rows)
            plan = plan_widths(run, rows, findings)
            blocks = fit_blocks(run, rows, plan)
            return write_model(run, rows, plan, blocks, out)

    return retry_in_smaller_batches(Services.join(watcher), pruned)
