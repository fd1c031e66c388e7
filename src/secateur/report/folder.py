"""What a pruned folder says of itself to people: a model card and a page, beside the record that both are made of."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically
from secateur.base.quiet import first_line, quiet
from secateur.model.checkpoint import open_checkpoint
from secateur.report.card import BASE_CARD, CARD, PAGE, card, model_name
from secateur.report.model_page import model_page
from secateur.write.record import RECORD, read_record

T = TypeVar("T")


def readme_and_report(base: str | None, record: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Name of each file to contents, or to what gives them once the record is complete.

    Args:
        base: the card of the model that is pruned, which comes along.
        record: gives the contents of secateur.json.
    """
    own = {CARD: lambda: card(record(), base_card=base), PAGE: lambda: model_page(record())}
    return own if base is None else own | {BASE_CARD: base}


def read_text(path: Path) -> str | None:
    """A file that others wrote, whatever it holds; None where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def check_record(folder: Path) -> None:
    """Raise `SecateurError` where a folder has no record that card and page can be made of."""
    _from_record(folder, lambda record: (card(record), model_page(record)))


def check_base(folder: Path, base: str, *, trust_remote_code: bool = False) -> None:
    """Raise `SecateurError` where a folder was pruned from another model than this one."""

    def read(record: Mapping[str, Any]) -> tuple[str, str, torch.dtype]:
        return model_name(record), record["fingerprint"], getattr(torch, record["options"]["dtype"] or "bfloat16")

    name, fingerprint, dtype = _from_record(folder, read)
    if _fingerprint(base, dtype, trust_remote_code) != fingerprint:
        raise SecateurError(
            f"{base}: {folder} was pruned from another model ({name}), whose figures belong beside its "
            "own in the report; name that model by --against, or leave --report out"
        )


def _fingerprint(model: str, dtype: torch.dtype, trust_remote_code: bool) -> str:
    """Return the fingerprint that a model has once it is opened for pruning; a GGUF file is dequantised to a dtype."""
    checkpoint = open_checkpoint(model, dtype=dtype, trust_remote_code=trust_remote_code)
    # Tensors without a place in the model do not count.
    with quiet(), suppress(SecateurError):
        checkpoint.check_shapes(checkpoint.empty(AutoModelForCausalLM))
    return checkpoint.fingerprint


def add_measurements(folder: Path, rows: Sequence[Sequence[str]], texts: Sequence[tuple[str, str, str]]) -> None:
    """Make card and page of a pruned folder once more, with what was measured; see `model_page`."""
    record = _record(folder)
    write_atomically(folder / CARD, card(record, base_card=read_text(folder / BASE_CARD), measured=rows))
    write_atomically(folder / PAGE, model_page(record, rows, texts))


def _from_record(folder: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """Return what can be read of a folder's record, which others may have changed."""
    record = _record(folder)
    try:
        return read(record)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SecateurError(
            f"{folder / RECORD}: not as secateur prune wrote it ({what}); bring it back, or delete it"
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    found = read_record(folder)
    if "sizes" not in found:
        raise SecateurError(f"{folder}: no folder that secateur prune wrote, with its {RECORD}; leave --report out")
    return found
