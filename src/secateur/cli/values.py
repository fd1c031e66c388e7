"""What is given as text, read and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from secateur.base.errors import SecateurError
from secateur.model.structure import Kind


def parse_list(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_whole_numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers between commas."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SecateurError(f"{name} is '{text}'; write whole numbers with commas, for example 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise SecateurError(f"{name} is '{text}', where one is there twice")
    return numbers


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Kinds of units between commas; `Options` sees whether they exist."""
    return cast("tuple[Kind, ...]", tuple(part.strip() for part in text.split(",")))


def parse_shares(text: str) -> list[float]:
    """Numbers between commas, in ascending order."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise SecateurError(f"sparsities is '{text}'; write numbers with commas, for example .1,.25,.5") from None
    if len(set(shares)) < len(shares):
        raise SecateurError(f"sparsities is '{text}', where one is there twice")
    return sorted(shares)


def check_file(path: Path) -> None:
    """See that a file can be written, before the work."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SecateurError(f"{path}: a folder is there; name a file for the figures")
    if not folder.is_dir():
        raise SecateurError(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise SecateurError(f"{path}: cannot be written; choose another place")


def check_new(path: Path, overwrite: bool) -> None:
    """See that a file can be written, in place of another one only where that is wanted."""
    check_file(path)
    if path.exists() and not overwrite:
        raise SecateurError(f"{path}: exists; choose another name, or add --overwrite to replace it")


def check_apart(folder: Path | None = None, **files: Path | None) -> None:
    """See that no two of what is written share a place, nor lie in a folder that is written anew.

    Args:
        folder: which appears whole, in place of what is there.
        files: by what they are.
    """
    places = {what: path.absolute() for what, path in files.items() if path is not None}
    if folder is not None:
        places["output"] = folder.absolute()
        for what, path in places.items():
            if places["output"] in path.parents:
                raise SecateurError(
                    f"{files[what]}: lies in {folder}, which is written anew; keep the {what} elsewhere"
                )
    for what, path in places.items():
        other = next((name for name, place in places.items() if place == path and name != what), None)
        if other is not None:
            raise SecateurError(f"{files[what]}: the {what} and the {other} cannot have one name; choose another one")


def check_survey(survey: Path | None) -> None:
    """See that a survey can be written, where there is none to read."""
    if survey is not None and not survey.exists():
        check_file(survey)
