"""`retrain`: train a pruned folder further, with merged low-rank adapters (LoRA) or in all weights of its blocks.

Without a teacher, the model learns to predict a text. This is the step after pruning in LLM-Pruner (Ma et al., 2023),
whose rank, scale, dropout and learning rate are the defaults. With a teacher, the model learns the outputs of the dense
model on that text (`secateur.retraining.teacher`). Unlike all other steps, this one holds the whole model in memory.
"""

import importlib.util
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

import secateur
from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.hashes import hash_rows
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.run_folder import RunFolder
from secateur.formats.folder import open_folder
from secateur.measure import loading, perplexity
from secateur.model.checkpoint import Checkpoint
from secateur.report.folder import check_record
from secateur.retraining.adapters import adapted_layers, trained_parameters
from secateur.retraining.options import Training
from secateur.retraining.teacher import open_teacher
from secateur.retraining.train import train
from secateur.retraining.write import write_retrained
from secateur.text.calibration import SampleOption, calibration_rows
from secateur.write.record import read_record

HELD_OUT = 16
"""Number of held-out rows of the same text, on which perplexity is measured before and after the training."""


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining."""

    path: Path
    perplexity: tuple[float, float]
    """Perplexity on held-out rows before and after the training, with weights in the stored dtype."""
    losses: tuple[float, ...]
    """Loss of every training step, in nats per token."""
    adapted: int
    """Number of trained parameters: of the adapters before they were merged, or of all weights of the blocks."""


def retrain(
    folder: str | Path,
    out: str | Path,
    training: Training | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Retrained:
    """Train a folder that `prune` wrote, and write the result in the same format.

    A training that was stopped is resumed by the same call; until then its checkpoint is kept beside `out`.

    Args:
        folder: folder with config.json, weights and tokenizer.
        out: the new folder; it appears complete or not at all.
        training: options of the training; alternatively, give its fields by name (`epochs=1`, ...).
        device: `auto` for the first GPU if there is one, or `cpu`.
        overwrite: whether to replace a model folder at `out`.
        restart: whether to discard the checkpoint of an earlier, stopped training.
        watcher: receives progress.

    Raises:
        SecateurError: peft is missing, the folder holds no model, the teacher has other sizes, the text is too short,
            another training has its checkpoint there, the training diverges, or the output cannot be written.
    """
    training, watcher = training or Training(**settings), watcher or Silent()
    check_retraining(device, training.rank)
    where = pick_device(device)
    checkpoint, target = _open_folder(folder, out, overwrite, watcher)
    teacher = None if training.teacher is None else open_teacher(checkpoint, training.teacher, watcher)
    rows = training_rows(checkpoint, training, watcher)
    fitted, held_out = rows[: training.samples], rows[training.samples :]
    network = _load(checkpoint, str(folder), where, watcher)
    if not adapted_layers(network):
        raise SecateurError("no block has heads or channels left, so there is nothing to retrain; prune less")
    dense = None if teacher is None else _load(teacher, str(training.teacher), where, watcher)
    before = perplexity(network, held_out).perplexity
    with RunFolder(target.path, _inputs_of(checkpoint, teacher, training, rows), restart=restart) as state:
        with torch.random.fork_rng():
            set_seed(training.seed)
            losses, adapted = train(network, dense, fitted, training, where, state.folder("training"), watcher)
        del dense
        changed = _round_weights(network, training.rank, checkpoint.dtype)
        after = perplexity(network, held_out).perplexity
        entry = {
            "secateur": secateur.__version__,
            **({"peft": version("peft")} if training.rank else {}),
            "options": asdict(training),
            "steps": len(losses),
            "perplexity": {"before": before, "after": after},
        }
        write_retrained(checkpoint, target, changed, entry)
    return Retrained(target.path, (before, after), losses, adapted)


def check_retraining(device: str, rank: int = 1) -> None:
    """Check the device and the installation, without a model.

    Raises:
        SecateurError: peft is missing, or the Trainer cannot use the device.
    """
    if rank and importlib.util.find_spec("peft") is None:
        raise SecateurError('LoRA retraining needs peft, which is not installed; pip install "secateur[lora]"')
    if device not in ("auto", "cpu"):
        raise SecateurError(f"device is '{device}', but the Trainer always takes the first GPU; use auto or cpu")


def training_rows(checkpoint: Checkpoint, training: Training, watcher: Watcher) -> Tensor:
    """Return token ids of the rows (rows x length); the last `HELD_OUT` rows are held out.

    Raises:
        SecateurError: the text cannot be read or is too short.
    """
    with busy_reading(watcher, "Reading", training.calibration):
        return calibration_rows(
            checkpoint.tokenizer(),
            training.calibration,
            samples=training.samples + HELD_OUT,
            length=training.length,
            seed=training.seed,
            vocab_size=checkpoint.config.vocab_size,
            max_positions=checkpoint.max_positions,
            option=SampleOption(extra_rows=HELD_OUT),
        )


def _open_folder(folder: str | Path, out: str | Path, overwrite: bool, watcher: Watcher) -> tuple[Checkpoint, Output]:
    """Open the pruned folder, and check that the new folder can be written."""
    if Path(out).suffix == ".gguf":
        raise SecateurError(f"{out}: retrain writes a folder; name one, then export it with secateur export")
    source = local_path(folder)
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_folder(source)
    if checkpoint.multimodal_config is not None:
        raise SecateurError(f"{folder}: retrain cannot train multimodal models; name a language model")
    target = Output(Path(out), overwrite=overwrite, source=checkpoint.path, expected_bytes=checkpoint.bytes)
    target.check()
    if "sizes" in read_record(source):
        check_record(source)
    return checkpoint, target


def _load(checkpoint: Checkpoint, name: str, device: torch.device, watcher: Watcher) -> Any:
    """Return the whole model in float32."""
    with watcher.busy(f"Loading {name}"):
        return loading.load(checkpoint, torch.float32, device, whole=True)


def _inputs_of(checkpoint: Checkpoint, teacher: Checkpoint | None, training: Training, rows: Tensor) -> dict[str, Any]:
    """Return all inputs of the training, by which its checkpoint is recognised."""
    options = {name: value for name, value in asdict(training).items() if name != "teacher"}
    inputs = {"model": checkpoint.fingerprint, "text": hash_rows(rows), "version": secateur.__version__}
    return options | inputs | {"teacher": None if teacher is None else teacher.fingerprint}


def _round_weights(network: Any, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round the trained weights to the stored dtype in place, and return them by name.

    Raises:
        SecateurError: a weight is NaN or infinite.
    """
    changed: dict[str, Tensor] = {}
    for name in trained_parameters(network, rank):
        weight = network.get_parameter(name).data
        # In place, so that perplexity is measured with the weights that are written.
        changed[name] = weight.copy_(weight.to(dtype))
        if not torch.isfinite(weight.sum()):
            raise SecateurError(f"{name}: NaN or infinite after the training; use a smaller --learning-rate")
    return changed
