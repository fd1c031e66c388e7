"""Token ids in config.json, generation_config.json, the configs of processors, and tokenizer.json.

Keys of every depth are read, as a multimodal config has its language model's config inside. A part with a `vocab_size`
of its own, such as the config of a tower with a text encoder, has other ids and is left alone.
"""

import re
from collections.abc import Callable
from typing import Any

from secateur.vocabulary.kept import KeptTokens

_IDS = re.compile(
    r"(.+_)?token_(id|ids|index|indices)|(.+_)?(start|end|patch|newline)_ids?"
    r"|(begin_)?suppress_tokens|bad_words_ids|force_words_ids"
    # In tokenizer.json: in the padding, and in post-processors, some of which have pairs of a token and its id.
    r"|pad_id|ids|sep|cls"
)
"""Keys of a token id, or of lists of token ids at any depth."""
_FIXED = re.compile(r"vocab_offset|vocabulary_map|.+_token_offset|(lang|task)_to_id|sequence_bias|forced_decoder_ids")
"""Keys of tokens that the model's code finds by arithmetic or by name, so that they cannot get other ids, and rare keys
of ids among other numbers."""
SIZE_KEYS = frozenset({"vocab_size", "vocab_size_per_layer_input", "padded_vocab_size", "text_vocab_size"})
"""Keys of a number of tokens."""


def ids_in(contents: dict[str, Any], rows: int) -> set[int]:
    """Return the token ids that a JSON file names; arguments as in `change_ids`."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    change_ids(contents, rows, note)
    return found


def change_ids(contents: Any, rows: int, change: Callable[[int], int]) -> Any:
    """Return a JSON value with changed token ids.

    Args:
        contents: Contents of a JSON file, or a part of them.
        rows: Number of rows of the embedding; parts with another `vocab_size` are not changed.
        change: Returns the new number for the number in the place of an id, which may be no id, such as -1.
    """
    if isinstance(contents, list):
        return [change_ids(item, rows, change) for item in contents]
    if not isinstance(contents, dict):
        return contents

    def changed(key: str, value: Any) -> Any:
        if _IDS.fullmatch(key) and not isinstance(value, dict):
            return _change_numbers(value, change)
        return value if _has_other_ids(value, rows) else change_ids(value, rows, change)

    return {key: changed(key, value) for key, value in contents.items()}


def _has_other_ids(value: Any, rows: int) -> bool:
    """Return whether a value is a config with a vocabulary of its own."""
    return isinstance(value, dict) and value.get("vocab_size", rows) != rows


def _change_numbers(value: Any, change: Callable[[int], int]) -> Any:
    """Change all numbers of nested lists."""
    if isinstance(value, list):
        return [_change_numbers(item, change) for item in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def fixed_ids(config: dict[str, Any]) -> str | None:
    """Return the first key, at any depth, whose tokens cannot get other ids; None if there is none."""
    for key, value in config.items():
        if _FIXED.fullmatch(key) and value is not None:
            return key
        if isinstance(value, dict) and (inner := fixed_ids(value)):
            return f"{key}.{inner}"
    return None


def resize_vocabulary(config: dict[str, Any], rows: int, kept: KeptTokens) -> dict[str, Any]:
    """Return a config with the new numbers of tokens.

    Args:
        config: Contents of config.json.
        rows: Number of rows of the old embedding.
        kept: Tokens that are kept.
    """

    def resized(key: str, value: Any) -> Any:
        if isinstance(value, dict) and not _has_other_ids(value, rows):
            return resize_vocabulary(value, rows, kept)
        return kept.rows_below(value) if key in SIZE_KEYS and isinstance(value, int) else value

    return {key: resized(key, value) for key, value in config.items()}
