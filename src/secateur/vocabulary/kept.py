"""The tokens that are kept: their old ids, their new ones, and the file vocabulary.json that holds the old ones."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.write.record import MAP_FILE


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


_KEY = "original_ids"


def map_contents(kept: Sequence[int]) -> str:
    """Return the contents of the file: the id that each token had in the original model, in the order of new ids."""
    return json.dumps({_KEY: list(kept)}) + "\n"


def read_map(folder: Path) -> list[int] | None:
    """Return the id that each token of a folder had in the original model; None if the folder has all of its tokens.

    Raises:
        SecateurError: The file is damaged.
    """
    file = folder / MAP_FILE
    if not file.is_file():
        return None
    try:
        ids = parse_json(file.read_bytes())[_KEY]
        if not ids or not all(type(one) is int and one >= 0 for one in ids) or sorted(set(ids)) != ids:
            raise ValueError("its ids are not ascending whole numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise SecateurError(f"{file}: not a map of token ids ({error}); restore the file") from error
    return list(ids)


def original_ids(checkpoint: Checkpoint) -> list[int] | None:
    """Return the ids that the tokens of a checkpoint had in the original model; None if no token was ever cut.

    Raises:
        SecateurError: The file of the checkpoint's folder is damaged, or belongs to another model.
    """
    whole, kept = checkpoint.original, checkpoint.kept_tokens
    earlier, rows = read_map(whole.path), whole.config.vocab_size
    if earlier is None:
        return list(kept) or None
    if len(earlier) != rows:
        raise SecateurError(
            f"{whole.path / MAP_FILE}: has {len(earlier):,} token ids, but the model has {rows:,} tokens; restore the "
            "file"
        )
    return [earlier[token] for token in kept] if kept else earlier
