"""`export`: a folder that `prune` wrote, as a GGUF file or with widths spelled block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError
from secateur.base.files import Output, parse_json
from secateur.base.progress import Silent, Watcher
from secateur.formats.gguf import context_length, write_gguf
from secateur.formats.gguf_architectures import Model, check_type, choose
from secateur.formats.gguf_tensors import entries
from secateur.formats.gguf_tokenizer import vocabulary
from secateur.formats.per_layer import MODELING_FILE, is_per_layer, per_layer_config, widths_of
from secateur.model.checkpoint import Checkpoint, open_checkpoint
from secateur.model.families import head_dim
from secateur.model.stream import BlockStream
from secateur.model.structure import Width
from secateur.model.weights import INDEX
from secateur.plan.plan import nearest_uniform
from secateur.write.write import copy_into, write_json

RECORD = "secateur.json"
"""What `prune` puts beside a model."""

Format = Literal["hf", "gguf"]
"""A safetensors folder whose config gives each block its width, or one file for llama.cpp."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    bytes: int
    """Of the tensors."""
    architecture: str
    """What computes it: llama.cpp's name of a graph, or the class in transformers' place."""
    context: int
    """Positions over which it computes what the folder does."""


def export(
    folder: str | Path,
    out: str | Path,
    *,
    format: Format = "gguf",
    type: str = "f16",
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Exported:
    """Convert a folder that `prune` wrote. The output appears complete or not at all.

    Args:
        folder: with config.json, secateur.json, weights and tokenizer.
        out: the file, `*.gguf`; or the new folder, for the format `hf`.
        format: what to write.
        type: of the weights in a GGUF file: f32, f16, bf16, q8_0 or q4_0. A folder keeps its own.
        overwrite: replace what is there: a GGUF file, or a model folder.
        watcher: told about progress.

    Raises:
        SecateurError: the folder is not one of ours, llama.cpp cannot compute the model, GGUF cannot hold its
            tokenizer, or the output cannot be written.
    """
    watcher = watcher or Silent()
    source = Path(folder).expanduser()
    if format not in get_args(Format):
        raise SecateurError(f"no format {format!r}; choose one of {', '.join(get_args(Format))}")
    if format == "hf":
        if Path(out).suffix == ".gguf":
            raise SecateurError(f"{out}: a folder is to be written; take --format gguf, or name a folder")
        return _to_folder(source, out, overwrite, watcher)
    path = Path(out).expanduser().resolve()
    check_type(type)
    Output(path, file=".gguf", overwrite=overwrite).check()
    return _to_file(source, path, type, overwrite, watcher)


def _to_file(folder: Path, path: Path, type: str, overwrite: bool, watcher: Watcher) -> Exported:
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_ours(folder)
        model = Model(checkpoint, widths_of(checkpoint.config))
        try:
            architecture = choose(model, type)
        except SecateurError as error:
            raise SecateurError(f"{error}{_nearest(folder, model.widths)}") from error
        tensors = entries(model, architecture, type)
        rows = next(entry.tensor.shape[0] for entry in tensors if entry.name == "token_embd.weight")
        try:
            words = vocabulary(checkpoint.tokenizer(), rows)
        except SecateurError as error:
            raise SecateurError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error
    total, context = sum(entry.bytes for entry in tensors), context_length(model, architecture)
    if context < checkpoint.config.max_position_embeddings:
        watcher.note(
            f"llama.cpp's {architecture.name} has no sliding window, so the file declares {context:,} positions: "
            "over these it computes what the model does"
        )
    short = sum(entry.type == GGMLQuantizationType.F16 for entry in tensors)
    if type.startswith("q") and short:
        watcher.note(f"{short} of {len(tensors)} tensors stay f16, as 32 does not divide their rows")
    with Output(path, file=".gguf", overwrite=overwrite, expected_bytes=total) as partial:
        write_gguf(partial, model, architecture, tensors, words, type=type, name=path.stem, watcher=watcher)
    return Exported(path, total, architecture.name, context)


def _nearest(folder: Path, widths: Sequence[Width]) -> str:
    """How to come by the nearest plan that every format holds, where it is the widths that differ."""
    match _record(folder):
        case {"sparsity": {"reached": float(reached)}} if len(set(widths)) > 1:
            return f"; the nearest that fits: prune again with {nearest_uniform(reached)}"
    return ""


def _to_folder(folder: Path, out: str | Path, overwrite: bool, watcher: Watcher) -> Exported:
    """The folder with widths block by block; its weights are the same files."""
    checkpoint = open_ours(folder)
    config = checkpoint.config
    if is_per_layer(config):
        raise SecateurError(f"{folder}: its config gives each block its width already; copy the folder")
    widths = widths_of(config)
    try:
        dense = Width(**_record(folder)["dense_width"])
        # What is left of a block is no more than it was.
        if any(kept > full for w in widths for kept, full in zip(astuple(w), astuple(dense), strict=True)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise SecateurError(f"{folder / RECORD}: its dense_width is missing or broken; prune again") from error
    # Weights that are missing would be missing in the copy.
    BlockStream(checkpoint)
    stored = per_layer_config(
        checkpoint.raw_config,
        config,
        widths=dict(enumerate(widths)),
        dense=dense,
        biases={},
        head_dim=head_dim(config),
        dtype=checkpoint.dtype,
    )
    weights = sorted({info.file for info in checkpoint.tensors.values()})
    others = [folder / name for name in (INDEX, RECORD, "timings.json") if (folder / name).exists()]
    target = Output(Path(out), overwrite=overwrite, source=folder, expected_bytes=checkpoint.bytes)
    with target as partial:
        write_json(partial / "config.json", stored)
        for file in watcher.track([*weights, *others, *checkpoint.files, MODELING_FILE], "Copying"):
            copy_into(partial, file)
    return Exported(target.path, checkpoint.bytes, stored["architectures"][0], config.max_position_embeddings)


def open_ours(folder: Path) -> Checkpoint:
    """Open a folder that `prune` wrote.

    Raises:
        SecateurError: another one, or a broken one.
    """
    try:
        record = _record(folder) if (folder / "config.json").is_file() else None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or "secateur" not in record:
        raise SecateurError(
            f"{folder}: not a folder that secateur's prune wrote (config.json with {RECORD} beside it); "
            "name one, or prune a model first"
        )
    return open_checkpoint(folder)


def _record(folder: Path) -> Any:
    return parse_json((folder / RECORD).read_text(encoding="utf-8"))
