"""`plan`: the widths that `prune` would choose, or a plan from a file, checked against the model."""

import json
from contextlib import nullcontext
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.output import Output, json_kind
from secateur.base.progress import Silent, Watcher
from secateur.base.services import Services
from secateur.plan.problem import Plan
from secateur.report.summary import Proposal
from secateur.steps.draw_rows import draw_rows
from secateur.steps.open_model import OpenRun, check_survey_path, open_model
from secateur.steps.options import Options, RunOptions
from secateur.steps.plan_widths import plan_widths
from secateur.steps.resume import resumable, retry_in_smaller_batches
from secateur.steps.survey_model import survey_model

PLAN = json_kind(
    "a plan that secateur plan wrote", lambda found: {*found} == {"model", "fingerprint", "sparsity", "cost", "blocks"}
)


def propose(
    model: str | Path,
    options: Options,
    run_options: RunOptions | None = None,
    *,
    out: Path | None = None,
    watcher: Watcher | None = None,
) -> Proposal:
    """Make a plan, or check the plan of a file, without pruning.

    A stopped run leaves its state next to `out`, or else next to the survey file; the same call resumes it.

    Args:
        model: A folder, a .gguf file or a Hugging Face Hub id.
        options: Options that decide the result of `prune`.
        run_options: Options that do not change the result, such as the survey file.
        out: JSON file for the plan.
        watcher: Receives progress and notes.

    Returns:
        The plan and the sizes that it leads to.

    Raises:
        SecateurError: The model or an option is wrong, or no plan meets the target.
    """
    out, run_options = None if out is None else Path(out), run_options or RunOptions()
    target = None if out is None else Output(out, suffix="", overwrite=run_options.overwrite, kind=PLAN)
    if target is not None:
        target.check()
    check_survey_path(run_options.survey, out)
    if options.targets_perplexity:
        raise SecateurError(
            "only secateur prune can reach a target of perplexity, because it prunes to several sizes; its "
            "secateur.json is a plan"
        )

    def make_plan(services: Services) -> Proposal:
        run = open_model(model, options, run_options, services=services)
        file = out or run.run_options.survey
        with nullcontext(run) if file is None else resumable(run, file, "plan") as run:
            rows = draw_rows(run, resample=False)
            return _proposal(run, plan_widths(run, rows, survey_model(run, rows)))

    proposal = retry_in_smaller_batches(Services(watcher=watcher or Silent()), make_plan)
    if target is not None:
        with target as partial:
            partial.write_text(json.dumps(proposal.as_dict(), indent=2) + "\n")
    return proposal


def _proposal(run: OpenRun, plan: Plan) -> Proposal:
    """Return a plan with the sizes that it leads to."""
    parameters, checkpoint = run.request.problem.parameters, run.stream.checkpoint
    return Proposal(
        model=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        dense=tuple(block.width for block in run.stream.blocks),
        plan=plan,
        parameters=(parameters.original, parameters.total(plan.widths)),
        blocks=run.options.blocks,
    )
