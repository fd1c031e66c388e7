"""`retrain`: low-rank adapters (LoRA) on a pruned folder, trained on a text and merged into the weights.

peft puts the adapters on, transformers' Trainer trains them. This is the step after pruning in LLM-Pruner (Ma et al.,
2023), whose rank, scale, dropout and learning rate are the defaults here. Only this step and `survey/gradients.py` have
a backward pass; unlike all others, this one holds the whole model in memory.
"""

import importlib.util
import tempfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import Output, parse_json
from secateur.base.progress import Silent, Watcher, reading
from secateur.base.quiet import quiet
from secateur.compare.training import Training
from secateur.formats.per_layer import MODELING_FILE, is_per_layer
from secateur.measure import compare, perplexity
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import family_of
from secateur.text.calibration import calibration_rows
from secateur.write.export import RECORD, open_ours
from secateur.write.shards import ShardWriter, header_room
from secateur.write.write import copy_into, write_json

HELD_OUT = 16
"""Rows of the same text that are not trained on, to measure perplexity before and after."""
SCALE = 2
"""The adapters' product counts so many times over its rank: alpha = 2 r, as in LLM-Pruner."""
DROPOUT = 0.05
"""Share of an adapter's inputs left out in a step, as in LLM-Pruner."""


@dataclass(frozen=True)
class Retrained:
    """What came of it."""

    path: Path
    perplexity: tuple[float, float]
    """On rows of the same text that were not trained on, before and after; both as written."""
    losses: tuple[float, ...]
    """Of every step, in nats per token."""
    adapted: int
    """Parameters of the adapters, which are merged."""


def retrain(
    folder: str | Path,
    out: str | Path,
    training: Training | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Retrained:
    """Train LoRA adapters on a folder that `prune` wrote, and write the merged model in the same format.

    Args:
        folder: with config.json, secateur.json, weights and tokenizer.
        out: the new folder; it appears complete or not at all.
        training: how; or give any of its fields by name (`epochs=1`, ...).
        device: `auto`, where the Trainer takes a GPU if there is one, or `cpu`.
        overwrite: replace a model folder that is at `out`.

    Raises:
        SecateurError: peft is missing, the folder is not one of ours, the text is too short, the training diverges, or
            the output cannot be written.
    """
    check_retraining(device)
    training, watcher = training or Training(**settings), watcher or Silent()
    if Path(out).suffix == ".gguf":
        raise SecateurError(f"{out}: a folder is to be written; name a folder, then secateur export it")
    where = pick_device(device)
    source = Path(folder).expanduser()
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_ours(source)
    target = Output(Path(out), overwrite=overwrite, source=checkpoint.path, expected_bytes=checkpoint.bytes)
    target.check()
    rows = training_rows(checkpoint, training, watcher)
    fitted, held_out = rows[: training.samples], rows[training.samples :]
    with watcher.busy(f"Loading {folder}"):
        network = compare.load(checkpoint, torch.float32, where)
    before = perplexity(network, held_out).perplexity
    layers = adapted_layers(network)
    with torch.random.fork_rng():
        set_seed(training.seed)
        losses, adapted = _train(network, layers, fitted, training, where, watcher)
    changed: dict[str, Tensor] = {}
    for name in (f"{layer}.weight" for layer in layers):
        weight = network.get_parameter(name).data
        # What is measured is what will be loaded.
        changed[name] = weight.copy_(weight.to(checkpoint.dtype))
        if not torch.isfinite(weight.sum()):
            raise SecateurError(f"{name}: NaN or infinite after the training; take a smaller learning rate")
    after = perplexity(network, held_out).perplexity
    said = {
        "secateur": secateur.__version__,
        "peft": version("peft"),
        "options": asdict(training),
        "steps": len(losses),
        "perplexity": {"before": before, "after": after},
    }
    _write(checkpoint, target, changed, said)
    return Retrained(target.path, (before, after), losses, adapted)


def adapted_layers(network: Any) -> tuple[str, ...]:
    """Paths of the layers that get adapters: every matrix of the blocks, as in LLM-Pruner; not the output layer."""
    prefix = family_of(network.config).blocks
    blocks = network.get_submodule(prefix)
    found = ((f"{prefix}.{name}", module) for name, module in blocks.named_modules())
    return tuple(name for name, module in found if isinstance(module, nn.Linear | Conv1D))


def check_retraining(device: str) -> None:
    """What can be found wrong without a model.

    Raises:
        SecateurError: peft is missing, or the Trainer does not take the device.
    """
    if importlib.util.find_spec("peft") is None:
        raise SecateurError('LoRA retraining needs peft, which is not installed; pip install "secateur[lora]"')
    if device not in ("auto", "cpu"):
        raise SecateurError(f"device is '{device}', but the Trainer takes the first GPU itself; use auto or cpu")


def training_rows(checkpoint: Checkpoint, training: Training, watcher: Watcher) -> Tensor:
    """The rows of a training (rows x length); the last `HELD_OUT` are not trained on.

    Raises:
        SecateurError: the text cannot be read or is too short.
    """
    with reading(watcher, "Reading", training.calibration):
        return calibration_rows(
            checkpoint.tokenizer(),
            training.calibration,
            samples=training.samples + HELD_OUT,
            length=training.length,
            seed=training.seed,
            vocab_size=checkpoint.config.vocab_size,
            max_positions=checkpoint.max_positions,
            taken=HELD_OUT,
        )


def _train(
    network: Any, names: tuple[str, ...], rows: Tensor, training: Training, where: torch.device, watcher: Watcher
) -> tuple[tuple[float, ...], int]:
    """Train adapters on some layers and merge them in place: the loss of every step, and the adapters' size."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    if not names:
        raise SecateurError("no block has heads or channels left, so there is nothing to retrain")
    config = LoraConfig(
        r=training.rank,
        lora_alpha=SCALE * training.rank,
        lora_dropout=DROPOUT,
        target_modules=list(names),
        fan_in_fan_out=isinstance(network.get_submodule(names[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    steps = training.epochs * -(-len(rows) // training.batch)
    bar = cast("Generator[int, None, None]", watcher.track(range(steps), "Retrain"))

    class Progress(TrainerCallback):
        """Hands the Trainer's steps to the watcher."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            next(bar, None)

    # Closed at once where the training fails, so that no bar is drawn after the error.
    with closing(bar), tempfile.TemporaryDirectory(prefix="secateur-") as folder, quiet():
        adapted = get_peft_model(network, config)
        count = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch,
            learning_rate=training.learning_rate,
            seed=training.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=where.type == "cpu",
            dataloader_pin_memory=where.type != "cpu",
        )
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=adapted, args=arguments, train_dataset=data, callbacks=[Progress()])
        # It prints every step's figures.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        next(bar, None)
        adapted.merge_and_unload()
    network.eval().to(where)
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), count


def _write(checkpoint: Checkpoint, target: Output, changed: dict[str, Tensor], said: dict[str, Any]) -> None:
    """The folder once more, with other values for some tensors, and `said` of it in the record."""
    stored = {checkpoint.resolve(name): weight for name, weight in changed.items()}
    source = checkpoint.path
    with target as partial:
        writer = ShardWriter(partial, header_bytes=header_room(checkpoint.tensors))
        for name, info in checkpoint.tensors.items():
            writer.add(name, stored[name].to(info.dtype) if name in stored else checkpoint.read(name))
        writer.close()
        modeling = [MODELING_FILE] if is_per_layer(checkpoint.config) else []
        for file in (source / "config.json", *checkpoint.files, *modeling):
            copy_into(partial, file)
        record = parse_json((source / RECORD).read_text(encoding="utf-8"))
        write_json(partial / RECORD, record | {"retrained": [*record.get("retrained", []), said]})
