"""Names of the sources of rows that are neither a file nor a data set."""

GENERAL = "general"
"""Source of several kinds of text that come with the package."""
RANDOM = "random"
"""Source of random token ids."""
SELF = "self"
"""Source of text that the model itself generates."""
STDIN = "-"
"""Source that reads standard input."""


def text_added_to_general(source: str) -> str | None:
    """Return TEXT for a source of the form `general+TEXT`, and None for any other source."""
    return source.removeprefix(f"{GENERAL}+") if source.startswith(f"{GENERAL}+") else None
