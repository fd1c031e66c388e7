"""Secateur prunes a pretrained language model's attention heads and feed-forward channels in one shot.

`prune` does it all; `survey`, `plan`, `refit`, `slice` and `write` are its steps, each callable alone on an open
model (`open_checkpoint`, `BlockStream`). Names are imported on first use, so that importing the package is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.activations import Rows
    from secateur.calibration import calibration_rows, consecutive_rows
    from secateur.checkpoint import open_checkpoint
    from secateur.errors import SecateurError
    from secateur.evaluate import perplexity, speed
    from secateur.formats.per_layer import register
    from secateur.options import Options
    from secateur.steps.plan import plan
    from secateur.steps.prune import prune
    from secateur.steps.refit import refit
    from secateur.steps.retrain import retrain
    from secateur.steps.slice import slice
    from secateur.steps.survey import survey
    from secateur.steps.write import write
    from secateur.stream import BlockStream

_HOMES = {
    "prune": "secateur.steps.prune",
    "survey": "secateur.steps.survey",
    "plan": "secateur.steps.plan",
    "refit": "secateur.steps.refit",
    "slice": "secateur.steps.slice",
    "write": "secateur.steps.write",
    "retrain": "secateur.steps.retrain",
    "open_checkpoint": "secateur.checkpoint",
    "BlockStream": "secateur.stream",
    "Rows": "secateur.activations",
    "calibration_rows": "secateur.calibration",
    "consecutive_rows": "secateur.calibration",
    "perplexity": "secateur.evaluate",
    "speed": "secateur.evaluate",
    "register": "secateur.formats.per_layer",
    "Options": "secateur.options",
    "SecateurError": "secateur.errors",
}

__all__ = ["BlockStream", "Options", "Rows", "SecateurError", "calibration_rows", "consecutive_rows"]
__all__ += ["open_checkpoint", "perplexity", "plan", "prune", "refit", "register", "retrain"]
__all__ += ["slice", "speed", "survey", "write"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    return getattr(import_module(home), name)
