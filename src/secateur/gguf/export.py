"""`export`: write a folder that `prune` wrote, or that was fine-tuned since, as a GGUF file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor

from secateur.base.errors import SecateurError
from secateur.base.files import existing_path, local_path, real_path
from secateur.base.json_files import parse_json
from secateur.base.names import FORMATS
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.formats.folder import open_folder
from secateur.gguf.architecture import Architecture
from secateur.gguf.architectures import choose_architecture
from secateur.gguf.importance import Importance, importance_rows, measured, read_importance
from secateur.gguf.llama_cpp import LLAMA_TYPES, NEEDING_IMPORTANCE, quantise
from secateur.gguf.model import GgufModel
from secateur.gguf.tensors import FileTensor, file_tensors
from secateur.gguf.tokenizer import Vocabulary, vocabulary_of
from secateur.gguf.types import bytes_per_weight, check_type
from secateur.gguf.write import check_tensors, context_length, write_gguf
from secateur.model.axes import alike
from secateur.model.per_layer import empty_decoder, widths_of
from secateur.write.record import original_model

EXACT = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""Types that hold the weights of a folder exactly, by its dtype."""
DECODER_ONLY = (
    "The file holds only the language model. For models that it supports, llama.cpp takes vision towers and projector "
    "from a second file (mmproj); use that of the dense model, because pruning changes neither towers nor projector"
)


@dataclass(frozen=True)
class Exported:
    """File that was written."""

    path: Path
    bytes: int
    """Bytes of its tensors."""
    architecture: str
    """llama.cpp's name of the architecture that computes it."""
    context: int
    """Number of positions for which llama.cpp computes the same as the folder's model."""


def export(
    folder: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    calibration: str | None = None,
    imatrix: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Exported:
    """Convert a folder that `prune` wrote to a GGUF file, which appears complete or not at all.

    Args:
        folder: Folder with config.json, weights and tokenizer. Widths are read from the config, so the model may have
            been loaded, trained and saved again.
        out: The file, `*.gguf`.
        type: Type of its weights: f32, f16, bf16, q8_0 or q4_0; or a type that llama.cpp's library makes, such as
            q4_k_m, if the library is installed; or as-input for the types of the .gguf file that was pruned.
        calibration: Source of text as for `prune`. llama.cpp's library then rounds weights with importances, which are
            measured on this text.
        imatrix: File of llama.cpp's llama-imatrix with such importances, in place of `calibration`.
        device: Device on which importances are measured; `auto` for a GPU if there is one.
        overwrite: Replace a file that exists.
        watcher: Shows the progress.

    Raises:
        SecateurError: The folder holds no model, llama.cpp cannot compute the model, GGUF cannot hold its tokenizer, a
            source of importances cannot be read, or the output cannot be written.
    """
    watcher, folder, importance = watcher or Silent(), local_path(folder), None
    check_type(type)
    _check_importance(type, calibration, imatrix)
    if calibration is not None:
        rows = importance_rows(open_folder(folder), calibration, watcher)
        importance = partial(measured, rows=rows, device=device)
    elif imatrix is not None:
        importance = partial(_as_given, read_importance(imatrix))
    return convert(folder, real_path(out), type=type, importance=importance, overwrite=overwrite, watcher=watcher)


def _as_given(importance: Importance, *_: Any) -> Importance:
    return importance


def _check_importance(type: str, calibration: str | None, imatrix: str | Path | None) -> None:
    """Raise `SecateurError` for a source of importances that the type does not use, or for one that it lacks."""
    given = [name for name, value in {"calibration": calibration, "imatrix": imatrix}.items() if value is not None]
    if len(given) > 1:
        raise SecateurError("calibration and imatrix both give importances; leave one of them out")
    if given and type not in LLAMA_TYPES:
        raise SecateurError(f"{given[0]} is only for types that llama.cpp's library makes, such as q4_k_m, not {type}")
    if not given and type in NEEDING_IMPORTANCE:
        raise SecateurError(f"type {type} needs importances; name a text with calibration, or a file with imatrix")


def convert(
    folder: Path,
    path: Path,
    *,
    type: str,
    overwrite: bool,
    watcher: Watcher,
    importance: Callable[[Checkpoint, Watcher], Importance] | None = None,
    at: Path | None = None,
    name: str | None = None,
) -> Exported:
    """Convert a folder to a file; arguments and errors that `export` has too are described there.

    Args:
        importance: Function that returns the importances of the columns of matrices; it is called when the model is
            known to be one that llama.cpp computes.
        at: Path of the file until it is complete; by default a hidden name in the folder of `path`.
        name: Name of the model in the file; by default the name of the file.
    """
    target = _output(folder, path, overwrite)
    target.check()
    if type in LLAMA_TYPES:
        target.resume_path = at
        return _quantised(folder, target, type, importance, watcher)
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_folder(folder)
        checkpoint.check_shapes(empty_decoder(checkpoint))
        model = GgufModel(checkpoint, widths_of(checkpoint.config), type=type)
        try:
            architecture = choose_architecture(model)
        except SecateurError as error:
            # Which sparsities are possible depends on the model from before the pruning.
            again = "; prune the original model again with --format gguf --widths uniform"
            raise SecateurError(f"{error}{'' if alike(model.widths) else again}") from error
        tensors = file_tensors(model, architecture)
        rows = next(tensor.values.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
        vocabulary = _vocabulary(folder, checkpoint, rows)
    _note(watcher, model, architecture, tensors)
    size = sum(tensor.bytes for tensor in tensors)
    target.expected_bytes, target.resume_path = size, at
    with target as unfinished:
        write_gguf(unfinished, model, architecture, tensors, vocabulary, name=name or path.stem, watcher=watcher)
        if (difference := check_tensors(unfinished, tensors)) is not None:
            raise SecateurError(
                f"{path}: the written file was not as planned ({difference}), so it was deleted; report this as a bug"
            )
    return Exported(path, size, architecture.name, context_length(model, architecture))


def _quantised(
    folder: Path,
    target: Output,
    type: str,
    importance: Callable[[Checkpoint, Watcher], Importance] | None,
    watcher: Watcher,
) -> Exported:
    """Write a file of a type that llama.cpp's library makes, from a file in the dtype of the folder; see `convert`."""
    with target as unfinished:
        exact = unfinished.with_name(f"{unfinished.name}.exact.gguf")
        try:
            checkpoint = open_folder(folder)
            options: dict[str, Any] = {"overwrite": False, "name": target.path.stem, "watcher": watcher}
            done = convert(folder, exact, type=EXACT.get(checkpoint.dtype, "f32"), **options)
            found = None if importance is None else importance(checkpoint, watcher)
            with watcher.busy(f"Converting to {type}"):
                quantise(exact, unfinished, type, found)
        finally:
            exact.unlink(missing_ok=True)
        tensors = GGUFReader(unfinished).tensors
        _note_smaller_blocks(watcher, type, tensors)
    return replace(done, path=target.path, bytes=sum(int(tensor.n_bytes) for tensor in tensors))


def _note_smaller_blocks(watcher: Watcher, type: str, tensors: Sequence[ReaderTensor]) -> None:
    """Note how many matrices have another type because their rows do not fill the type's blocks."""
    block = int(GGML_QUANT_SIZES[LLAMA_TYPES[type]][0])
    quantised = [one for one in tensors if len(one.shape) > 1 and one.tensor_type != GGMLQuantizationType.F32]
    if others := [one.tensor_type.name.lower() for one in quantised if int(one.shape[0]) % block]:
        watcher.note(
            f"{len(others)} of {len(tensors)} tensors are {', '.join(sorted(set(others)))}, because their rows are no "
            f"multiple of {block} long; the file has {8 * bytes_per_weight(tensors):.2f} bits per weight"
        )


def _output(folder: Path, path: Path, overwrite: bool) -> Output:
    """Return the output, which never replaces the file from which the folder was pruned."""
    original = original_model(folder)
    source = None if original is None else existing_path(original)
    return FORMATS["gguf"].output(path, source=source, overwrite=overwrite)


def _vocabulary(folder: Path, checkpoint: Checkpoint, rows: int) -> Vocabulary:
    """Return the vocabulary of a folder's tokenizer.

    Raises:
        SecateurError: GGUF cannot hold it.
    """
    try:
        vocabulary = vocabulary_of(checkpoint.tokenizer(), rows)
        return replace(vocabulary, chat_template=vocabulary.chat_template or _processor_template(folder))
    except SecateurError as error:
        raise SecateurError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error


def _processor_template(folder: Path) -> Any:
    """Return the chat template in chat_template.json, an older file that tokenizers do not read; None without the file.

    Raises:
        SecateurError: The file is damaged.
    """
    file = folder / "chat_template.json"
    try:
        template = parse_json(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
        if not isinstance(template, str | list | dict | None):
            raise ValueError("the template is no text")
    except (ValueError, AttributeError) as error:
        raise SecateurError(f"{file}: not valid JSON with a chat template; download it again, or remove it") from error
    return template


def _note(watcher: Watcher, model: GgufModel, architecture: Architecture, tensors: Sequence[FileTensor]) -> None:
    """Note what the file lacks: vision towers, positions beyond a window, and quantised types of some tensors."""
    if model.checkpoint.multimodal_config is not None:
        watcher.note(DECODER_ONLY)
    context = context_length(model, architecture)
    if context < model.positions:
        watcher.note(
            f"llama.cpp's {architecture.name} has no sliding window, so the file allows only {context:,} positions, "
            "over which its output is the same as the model's"
        )
    matrices = [tensor for tensor in tensors if tensor.type == GGMLQuantizationType.F16]
    if unquantised := sum(tensor.values.shape[-1] % model.storage.block > 0 for tensor in matrices):
        watcher.note(
            f"{unquantised} of {len(tensors)} tensors stay f16, because their row length is not a multiple of 32"
        )
