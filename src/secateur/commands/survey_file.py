"""A survey kept in a file: which rows it is made of, what it depends on, and whether a file holds it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.hashes import hash_rows
from secateur.commands.open_model import OpenRun
from secateur.model.axes import Axis
from secateur.model.structure import PrunableModule
from secateur.survey.curves import Survey, load_survey

PROBE_TOKENS = 1024
"""Tokens on which the price of errors is measured. All others fit what is probed: after a fit to few tokens, the price
would be that of the fit and not of the cut, and the more so the more inputs a module has."""


def split_survey_rows(text: Tensor) -> tuple[Tensor, Tensor]:
    """The rows for the error curves, and the last few for the probes; the same ones where there is only one."""
    count = min(max(1, PROBE_TOKENS // text.shape[1]), len(text) // 2)
    return (text, text) if not count else (text[:-count], text[-count:])


def survey_key(run: OpenRun, text: Tensor | None) -> dict[str, Any]:
    """What a survey depends on; without rows, all but these."""
    chosen = run.request.block_range
    key: dict[str, Any] = {
        "fingerprint": run.stream.checkpoint.fingerprint,
        "blocks": f"{chosen.start}:{chosen.stop}",
        "modules": ",".join(run.request.problem.kinds),
        **run.options.survey_key,
    }
    if text is not None:
        key["calibration"] = hash_rows(text)
    return key


def check_survey_file(run: OpenRun, text: Tensor | None = None) -> None:
    """See that a survey that is there belongs to the run, and to the rows once they are known."""
    file = run.run_options.survey
    if run.processes.is_first and file is not None and file.exists() and run.request.needs_survey:
        read_survey(run, file, survey_key(run, text))


def read_survey(run: OpenRun, file: Path, wanted: dict[str, Any]) -> Survey:
    """The survey of a file, which must price every width of every module that is asked for.

    Raises:
        SecateurError: a survey of another model, with other options, or with something missing.
    """
    found = load_survey(file, wanted)
    lengths = {(curve.block, curve.kind, curve.axis): len(curve.errors) for curve in found.curves}
    kinds = run.request.problem.kinds
    whole = {(probe.block, probe.kind) for probe in found.probes if probe.removes_module}
    for index in run.request.block_range:
        for module in run.request.problem.prunable_modules(index):
            widths = {axis.name: _length(module, axis) for axis in module.cut_axes if axis.kind in kinds}
            here = {axis: lengths.get((index, module.kind, axis)) for axis in widths}
            if here != widths or (index, module.kind) not in whole:
                raise SecateurError(
                    f"{file}: not all of block {index}'s {module.kind} is in this survey; name another file, or delete "
                    "it to have it made again"
                )
    return found


def _length(module: PrunableModule, axis: Axis) -> int:
    """Return how many numbers along an axis have an error, the dense one included."""
    return 1 if module.locked else axis.units - axis.min_units + 1
