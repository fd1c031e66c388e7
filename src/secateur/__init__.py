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
    from secateur.checkpoints.checkpoint import open_checkpoint
    from secateur.cli.bars import Bars
    from secateur.commands.plan import propose
    from secateur.formats.per_layer import register
    from secateur.measure import open_tasks, perplexity, speeds, zero_shot
    from secateur.measure.loading import load
    from secateur.model.rows import Rows
    from secateur.model.stream import BlockStream
    from secateur.retraining.options import Training
    from secateur.retraining.retrain import retrain
    from secateur.steps.draw_rows import draw_rows
    from secateur.steps.fit_blocks import fit_blocks
    from secateur.steps.open_model import open_model
    from secateur.steps.options import Options, RunOptions
    from secateur.steps.plan_widths import plan_widths
    from secateur.steps.prune import prune
    from secateur.steps.prune_model import prune_model
    from secateur.steps.survey_model import survey_model
    from secateur.steps.write_model import write_model
    from secateur.survey.head_distances import head_distances
    from secateur.text.calibration import cached_token_ids, calibration_rows, consecutive_rows
    from secateur.vocabulary.trim import trim

_MODULES = {
    "prune": "secateur.steps.prune",
    "prune_model": "secateur.steps.prune_model",
    "open_model": "secateur.steps.open_model",
    "draw_rows": "secateur.steps.draw_rows",
    "survey_model": "secateur.steps.survey_model",
    "plan_widths": "secateur.steps.plan_widths",
    "fit_blocks": "secateur.steps.fit_blocks",
    "write_model": "secateur.steps.write_model",
    "propose": "secateur.commands.plan",
    "trim": "secateur.vocabulary.trim",
    "Bars": "secateur.cli.bars",
    "Options": "secateur.steps.options",
    "RunOptions": "secateur.steps.options",
    "retrain": "secateur.retraining.retrain",
    "Training": "secateur.retraining.options",
    "open_checkpoint": "secateur.checkpoints.checkpoint",
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
