"""`secateur survey`: the survey of a model, as the file that `prune` reads and as a page to look at."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.commands.open import Job, open_job
from secateur.commands.options import Options
from secateur.criteria.head_distances import head_distances
from secateur.model.structure import Width
from secateur.plan.decide import surveyed
from secateur.plan.plan import Plan, Wish, check_reach, plan
from secateur.report.page import Distances, page_data, render
from secateur.survey.curves import Survey, save_survey
from secateur.write.writer import OutputFolder

FILE, PAGE = "survey.json", "survey.html"
SHARES = tuple(percent / 100 for percent in range(10, 65, 5))
"""For which the page shows a plan."""
ANY_SHARE = 1e-3
"""A request needs a share. The survey is the same for all, and no model is to be refused for one out of reach."""
LIKENESS_ROWS = 16
"""Calibration rows on which heads are compared: the paper's count."""


ASKED = ("blocks", "modules", "criterion", "ridge", "calibration", "samples", "length", "seed")
"""Options that a survey depends on."""


@dataclass(frozen=True)
class Surveyed:
    """What was found, for the table."""

    dense: tuple[Width, ...]
    """The dense width of every block."""
    plans: dict[float, Plan]
    """The wanted share → its plan, as far as the modules go."""
    parameters: dict[float, float]
    """The wanted share → what the model then has."""
    line: str
    """The command that prunes from this survey."""


def survey_page(
    model: str | Path,
    out: Path,
    options: Options,
    *,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    watcher: Watcher,
) -> Surveyed:
    """Survey a model and write what was found; the folder appears complete or not at all.

    Args:
        model: see `prune`.
        out: the folder for `survey.json` and `survey.html`.
        options: what a survey depends on; the rest is as for adaptive widths in the format `hf`.
        device: see `prune`.
        revision: see `prune`.
        trust_remote_code: see `prune`.
        overwrite: replace a survey that is at `out`.
        watcher: told about progress.

    Raises:
        SecateurError: as `prune` does, before the survey begins.
    """
    folder = OutputFolder(
        out, overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None, files=(FILE, PAGE)
    )
    folder.check()
    job = open_job(
        model,
        replace(options, sparsity=ANY_SHARE, fits=0),
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        watcher=watcher,
    )
    stream, wish = job.stream, job.request.wish
    assert wish is not None
    found = surveyed(job.request, job.text, watcher)
    assert found is not None
    plans = _plans(wish, found, watcher.track(SHARES, "Plan"))
    distances = _distances(job, watcher) if "heads" in options.modules else None
    counted = job.request.parameters
    # A quarter, as `prune` takes where nothing is said, or what comes nearest.
    share = min(plans, key=lambda one: abs(one - 0.25), default=0.25)
    line = _line(model, options, share, out / FILE, revision, trust_remote_code)
    facts = {
        "model": stream.checkpoint.source,
        "family": stream.checkpoint.config.model_type,
        "parameters": int(counted.dense),
        "line": line,
    }
    page = render(page_data(found, stream.blocks, plans, facts=facts, distances=distances))
    with folder as partial:
        save_survey(found, partial / FILE)
        (partial / PAGE).write_text(page, encoding="utf-8")
    parameters = {share: counted.total(one.widths) for share, one in plans.items()}
    return Surveyed(tuple(block.width for block in stream.blocks), plans, parameters, line)


def _distances(job: Job, watcher: Watcher) -> Distances | None:
    """How alike the heads of each surveyed block are; None where their attention cannot be watched."""
    try:
        found = head_distances(job.stream, job.text[:LIKENESS_ROWS], blocks=job.request.chosen, watcher=watcher)
    except SecateurError as error:
        watcher.note(f"The page says nothing of similar heads: {error}")
        return None
    return {index: distances.tolist() for index, distances in found.items()}


def _plans(wish: Wish, found: Survey, shares: Iterable[float]) -> dict[float, Plan]:
    """The plan of each share that the modules can reach."""
    plans: dict[float, Plan] = {}
    for share in shares:
        one = replace(wish, goal=share)
        try:
            check_reach(one)
        except SecateurError:
            continue
        plans[share] = plan(one, survey=found)
    return plans


def _line(
    model: str | Path, options: Options, share: float, file: Path, revision: str | None, trust_remote_code: bool
) -> str:
    """The command that prunes from a survey: what the survey depends on must be said again."""
    words = ["secateur", "prune", str(model), "OUT", "--sparsity", f"{share:g}", "--survey", str(file)]
    for field in fields(Options):
        value = getattr(options, field.name)
        if field.name in ASKED and value != field.default:
            words += [f"--{field.name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    words += [] if revision is None else ["--revision", revision]
    words += ["--trust-remote-code"] * trust_remote_code
    return shlex.join(words)
