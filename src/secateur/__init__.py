"""Secateur prunes a pretrained language model's attention heads and feed-forward channels in one shot.

`prune` does it all; `survey`, `plan`, `refit`, `slice` and `write` are its steps, each callable alone on an open
model (`open_checkpoint`, `BlockStream`). Names are imported on first use, so that importing the package is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.base.errors import SecateurError
    from secateur.commands.options import Options
    from secateur.commands.prune import prune
    from secateur.compare.retrain import retrain
    from secateur.fit.loop import refit
    from secateur.formats.per_layer import register
    from secateur.measure import perplexity, speed
    from secateur.model.activations import Rows
    from secateur.model.checkpoint import open_checkpoint
    from secateur.model.stream import BlockStream
    from secateur.plan.plan import plan
    from secateur.survey.survey import survey
    from secateur.text.calibration import calibration_rows, consecutive_rows
    from secateur.write.slice import slice
    from secateur.write.write import write

_HOMES = {
    "prune": "secateur.commands.prune",
    "survey": "secateur.survey.survey",
    "plan": "secateur.plan.plan",
    "refit": "secateur.fit.loop",
    "slice": "secateur.write.slice",
    "write": "secateur.write.write",
    "retrain": "secateur.compare.retrain",
    "open_checkpoint": "secateur.model.checkpoint",
    "BlockStream": "secateur.model.stream",
    "Rows": "secateur.model.activations",
    "calibration_rows": "secateur.text.calibration",
    "consecutive_rows": "secateur.text.calibration",
    "perplexity": "secateur.measure",
    "speed": "secateur.measure",
    "register": "secateur.formats.per_layer",
    "Options": "secateur.commands.options",
    "SecateurError": "secateur.base.errors",
}

__all__ = ["BlockStream", "Options", "Rows", "SecateurError", "calibration_rows", "consecutive_rows"]
__all__ += ["open_checkpoint", "perplexity", "plan", "prune", "refit", "register", "retrain"]
__all__ += ["slice", "speed", "survey", "write"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    return getattr(import_module(home), name)
