"""What a pruned folder says of itself to people: a model card and a page, beside the record that both are made of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.files import write_whole
from secateur.base.quiet import first_line
from secateur.report.card import BASE_CARD, CARD, PAGE, card
from secateur.report.model_page import model_page
from secateur.write.record import RECORD, record_of


def described(base: str | None, record: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Name of each file to contents, or to what gives them once the record is complete.

    Args:
        base: the card of the model that is pruned, which comes along.
        record: gives the contents of secateur.json.
    """
    own = {CARD: lambda: card(record(), base_card=base), PAGE: lambda: model_page(record())}
    return own if base is None else own | {BASE_CARD: base}


def text_of(path: Path) -> str | None:
    """A file that others wrote, whatever it holds; None where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def check_described(folder: Path) -> None:
    """Raise `SecateurError` where a folder has no record that card and page can be made of."""
    record = _record(folder)
    try:
        card(record)
        model_page(record)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SecateurError(
            f"{folder / RECORD}: not as secateur prune wrote it ({what}); bring it back, or delete it"
        ) from error


def add_measured(folder: Path, rows: Sequence[Sequence[str]], texts: Sequence[tuple[str, str, str]]) -> None:
    """Make card and page of a pruned folder once more, with what was measured; see `model_page`."""
    record = _record(folder)
    write_whole(folder / CARD, card(record, base_card=text_of(folder / BASE_CARD), measured=rows))
    write_whole(folder / PAGE, model_page(record, rows, texts))


def _record(folder: Path) -> dict[str, Any]:
    found = record_of(folder)
    if "sizes" not in found:
        raise SecateurError(f"{folder}: no folder that secateur prune wrote, with its {RECORD}; leave --report out")
    return found
