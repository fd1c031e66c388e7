"""`secateur plan`: the widths that `prune` would choose, or a plan that a person wrote, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.commands.open import open_job
from secateur.commands.options import Options
from secateur.model.structure import Keep, Width
from secateur.plan.decide import decide, measured, surveyed
from secateur.plan.plan import Plan


@dataclass(frozen=True)
class Proposal:
    """A plan with what it belongs to."""

    model: str
    fingerprint: str
    dense: tuple[Width, ...]
    """The dense width of every block."""
    plan: Plan
    parameters: tuple[float, float]
    """Of the whole model, before and after."""

    def as_dict(self) -> dict[str, Any]:
        """What `secateur prune --plan` reads."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "sparsity": {"of": self.plan.of, "reached": self.plan.sparsity},
            "price": self.plan.price,
            "blocks": [
                {"block": index, "width": asdict(width), **_units(self.plan.keeps, index)}
                for index, width in self.plan.widths.items()
            ],
        }


def _units(keeps: dict[int, Keep] | None, index: int) -> dict[str, list[int]]:
    """Exact units, where the plan has them; otherwise they are chosen while pruning."""
    if keeps is None:
        return {}
    return {"heads": list(keeps[index].heads), "channels": list(keeps[index].channels)}


def propose(
    model: str | Path,
    options: Options,
    *,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    survey_file: Path | None = None,
    save_calibration: Path | None = None,
    watcher: Watcher,
) -> Proposal:
    """Make or read a plan, and write nothing but the survey and what the model writes to calibrate on.

    Raises:
        SecateurError: as `prune` does.
    """
    if options.searches:
        raise SecateurError(
            "a target of perplexity is found by pruning: use secateur prune; its secateur.json is a plan"
        )
    job = open_job(
        model,
        replace(options, fits=0),
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        survey_file=survey_file,
        save_calibration=save_calibration,
        watcher=watcher,
    )
    job = replace(job, request=measured(job.request, job.text, watcher))
    found = surveyed(job.request, job.text, watcher, survey_file, job.drawn.sigma)
    decided = decide(job.request, found)
    stream, counted = job.stream, job.request.parameters
    return Proposal(
        model=stream.checkpoint.source,
        fingerprint=stream.checkpoint.fingerprint,
        dense=tuple(block.width for block in stream.blocks),
        plan=decided,
        parameters=(counted.dense, counted.total(decided.widths)),
    )
