"""What a survey finds, as frozen data, and its file: one survey serves every size of a model."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically

_STRICT = ConfigDict(extra="forbid", strict=True)
"""Of what a file holds."""


@dataclass(frozen=True)
class ErrorCurve:
    """One module's error against width."""

    __pydantic_config__ = _STRICT

    block: int
    kind: str
    axis: str
    """Axis along which units leave."""
    errors: tuple[float, ...]
    """||xW - t||^2 / ||residual stream after the block||^2, the mean over tokens, once 0, 1, 2, ... units have
    left along the axis."""
    energy: float
    """||t||^2 on the same scale: the error if the whole module went."""
    order: tuple[int, ...] = ()
    """Units as they leave: key/value groups, query heads (one of every group in turn) or channels. What never leaves
    alone is not in it."""
    left_after_refit: float = 1.0
    """The share of the errors that stays behind the refit, where they are those of unchanged weights."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "ErrorCurve":
        """From its fields as JSON holds them."""
        return cls(**{**raw, "errors": tuple(raw["errors"]), "order": tuple(raw["order"])})


@dataclass(frozen=True)
class Probe:
    """What one cut of one module costs at the model's output."""

    __pydantic_config__ = _STRICT

    block: int
    kind: str
    error: float
    """What the cut adds to the module's error, on the scale of its `ErrorCurve`."""
    removes_module: bool
    """Nothing of the module is left."""
    divergence: float
    """KL(dense || pruned) of the logits, in nats per token."""


@dataclass(frozen=True)
class Survey:
    """All curves and probes of a model."""

    __pydantic_config__ = _STRICT

    criterion: str
    ridge: float
    tokens: int
    curves: tuple[ErrorCurve, ...]
    probes: tuple[Probe, ...] = ()
    settings: dict[str, Any] | None = None
    """What decides the result besides the code: the weights' fingerprint, and the options that matter."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Survey":
        """From its fields as JSON holds them."""
        curves, probes = map(ErrorCurve.of, raw["curves"]), (Probe(**probe) for probe in raw["probes"])
        return cls(**raw | {"curves": tuple(curves), "probes": tuple(probes)})


def save_survey(survey: Survey, path: Path) -> None:
    """Write survey.json."""
    write_atomically(path, json.dumps(asdict(survey)) + "\n")


def load_survey(path: Path, settings: dict[str, Any]) -> Survey:
    """Read a survey.json.

    Args:
        path: the file.
        settings: what the survey must have been made for; see `Survey.settings`.

    Raises:
        SecateurError: it is no survey, or one of another model or with other options.
    """
    try:
        survey = TypeAdapter(Survey).validate_json(path.read_bytes())
        curves, probes = survey.curves, survey.probes
        found = dict(survey.settings or {})
        figures = [*(p.divergence for p in probes), *(p.error for p in probes), *(e for c in curves for e in c.errors)]
        figures += [figure for curve in curves for figure in (curve.energy, curve.left_after_refit)]
        if not probes or not all(math.isfinite(value) for value in figures):
            raise ValueError
    except ValueError as error:
        raise SecateurError(f"{path}: not a survey of secateur's; name another file, or delete it") from error
    for name, wanted in settings.items():
        if found.get(name) != wanted:
            if name == "fingerprint":
                raise SecateurError(f"{path}: a survey of other weights; name another file to make a new one")
            raise SecateurError(
                f"{path}: a survey with {name} {found.get(name)}, where {wanted} is asked for; ask for the same, or "
                "name another file to make a new one"
            )
    return survey
