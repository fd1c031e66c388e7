"""Numbers, lists and dtypes in words."""

from collections.abc import Sequence

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes in which weights are written and computed with."""


def format_count(value: float, digits: int = 2) -> str:
    """A number of parameters: `134.52 M`; the plain number below a million, of which decimals would leave little."""
    return f"{value / 1e6:,.{digits}f} M" if value >= 1e6 else f"{value:,.0f}"


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """The first few of a list of names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def first_duplicate(names: Sequence[str]) -> str | None:
    """A name that is there more than once."""
    return next((name for name in names if names.count(name) > 1), None)
