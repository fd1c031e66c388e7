"""What is given as text, read and checked."""

from __future__ import annotations

from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.files import Output


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


def parse_shares(text: str) -> list[float]:
    """Numbers between commas, in ascending order."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise SecateurError(f"sparsities is '{text}'; write numbers with commas, for example .1,.25,.5") from None
    if len(set(shares)) < len(shares):
        raise SecateurError(f"sparsities is '{text}', where one is there twice")
    return sorted(shares)


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
        Output(survey, file="").check()
