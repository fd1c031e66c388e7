"""Arguments that several commands share, and parsers for option values that typer does not parse."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.base.errors import SecateurError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The model: a folder in Hugging Face format, a hub id (owner/name) or a .gguf file.",
        show_default=False,
    ),
]
PrunedFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="The folder of a pruned, trimmed or retrained model.", show_default=False),
]
WHAT_TO_MEASURE = "What to measure"
"""Panel of the options that select measurements."""
ScoredTokens = Annotated[
    int,
    typer.Option(
        help="Number of tokens to score, from the start of each text; 0 for all.",
        min=0,
        rich_help_panel=WHAT_TO_MEASURE,
    ),
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]


def parse_list(text: str) -> tuple[str, ...]:
    """Return the names in a list that is separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_fractions(option: str, text: str) -> list[float]:
    """Return the fractions in a list that is separated by commas, in ascending order.

    Raises:
        SecateurError: A part is not a number, or a number occurs twice.
    """
    try:
        numbers = sorted(_fraction(part) for part in text.split(","))
    except ValueError:
        example = "write fractions separated by commas, for example .1,.25,.5"
        raise SecateurError(f"{option} is '{text}'; {example}") from None
    if len(set(numbers)) < len(numbers):
        raise SecateurError(f"{option} is '{text}', which contains a number twice; write each number once")
    return numbers


def parse_fraction(option: str, text: str) -> float:
    """Return a fraction that is written as 0.25 or as 25%.

    Raises:
        SecateurError: The text is neither.
    """
    try:
        return _fraction(text)
    except ValueError:
        raise SecateurError(f"{option} is '{text}'; write a fraction such as 0.25 or 25%") from None


def _fraction(text: str) -> float:
    number, sign, rest = text.strip().partition("%")
    if rest:
        raise ValueError
    return float(number) / 100 if sign else float(number)
