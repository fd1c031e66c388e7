"""Names of the sources of rows that are no file and no data set."""

GENERAL = "general"
"""Several kinds of text out of the package."""
RANDOM = "random"
"""Random token ids."""
SELF = "self"
"""What the model itself writes."""
STDIN = "-"
"""Standard input."""


def beside_general(source: str) -> str | None:
    """The text that is mixed with `general` half and half, of `general+TEXT`; None for any other source."""
    return source.removeprefix(f"{GENERAL}+") if source.startswith(f"{GENERAL}+") else None
