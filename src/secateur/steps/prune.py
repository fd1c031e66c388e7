"""`prune`: read a checkpoint, and write a smaller one, in six steps."""

from pathlib import Path
from typing import Any

from secateur.base.progress import Watcher
from secateur.base.services import Services
from secateur.report.summary import Summary
from secateur.steps.draw_rows import draw_rows
from secateur.steps.dry_run import estimate
from secateur.steps.fit_blocks import fit_blocks
from secateur.steps.open_model import open_model
from secateur.steps.options import Options, RunOptions
from secateur.steps.plan_widths import plan_widths
from secateur.steps.resume import resumable, retry_in_smaller_batches
from secateur.steps.survey_model import survey_model
from secateur.steps.write_model import write_model


def prune(
    model: str | Path,
    out: str | Path,
    options: Options | None = None,
    run_options: RunOptions | None = None,
    *,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Summary:
    """Prune a model in one shot, without training, and write the smaller model.

    A stopped run leaves its state next to `out`; the same call resumes it. Processes that a launcher such as torchrun
    starts share the work, and rank 0 writes.

    Args:
        model: A folder, a .gguf file or a Hugging Face Hub id.
        out: Folder or .gguf file to write. It appears once it is complete; an error leaves nothing there.
        options: Options that decide the result.
        run_options: Options that do not change the result, such as the device.
        watcher: Receives progress and notes.
        settings: Fields of `Options` and `RunOptions` by name, in place of the two objects: `sparsity=0.25`,
            `device="cpu"`, ...

    Returns:
        The sizes before and after, and the time and memory used.

    Raises:
        SecateurError: The model or an option is wrong. Most such errors are raised before any long work.
    """

    def run_steps(services: Services) -> Summary:
        run = open_model(model, options, run_options, out=Path(out), services=services, **settings)
        if run.run_options.dry_run:
            return estimate(run)
        with resumable(run, Path(out), "prune") as run:
            rows = draw_rows(run)
            findings = survey_model(run, rows)
            plan = plan_widths(run, rows, findings)
            blocks = fit_blocks(run, rows, plan)
            return write_model(run, rows, plan, blocks, out)

    return retry_in_smaller_batches(Services.join(watcher), run_steps)
