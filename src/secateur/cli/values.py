"""Arguments that several commands take, and what is given as text, read and checked."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.base.errors import SecateurError
from secateur.base.output import Output

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a hub id (owner/name), or a .gguf file.", show_default=False
    ),
]
PrunedFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that secateur prune wrote.", show_default=False)
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]


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


def parse_share(name: str, text: str) -> float:
    """A share of one, or in per cent."""
    try:
        return _share(text)
    except ValueError:
        raise SecateurError(f"{name} is '{text}'; write a share, as 0.25 or 25%") from None


def _share(text: str) -> float:
    number, sign, rest = text.strip().partition("%")
    if rest:
        raise ValueError
    return float(number) / 100 if sign else float(number)


def parse_shares(text: str) -> list[float]:
    """Numbers between commas, in ascending order."""
    try:
        shares = [_share(part) for part in text.split(",")]
    except ValueError:
        raise SecateurError(f"sparsities is '{text}'; write numbers with commas, for example .1,.25,.5") from None
    if len(set(shares)) < len(shares):
        raise SecateurError(f"sparsities is '{text}', where one is there twice")
    return sorted(shares)


def check_survey_path(survey: Path | None, out: Path | None = None) -> None:
    """See that a survey can be written where there is none to read, and that no other output takes its place."""
    if survey is None:
        return
    if out is not None and out.absolute() in (survey.absolute(), *survey.absolute().parents):
        raise SecateurError(f"{survey}: the survey needs a place of its own beside {out}; name another one")
    if not survey.exists():
        Output(survey, suffix="").check()
