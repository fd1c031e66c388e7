"""The tokens that are kept: their old ids, and their new ones."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class KeptTokens:
    """Tokens that are kept, in their old order."""

    ids: tuple[int, ...]
    """Old ids of the kept rows of the embedding, ascending; a row's place is the token's new id."""
    beyond: tuple[int, ...] = ()
    """Old ids of added tokens for which the embedding has no row; they come after the kept rows."""

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """New id by old id."""
        return {old: new for new, old in enumerate((*self.ids, *self.beyond))}

    def rows_below(self, old: int) -> int:
        """Return the number of kept rows among the first rows of the old embedding."""
        return bisect_left(self.ids, old)
