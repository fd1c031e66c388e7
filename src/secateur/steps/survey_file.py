"""Survey files: the calibration rows of a survey, what a survey depends on, and whether a file is complete."""

from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.hashes import hash_rows
from secateur.model.axes import Axis
from secateur.model.structure import PrunableModule
from secateur.steps.open_model import OpenRun
from secateur.survey.curves import Survey, load_survey

PROBE_TOKENS = 1024
"""Tokens on which the cost of errors is measured. The probed modules are fitted to all other tokens: after a fit to few
tokens, the measured cost would come from the fit and not from the removed units."""


def split_survey_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows for the error curves and the rows for the probes, which are the last few.

    Args:
        rows: Token ids (rows x length). A single row serves as both.
    """
    count = min(max(1, PROBE_TOKENS // rows.shape[1]), len(rows) // 2)
    return (rows[:-count], rows[-count:]) if count else (rows, rows)


def survey_key(run: OpenRun, rows: Tensor | None) -> dict[str, Any]:
    """Return everything that a survey depends on, by name; without the calibration rows if `rows` is None."""
    blocks = run.request.block_range
    key: dict[str, Any] = {
        **run.stream.checkpoint.identity,
        "blocks": f"{blocks.start}:{blocks.stop}",
        "modules": ",".join(run.request.problem.kinds),
        **run.options.survey_key,
    }
    return key if rows is None else key | {"calibration": hash_rows(rows)}


def check_survey_file(run: OpenRun, rows: Tensor | None = None) -> None:
    """Check that an existing survey file is of this model, of these options and, if they are given, of these rows.

    Raises:
        SecateurError: The survey is of another model, other options or other rows.
    """
    file = run.run_options.survey
    if run.processes.is_first and file is not None and file.exists() and run.request.needs_survey:
        read_survey(run, file, survey_key(run, rows))


def read_survey(run: OpenRun, file: Path, key: dict[str, Any]) -> Survey:
    """Return the survey of a file, which must have the error curves and probes of every module to prune.

    Args:
        run: The result of `open_model`.
        file: JSON file that `save_survey` wrote.
        key: Everything that the survey depends on, from `survey_key`.

    Raises:
        SecateurError: The survey is of another model or other options, or lacks a module.
    """
    survey = load_survey(file, key)
    problem = run.request.problem
    lengths = {(curve.block, curve.kind, curve.axis): len(curve.errors) for curve in survey.curves}
    probed = {(probe.block, probe.kind) for probe in survey.probes if probe.removes_module}
    for index in run.request.block_range:
        for module in problem.prunable_modules(index):
            axes = [axis for axis in module.cut_axes if axis.kind in problem.kinds]
            complete = all(lengths.get((index, module.kind, axis.name)) == _length(module, axis) for axis in axes)
            if not complete or (index, module.kind) not in probed:
                raise SecateurError(
                    f"{file}: this survey lacks widths of the {module.kind} of block {index}; name another file, or "
                    "delete this one, so that the survey is made again"
                )
    return survey


def _length(module: PrunableModule, axis: Axis) -> int:
    """Return the number of widths along an axis that have an error, the dense width included."""
    return 1 if module.locked else axis.units - axis.min_units + 1
