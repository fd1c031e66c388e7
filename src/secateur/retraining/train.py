"""Training loop of transformers (Trainer), with checkpoints in a folder from which a stopped training resumes."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from secateur.base.progress import Watcher
from secateur.base.quiet import quiet
from secateur.retraining.adapters import with_adapters
from secateur.retraining.options import Training
from secateur.retraining.teacher import distillation_loss

SAVES = 10
"""Number of checkpoints that a training writes."""
LAST_FILE = "trainer_state.json"
"""Last file that the Trainer writes of a checkpoint."""


def train(
    network: Any,
    teacher: Any | None,
    rows: Tensor,
    training: Training,
    device: torch.device,
    folder: Path,
    watcher: Watcher,
) -> tuple[tuple[float, ...], int]:
    """Train a network in place.

    Args:
        network: the pruned model, in float32.
        teacher: the dense model, on the same device; None to learn the text.
        rows: token ids to train on (rows x length).
        training: epochs, batch, rank, learning rate and seed.
        device: device of the training.
        folder: folder of the checkpoints; the last one there is resumed.
        watcher: receives progress.

    Returns:
        The loss of every step, in nats per token, and the number of trained parameters.
    """
    steps = training.epochs * -(-len(rows) // training.batch)
    bar = cast("Generator[int, None, None]", watcher.track(range(steps), "Retrain"))
    # If the training fails, the bar is closed at once, so that it is not drawn after the error.
    with closing(bar), quiet():
        model = with_adapters(network, training.rank)
        count = sum(value.numel() for value in model.parameters() if value.requires_grad)
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        arguments = _arguments(training, steps, device, folder)
        trainer = _Distiller(model=model, args=arguments, train_dataset=data, callbacks=[_Progress(bar)])
        trainer.teacher = teacher
        # This callback prints the loss of every step.
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        next(bar, None)
        if model is not network:
            model.merge_and_unload()
    network.eval().requires_grad_(True).to(device)
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), count


class _Progress(TrainerCallback):
    """Callback that advances a progress bar with the Trainer's steps."""

    def __init__(self, bar: Generator[int, None, None]):
        self._bar = bar

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        for _done in range(state.global_step):
            next(self._bar, None)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        next(self._bar, None)


class _Distiller(Trainer):
    """Trainer whose loss is the distillation loss, or without a teacher the loss of the text."""

    teacher: Any | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **how: Any) -> Any:
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, **how)
        ids, how = inputs["input_ids"], {"use_cache": False, "output_hidden_states": True}
        with torch.no_grad():
            dense = self.teacher(input_ids=ids, **how)
        pruned = model(input_ids=ids, **how)
        loss = distillation_loss(pruned, dense)
        return (loss, pruned) if return_outputs else loss


def _arguments(training: Training, steps: int, device: torch.device, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch,
        learning_rate=training.learning_rate,
        seed=training.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=-(-steps // SAVES),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )


def _last_checkpoint(folder: Path) -> str | None:
    """Return the folder of the last complete checkpoint."""
    checkpoints = sorted(folder.glob(f"checkpoint-*/{LAST_FILE}"), key=lambda file: int(file.parent.name.split("-")[1]))
    return str(checkpoints[-1].parent) if checkpoints else None
