"""`export`: a folder that `prune` wrote, or that was fine-tuned since, as a GGUF file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.json_files import parse_json
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher
from secateur.formats.folder import open_folder
from secateur.formats.gguf_choice import choose
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_tensors import entries
from secateur.formats.gguf_tokenizer import vocabulary
from secateur.formats.gguf_types import check_type
from secateur.formats.gguf_write import check_tensors, context_length, write_gguf
from secateur.formats.per_layer import decoder_class, widths_of
from secateur.model.axes import Width, alike
from secateur.plan.plan import uniform_alternative
from secateur.write.record import read_record

ALONE = (
    "The file holds the language model alone. llama.cpp takes towers and projector from a second file (mmproj), where "
    "it knows them; that of the dense model fits, as pruning leaves them and the width of the residual stream alone"
)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    bytes: int
    """Of the tensors."""
    architecture: str
    """llama.cpp's name of the graph that computes it."""
    context: int
    """Positions over which it computes what the folder does."""


def export(
    folder: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    overwrite: bool = False,
    watcher: Watcher | None = None,
    at: Path | None = None,
) -> Exported:
    """Convert a folder that `prune` wrote to a GGUF file, which appears complete or not at all.

    Args:
        folder: with config.json, weights and tokenizer; widths are read from the config, so that it may have been
            loaded, trained and saved again.
        out: the file, `*.gguf`.
        type: of the weights in it: f32, f16, bf16, q8_0 or q4_0.
        at: where the file grows, in place of a hidden name beside it.

    Raises:
        SecateurError: the folder is no model's, llama.cpp cannot compute the model, GGUF cannot hold its tokenizer, or
            the output cannot be written.
    """
    watcher = watcher or Silent()
    folder, path = local_path(folder), local_path(out).resolve()
    check_type(type)
    Output(path, suffix=".gguf", overwrite=overwrite).check()
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_folder(folder)
        checkpoint.check_shapes(checkpoint.empty(decoder_class(checkpoint.config, checkpoint.around)))
        model = GgufModel(checkpoint, widths_of(checkpoint.config))
        try:
            architecture = choose(model, type)
        except SecateurError as error:
            raise SecateurError(f"{error}{_nearest(folder, model.widths)}") from error
        tensors = entries(model, architecture, type)
        rows = next(entry.tensor.shape[0] for entry in tensors if entry.name == "token_embd.weight")
        try:
            words = vocabulary(checkpoint.tokenizer(), rows)
            words = replace(words, chat_template=words.chat_template or _processors_template(folder))
        except SecateurError as error:
            raise SecateurError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error
    if checkpoint.around is not None:
        watcher.note(ALONE)
    total, context = sum(entry.bytes for entry in tensors), context_length(model, architecture)
    if context < model.positions:
        watcher.note(
            f"llama.cpp's {architecture.name} has no sliding window, so the file declares {context:,} positions: "
            "over these it computes what the model does"
        )
    short = sum(entry.type == GGMLQuantizationType.F16 for entry in tensors)
    if type.startswith("q") and short:
        watcher.note(f"{short} of {len(tensors)} tensors stay f16, as 32 does not divide their rows")
    with Output(path, suffix=".gguf", overwrite=overwrite, expected_bytes=total, resume_path=at) as partial:
        write_gguf(partial, model, architecture, tensors, words, type=type, name=path.stem, watcher=watcher)
        if (why := check_tensors(partial, tensors)) is not None:
            raise SecateurError(f"{out}: removed, as it is not what was to be written ({why}); report it as a fault")
    return Exported(path, total, architecture.name, context)


def _processors_template(folder: Path) -> Any:
    """The chat template of a processor's older file, which tokenizers do not read; None where there is none.

    Raises:
        SecateurError: the file is damaged.
    """
    file = folder / "chat_template.json"
    try:
        return parse_json(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise SecateurError(f"{file}: no chat template as JSON; download it again, or remove it") from error


def _nearest(folder: Path, widths: Sequence[Width]) -> str:
    """How to come by the nearest plan that every format holds, where it is the widths that differ."""
    match read_record(folder):
        case {"sparsity": {"reached": float(reached)}} if not alike(widths):
            return f"; the nearest that fits: prune again with {uniform_alternative(reached)}"
    return ""
