"""Token ids in config.json, generation_config.json, the configs of processors, and tokenizer.json.

Keys of every depth are read, as a multimodal config has its language model's config inside. A part with a `vocab_size`
of its own, such as the config of a tower with a text encoder, has other ids and is left alone.
"""

import re
from collections.abc import Callable
from typing import Any

from secateur.base.errors import SecateurError
from secateur.vocabulary.kept import KeptTokens

_IDS = re.compile(
    r"(.+_)?token_(id|ids|index|indices)|(.+_)?(start|end|patch|newline)_ids?"
    r"|(begin_)?suppress_tokens|bad_words_ids|force_words_ids"
)
"""Keys of a token id, or of lists of token ids at any depth."""
_RANGES = re.compile(r"vocab_offset|vocabulary_map|.+_token_offset|(lang|task)_to_id")
"""Keys of tokens that the model's code finds by arithmetic or by name, so that they cannot get other ids."""
SIZE_KEYS = frozenset({"vocab_size", "vocab_size_per_layer_input", "padded_vocab_size", "text_vocab_size"})
"""Keys of a number of tokens."""

_Change = Callable[[int], int]


def named_ids(config: dict[str, Any], rows: int) -> set[int]:
    """Return the token ids that a config names.

    Args:
        config: Contents of a JSON file.
        rows: Number of rows of the embedding; other numbers, such as -1, are not ids of tokens.
    """
    return {token for token in _seen(lambda note: _changed(config, rows, note)) if 0 <= token < rows}


def fixed_range(config: dict[str, Any]) -> str | None:
    """Return the first key, at any depth, whose tokens cannot get other ids; None if there is none."""
    for key, value in config.items():
        if _RANGES.fullmatch(key) and value is not None:
            return key
        if isinstance(value, dict) and (inner := fixed_range(value)):
            return f"{key}.{inner}"
    return None


def renumber_ids(config: dict[str, Any], rows: int, kept: KeptTokens) -> dict[str, Any]:
    """Return a config with the new ids of its tokens.

    Args:
        config: Contents of a JSON file.
        rows: Number of rows of the old embedding.
        kept: Tokens that are kept, among them all that the config names.
    """
    return _changed(config, rows, lambda token: kept.new_ids.get(token, token))


def resize_vocabulary(config: dict[str, Any], rows: int, kept: KeptTokens) -> dict[str, Any]:
    """Return a config with the new numbers of tokens; arguments as in `renumber_ids`."""

    def resized(key: str, value: Any) -> Any:
        if _is_inner(value, rows):
            return resize_vocabulary(value, rows, kept)
        return kept.rows_below(value) if key in SIZE_KEYS and isinstance(value, int) else value

    return {key: resized(key, value) for key, value in config.items()}


def _changed(config: dict[str, Any], rows: int, change: _Change) -> dict[str, Any]:
    """Return a config with changed token ids."""
    return {key: _reader(key, rows)(value, change) for key, value in config.items()}


def _reader(key: str, rows: int) -> Callable[[Any, _Change], Any]:
    """Return the function that changes the ids in the value of a key."""
    if _IDS.fullmatch(key):
        return _every_number
    return _PAIRS.get(key, lambda value, change: _changed(value, rows, change) if _is_inner(value, rows) else value)


def _is_inner(value: Any, rows: int) -> bool:
    """Return whether a value is a config with the ids of the language model."""
    return isinstance(value, dict) and value.get("vocab_size", rows) == rows


def _every_number(value: Any, change: _Change) -> Any:
    """Change all numbers of nested lists."""
    if isinstance(value, list):
        return [_every_number(item, change) for item in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _first_of_pairs(value: Any, change: _Change) -> Any:
    """Change the first item of each pair: `[[ids, bias], ...]`."""
    return [[_every_number(first, change), second] for first, second in _pairs(value)] if value is not None else None


def _second_of_pairs(value: Any, change: _Change) -> Any:
    """Change the second item of each pair: `[[position, id], ...]`."""
    return [[first, _every_number(second, change)] for first, second in _pairs(value)] if value is not None else None


def _pairs(value: Any) -> list[Any]:
    """Return a value that is a list of pairs.

    Raises:
        SecateurError: It is something else.
    """
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise SecateurError(
            f"{value!r} is not a list of pairs, as sequence_bias and forced_decoder_ids are; correct or remove it"
        )
    return value


_PAIRS: dict[str, Callable[[Any, _Change], Any]] = {
    "sequence_bias": _first_of_pairs,
    "forced_decoder_ids": _second_of_pairs,
}


def inserted_ids(contents: dict[str, Any]) -> set[int]:
    """Return the ids of the tokens that a tokenizer inserts.

    Args:
        contents: Contents of tokenizer.json.
    """
    return _seen(lambda note: change_inserted(contents, note))


def _seen(change_all: Callable[[_Change], object]) -> set[int]:
    """Return all ids that a function of changes changes."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    change_all(note)
    return found


def change_inserted(contents: dict[str, Any], change: _Change) -> dict[str, Any]:
    """Return the sections `padding` and `post_processor` of tokenizer.json, where they exist, with changed ids."""
    changed: dict[str, Any] = {}
    if padding := contents.get("padding"):
        changed["padding"] = {**padding, "pad_id": change(padding["pad_id"])}
    if post_processor := contents.get("post_processor"):
        changed["post_processor"] = _change_step(post_processor, change)
    return changed


def _change_step(step: dict[str, Any], change: _Change) -> dict[str, Any]:
    """Return a post-processor with changed ids.

    `TemplateProcessing` lists the ids of each special token that it inserts. `BertProcessing` and `RobertaProcessing`
    have pairs of a token and its id. `Sequence` has post-processors inside.
    """
    changed = dict(step)
    if "processors" in step:
        changed["processors"] = [_change_step(inner, change) for inner in step["processors"]]
    if "special_tokens" in step:
        tokens = step["special_tokens"].items()
        changed["special_tokens"] = {name: {**token, "ids": [*map(change, token["ids"])]} for name, token in tokens}
    for key in {"sep", "cls"} & step.keys():
        name, token = step[key]
        changed[key] = [name, change(token)]
    return changed
