"""The file vocabulary.json of a folder with fewer tokens: which token of the original model each token was."""

import json
from collections.abc import Sequence
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json

MAP_FILE = "vocabulary.json"
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


def original_ids(folder: Path, kept: Sequence[int]) -> list[int] | None:
    """Return the ids that tokens of a folder had in the original model; None if no token was ever cut.

    Args:
        folder: The folder, from which tokens may have been cut before.
        kept: Ids of the tokens in the folder; empty for all.

    Raises:
        SecateurError: The folder's own file is damaged.
    """
    earlier = read_map(folder)
    if earlier is None:
        return list(kept) or None
    return [earlier[token] for token in kept] if kept else earlier
