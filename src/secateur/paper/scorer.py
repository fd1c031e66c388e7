"""Scores of whole models: perplexities and zero-shot accuracies, measured in the same way for all."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.base.hashes import hash_rows
from secateur.base.progress import Watcher
from secateur.measure.loading import load
from secateur.measure.perplexity import perplexity
from secateur.measure.tasks import OpenTask, open_tasks
from secateur.measure.zero_shot import zero_shot
from secateur.model.checkpoint import open_checkpoint
from secateur.paper.compared_model import ComparedModel, columns_of
from secateur.paper.recipe import Recipe, named


@dataclass(frozen=True)
class Scorer:
    """Scorer of whole models, with the same tasks and settings for all."""

    tasks: dict[str, list[OpenTask]]
    """Tasks by column; the accuracies of several tasks in a column are averaged."""
    device: torch.device
    watcher: Watcher

    def score(self, folder: str | Path, model: ComparedModel, what: str) -> dict[str, Any]:
        """Return perplexities, and accuracies in percent, by column.

        Args:
            folder: Folder of the dense or the pruned model.
            model: The dense model, which gives tokenizer and texts.
            what: Label of the progress bars.
        """
        checkpoint = model.checkpoint
        if folder != checkpoint.path:
            checkpoint = open_checkpoint(folder, trust_remote_code=checkpoint.trust_remote_code)
        with self.watcher.busy(f"Loading {what}"):
            network = load(checkpoint, torch.float32, self.device)
        texts, accuracies = {}, {}
        for column, rows in model.texts.items():
            texts[column] = perplexity(network, rows, watcher=self.watcher, what=f"{what} on {column}").perplexity
        for column, tasks in self.tasks.items():
            found = zero_shot(network, model.tokenizer, tasks, watcher=self.watcher, what=f"{what} on")
            accuracies[column] = 100 * sum((one.acc_norm or one.acc).value for one in found) / len(found)
        return {"perplexity": texts, "accuracy": accuracies}

    def decided_by(self, model: ComparedModel) -> dict[str, Any]:
        """Return the inputs that decide the scores of a model, as JSON values."""
        tasks = {name: repr([(task.name, task.items) for task in opened]) for name, opened in self.tasks.items()}
        return {
            "secateur": secateur.__version__,
            **model.checkpoint.identity,
            "device": self.device.type,
            "texts": {column: hash_rows(rows) for column, rows in model.texts.items()},
            "tasks": {name: hashlib.sha256(items.encode()).hexdigest()[:16] for name, items in tasks.items()},
        }


def task_columns(recipe: Recipe, task_path: Path | None, watcher: Watcher) -> dict[str, list[OpenTask]]:
    """Open the tasks of each column, with their items."""
    limit = recipe.evaluation.limit
    open_tasks([], limit=limit, task_path=task_path)  # checks both arguments, even where there are no tasks
    wanted = columns_of("tasks", [named(task, task) for task in recipe.evaluation.tasks])
    return {
        column: open_tasks([task], limit=limit, task_path=task_path, watcher=watcher) for column, task in wanted.items()
    }
