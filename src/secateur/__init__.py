"""Secateur prunes pretrained language models in one shot: it removes heads, channels and experts.

`prune` runs the whole pipeline. Its six steps can also be called one by one: `open_model`, `draw_rows`,
`survey_model`, `plan_widths`, `fit_blocks`, `write_model`. Names are imported on first use, so that
`import secateur` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.base.errors import SecateurError
    from secateur.cli.bars import Bars
    from secateur.commands.draw_rows import draw_rows
    from secateur.commands.fit_blocks import fit_blocks
    from secateur.commands.open_model import open_model
    from secateur.commands.options import Options, RunOptions
    from secateur.commands.plan import propose
    from secateur.commands.plan_widths import plan_widths
    from secateur.commands.prune import prune
    from secateur.commands.prune_model import prune_model
    from secateur.commands.survey_model import survey_model
    from secateur.commands.write_model import write_model
    from secateur.formats.per_layer import register
    from secateur.measure import open_tasks, perplexity, speeds, zero_shot
    from secateur.measure.loading import load
    from secateur.model.checkpoint import open_checkpoint
    from secateur.model.rows import Rows
    from secateur.model.stream import BlockStream
    from secateur.retraining.options import Training
    from secateur.retraining.retrain import retrain
    from secateur.survey.head_distances import head_distances
    from secateur.text.calibration import cached_token_ids, calibration_rows, consecutive_rows
    from secateur.vocabulary.trim import trim

_MODULES = {
    "prune": "secateur.commands.prune",
    "prune_model": "secateur.commands.prune_model",
    "open_model": "secateur.commands.open_model",
    "draw_rows": "secateur.commands.draw_rows",
    "survey_model": "secateur.commands.survey_model",
    "plan_widths": "secateur.commands.plan_widths",
    "fit_blocks": "secateur.commands.fit_blocks",
    "write_model": "secateur.commands.write_model",
    "propose": "secateur.commands.plan",
    "trim": "secateur.vocabulary.trim",
    "Bars": "secateur.cli.bars",
    "Options": "secateur.commands.options",
    "RunOptions": "secateur.commands.options",
    "retrain": "secateur.retraining.retrain",
    "Training": "secateur.retraining.options",
    "open_checkpoint": "secateur.model.checkpoint",
    "BlockStream": "secateur.model.stream",
    "Rows": "secateur.model.rows",
    "head_distances": "secateur.survey.head_distances",
    "cached_token_ids": "secateur.text.calibration",
    "calibration_rows": "secateur.text.calibration",
    "consecutive_rows": "secateur.text.calibration",
    "perplexity": "secateur.measure",
    "speeds": "secateur.measure",
    "open_tasks": "secateur.measure",
    "zero_shot": "secateur.measure",
    "load": "secateur.measure.loading",
    "register": "secateur.formats.per_layer",
    "SecateurError": "secateur.base.errors",
}
"""Module of each public name."""

__all__ = ["Bars", "BlockStream", "Options", "Rows", "RunOptions", "SecateurError", "Training", "cached_token_ids"]
__all__ += ["calibration_rows", "consecutive_rows", "draw_rows", "fit_blocks", "head_distances", "load"]
__all__ += ["open_checkpoint", "open_model", "open_tasks", "perplexity", "plan_widths", "propose", "prune"]
__all__ += ["prune_model", "register", "retrain", "speeds", "survey_model", "trim", "write_model", "zero_shot"]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    return getattr(import_module(module), name)
