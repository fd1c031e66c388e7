"""Error curves and probes of a survey as frozen data, and the survey file. One survey serves every target size."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically

_STRICT = ConfigDict(extra="forbid", strict=True)
"""Configuration of the checks of a survey file: no unknown keys, no conversion of types."""


@dataclass(frozen=True)
class ErrorCurve:
    """Error of one module at every width along one axis."""

    __pydantic_config__ = _STRICT

    block: int
    """Index of the block."""
    kind: str
    """Kind of the module's units."""
    axis: str
    """Name of the axis along which units are removed."""
    errors: tuple[float, ...]
    """Error once 0, 1, 2, ... units are removed along the axis.

    The error is the mean over tokens of ||xW - t||^2 / ||r||^2. Here x is the input of the output projection, W its
    refitted weight, t the output of the dense module, and r the residual stream after the block.
    """
    energy: float
    """Error once the whole module is removed: the mean over tokens of ||t||^2 / ||r||^2."""
    order: tuple[int, ...] = ()
    """Units in the order of their removal: KV groups, query heads (one of each group in turn), channels or experts.

    Units that are never removed alone are missing.
    """
    left_after_refit: float = 1.0
    """Share of the errors that is left after the refit, if `errors` were measured with unchanged weights; else 1."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "ErrorCurve":
        """Return the object from its fields as JSON types."""
        return cls(**{**raw, "errors": tuple(raw["errors"]), "order": tuple(raw["order"])})


@dataclass(frozen=True)
class Probe:
    """Divergence at the model's output when one module alone is cut."""

    __pydantic_config__ = _STRICT

    block: int
    """Index of the block."""
    kind: str
    """Kind of the module's units."""
    error: float
    """Rise of the module's error by the cut, in the units of `ErrorCurve.errors`."""
    removes_module: bool
    """Whether the cut removes the whole module."""
    divergence: float
    """KL(dense || pruned) of the logits, in nats per token."""


@dataclass(frozen=True)
class Survey:
    """All error curves and probes of a model."""

    __pydantic_config__ = _STRICT

    criterion: str
    """Criterion that determined the order in which units are removed, as in `--criterion`."""
    ridge: float
    """Ridge of the refit that errors assume."""
    tokens: int
    """Number of calibration tokens."""
    curves: tuple[ErrorCurve, ...]
    """Error curves, one for each axis of each module."""
    probes: tuple[Probe, ...] = ()
    """Probes of all modules."""
    settings: dict[str, Any] | None = None
    """Fingerprint of the weights and values of the options on which the survey depends."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Survey":
        """Return the object from its fields as JSON types."""
        curves, probes = map(ErrorCurve.of, raw["curves"]), (Probe(**probe) for probe in raw["probes"])
        return cls(**raw | {"curves": tuple(curves), "probes": tuple(probes)})


def save_survey(survey: Survey, path: Path) -> None:
    """Write a survey file."""
    write_atomically(path, json.dumps(asdict(survey)) + "\n")


def is_survey(found: Any) -> bool:
    """Return whether a JSON file with these contents is a survey, also one of an older version."""
    return {*found} >= {"criterion", "curves", "probes"}


_HASHED = {
    "fingerprint": "of other weights;",
    "config": "of a model with another config.json;",
    "calibration": "of other calibration rows; use the same --calibration, --samples, --length and --seed, or",
}
"""Messages about settings that the file has as hashes only."""


def load_survey(path: Path, settings: dict[str, Any]) -> Survey:
    """Read a survey file.

    Args:
        path: The file.
        settings: Settings that the survey must have been made with; see `Survey.settings`.

    Raises:
        SecateurError: The file is not a survey, or the survey was made for other weights or with other options.
    """
    try:
        survey = TypeAdapter(Survey).validate_json(path.read_bytes())
        curves, probes = survey.curves, survey.probes
        made_with = dict(survey.settings or {})
        figures = [*(p.divergence for p in probes), *(p.error for p in probes), *(e for c in curves for e in c.errors)]
        figures += [figure for curve in curves for figure in (curve.energy, curve.left_after_refit)]
        if not probes or not all(math.isfinite(value) for value in figures):
            raise ValueError
    except ValueError as error:
        raise SecateurError(f"{path}: not a survey by secateur; name another file, or delete it") from error
    for name, value in settings.items():
        if made_with.get(name) != value:
            difference = f"with {name} {made_with.get(name)} instead of {value}; use the same value, or"
            difference = _HASHED.get(name, difference)
            raise SecateurError(f"{path}: a survey {difference} name another file to make a new survey")
    return survey
