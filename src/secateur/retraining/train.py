"""Training loop of transformers (Trainer), with checkpoints in a folder from which a stopped training resumes."""

import json
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, cast
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from secateur.base.errors import SecateurError
from secateur.base.files import remove
from secateur.base.json_files import damaged_state
from secateur.base.processes import Processes, connection_errors
from secateur.base.quiet import quiet
from secateur.base.run_folder import saving_state
from secateur.base.services import Services
from secateur.model import pass_checkpoint
from secateur.retraining.options import Training
from secateur.retraining.student import Student

MEASUREMENTS = 10
"""Largest number of measurements of perplexity during a training."""
STEPS_BETWEEN = 16
"""Smallest number of steps between two measurements of perplexity, each of which takes as long as half a step."""
CHECKPOINT_BYTES = 12
"""Bytes of a trained parameter in a checkpoint: the weight and two moments of AdamW, in float32."""
LAST_FILE = "trainer_state.json"
"""Last file that the Trainer writes of a checkpoint."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


def train(
    student: Student,
    training: Training,
    folder: Path,
    *,
    held_out: Tensor,
    micro_batch: int,
    services: Services,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Train a network in place.

    Args:
        student: The network with its rows and targets.
        training: Batch, learning rate and seed.
        folder: Folder of the checkpoints, the same for all processes; the last one there is resumed.
        held_out: Rows on which perplexity is measured before the first step and now and then (rows x length).
        micro_batch: Rows that run through the network together.
        services: Processes that share each batch, and progress output.
        device: Device of the training.

    Returns:
        Entries with `step`, and `loss` (nats per token) or `held_out` (perplexity).

    Raises:
        SecateurError: The loss of a step, or the perplexity after it, is NaN or infinite.
        StoppedError: A checkpoint cannot be written, or another process has stopped.
    """
    steps, last = len(student.rows) // training.batch, _last_checkpoint(folder)
    if services.processes.is_first:
        _remove_incomplete(folder)
    every = max(-(-steps // MEASUREMENTS), STEPS_BETWEEN)
    done = 0 if last is None else _step_of(last)
    bar = cast("Generator[int, None, None]", services.watcher.track(range(done, steps), "Retrain", done))
    # If the training fails, the bar is closed at once, so that it is not drawn after the error.
    with closing(bar), quiet():
        numbers: Any = [{"at": torch.tensor(row)} for row in range(steps * training.batch)]
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=training.batch // (micro_batch * services.processes.size),
            learning_rate=training.highest_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARM_UP * steps),
            optim="adamw_torch_fused",
            seed=training.seed,
            logging_steps=1,
            # With the filter, the Trainer would log the mean of earlier steps in place of NaN.
            logging_nan_inf_filter=False,
            save_strategy="no",
            save_total_limit=1,
            label_names=[],
            remove_unused_columns=False,
            # The norm before a module that lost all units gets no gradient.
            ddp_find_unused_parameters=student.lacks_modules,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
        )
        # The Trainer would spread a batch over all GPUs of the machine.
        arguments._n_gpu = min(1, arguments.n_gpu)
        watch = _Watch(student, held_out, every, bar, services.processes)
        trainer = Trainer(model=student, args=arguments, train_dataset=numbers, callbacks=[watch])
        # This callback prints the loss of every step.
        trainer.remove_callback(PrinterCallback)
        with nullcontext() if services.processes.is_single else connection_errors(), saving_state(folder):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        next(bar, None)
    return list(trainer.state.log_history)


class _Watch(TrainerCallback):
    """Callback that advances the progress bar, measures perplexity, asks for checkpoints, and stops a divergence.

    Perplexity on held-out rows is measured before the first step and then in equal distances. A checkpoint is written
    after the first and the last step, and in between as often as is cheap.
    """

    def __init__(self, student: Student, held_out: Tensor, every: int, bar: Iterator[int], processes: Processes):
        self._student, self._held_out, self._every = student, held_out, every
        self._bar, self._processes = bar, processes
        self._asked = self._since = self._cost = 0.0

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 0:
            self._measure(state)
        self._since = perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        next(self._bar, None)

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        is_last = state.global_step == state.max_steps
        if state.global_step % self._every == 0 and not is_last:
            self._measure(state)
        self._asked = perf_counter()
        is_cheap = self._asked - self._since >= self._cost / pass_checkpoint.SPENT
        control.should_save = self._processes.broadcast(lambda: is_cheap or is_last)

    def on_save(self, *_: Any, **__: Any) -> None:
        self._since = perf_counter()
        self._cost = self._since - self._asked

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, Any] | None = None, **___: Any) -> None:
        loss = float((logs or {}).get("loss", 0.0))
        if not abs(loss) < float("inf"):
            raise SecateurError(f"the loss of step {state.global_step} is {loss}; use a smaller --learning-rate")

    def _measure(self, state: Any) -> None:
        try:
            value = self._student.perplexity(self._held_out)
        except SecateurError as error:
            if not state.global_step:
                raise
            raise SecateurError(
                f"the perplexity after step {state.global_step} is not finite; use a smaller --learning-rate"
            ) from error
        state.log_history.append({"step": state.global_step, "held_out": value})


def _remove_incomplete(folder: Path) -> None:
    """Remove checkpoints that were not written to the end, for example because the disk was full."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / LAST_FILE).exists():
            remove(checkpoint)


def _step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was written, which is part of the folder's name."""
    return int(checkpoint.name.split("-")[1])


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the last complete checkpoint.

    Raises:
        SecateurError: A file of the checkpoint is damaged, for example after a power failure.
    """
    checkpoints = [file.parent for file in folder.glob(f"checkpoint-*/{LAST_FILE}")]
    if not checkpoints:
        return None
    last = max(checkpoints, key=_step_of)
    try:
        json.loads((last / LAST_FILE).read_bytes())
        for weights in last.glob("*.safetensors"):
            safe_open(weights, "pt")
        for states in last.glob("*.pt*"):
            ZipFile(states).close()
    except (ValueError, OSError, SafetensorError, BadZipFile) as error:
        raise damaged_state(last) from error
    return last
