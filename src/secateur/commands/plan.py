"""`plan`: the widths that `prune` would choose, or a plan that a person wrote, checked."""

import json
from contextlib import nullcontext
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically
from secateur.base.progress import Silent, Watcher
from secateur.base.services import Services
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import OpenRun, open_model
from secateur.commands.options import Options, RunOptions
from secateur.commands.plan_widths import plan_widths
from secateur.commands.resume import resumable, retry_in_smaller_batches
from secateur.commands.survey_model import survey_model
from secateur.plan.problem import Plan
from secateur.report.summary import Proposal


def propose(
    model: str | Path,
    options: Options,
    run_options: RunOptions | None = None,
    *,
    out: Path | None = None,
    watcher: Watcher | None = None,
) -> Proposal:
    """Make or read a plan; written are the plan, the survey, and what the model writes to calibrate on.

    Args:
        model: see `prune`.
        out: a JSON file for the plan. A run that is stopped goes on where it was if there is one, or a file for the
            survey: its state stands beside.

    Raises:
        SecateurError: as `prune` does.
    """
    if options.targets_perplexity:
        raise SecateurError(
            "a target of perplexity is found by pruning: use secateur prune; its secateur.json is a plan"
        )

    def planned(services: Services) -> Proposal:
        run = open_model(model, options, run_options, services=services)
        beside = out or run.run_options.survey
        with nullcontext(run) if beside is None else resumable(run, beside) as run:
            rows = draw_rows(run, resample=False)
            return _proposal(run, plan_widths(run, rows, survey_model(run, rows)))

    proposal = retry_in_smaller_batches(Services(watcher=watcher or Silent()), planned)
    if out is not None:
        write_atomically(out, json.dumps(proposal.as_dict(), indent=2) + "\n")
    return proposal


def _proposal(run: OpenRun, decided: Plan) -> Proposal:
    """Return a plan with the sizes that it leads to."""
    counted, checkpoint = run.request.parameters, run.stream.checkpoint
    return Proposal(
        model=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        dense=tuple(block.width for block in run.stream.blocks),
        plan=decided,
        parameters=(counted.dense, counted.total(decided.widths)),
        blocks=run.options.blocks,
    )
