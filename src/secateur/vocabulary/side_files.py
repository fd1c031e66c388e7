"""Files beside the weights for a smaller vocabulary: config.json, the tokenizer, and copies of all other files."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.config_file import TEXT
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.token_ids import (
    SIZE_KEYS,
    change_inserted,
    fixed_range,
    named_ids,
    renumber_ids,
    resize_vocabulary,
)
from secateur.vocabulary.tokenizer import NAME, StoredTokenizer, read_json_object
from secateur.write.files import copy_into, write_json

CONFIG = "config.json"


def ids_in_configs(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the token ids that config.json, generation_config.json and the configs of processors name.

    Raises:
        SecateurError: A config has tokens that cannot get other ids.
    """
    rows, configs = checkpoint.config.vocab_size, _configs(checkpoint)
    for name, contents in configs.items():
        if key := fixed_range(contents):
            raise SecateurError(f"the vocabulary cannot be cut: {name} has {key}, which fixes the ids of some tokens")
    found: set[int] = set()
    for name, contents in configs.items():
        try:
            found |= named_ids(contents, rows)
        except SecateurError as error:
            raise SecateurError(f"{name}: {error}") from error
    return frozenset(found)


def write_side_files(checkpoint: Checkpoint, tokenizer: StoredTokenizer, kept: KeptTokens, folder: Path) -> None:
    """Write all files but the weights into a folder that exists, with new token ids.

    Args:
        checkpoint: The model with its whole vocabulary.
        tokenizer: Its tokenizer.
        kept: The tokens to keep.
        folder: The folder.
    """
    rows, stale = checkpoint.config.vocab_size, stale_files(checkpoint.side_folder)
    for file in checkpoint.files:
        if file.name not in stale:
            copy_into(folder, file)
    write_cut(tokenizer, kept, folder)
    for name, contents in _configs(checkpoint).items():
        renumbered = renumber_ids(contents, rows, kept)
        write_json(folder / name, _resized(checkpoint, renumbered, kept) if name == CONFIG else renumbered)


def _resized(checkpoint: Checkpoint, contents: dict[str, Any], kept: KeptTokens) -> dict[str, Any]:
    """Return config.json with the new numbers of tokens, also those that it leaves to its class."""
    resized = resize_vocabulary(contents, checkpoint.config.vocab_size, kept)
    part = resized if checkpoint.multimodal_config is None else resized.setdefault(TEXT, {})
    for key in sorted(SIZE_KEYS - part.keys()):
        if isinstance(size := getattr(checkpoint.config, key, None), int):
            part[key] = kept.rows_below(size)
    return resized


def _configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the contents of the JSON files that may name token ids, by file name."""
    side = [file for file in checkpoint.files if file.name.endswith("config.json") and "tokenizer" not in file.name]
    return {file.name: read_json_object(file) for file in (checkpoint.side_folder / CONFIG, *side)}


STALE = (
    "tokenizer.model*",
    "sentencepiece*.model",
    "spiece.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
)
"""Names of files that hold the whole vocabulary once more. tokenizer.json replaces them."""


def stale_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that do not fit to a cut tokenizer.json."""
    return sorted(file.name for file in folder.iterdir() if any(fnmatch(file.name, name) for name in STALE))


def cut_files(tokenizer: StoredTokenizer, kept: KeptTokens) -> dict[str, str]:
    """Return the contents of all JSON files of a tokenizer that hold token ids, by name."""
    edited = {
        name: _EDITS.get(name, lambda contents, _: contents)(contents, kept)
        for name, contents in tokenizer.side_files.items()
    }
    # An indented tokenizer.json takes three times as long to write.
    return {NAME: json.dumps(_cut(tokenizer, kept), ensure_ascii=False)} | {
        name: json.dumps(contents, ensure_ascii=False, indent=2) + "\n" for name, contents in edited.items()
    }


def write_cut(tokenizer: StoredTokenizer, kept: KeptTokens, out: Path) -> None:
    """Write the JSON files of a tokenizer with the kept tokens only into a folder that exists."""
    for name, text in cut_files(tokenizer, kept).items():
        (out / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def _cut(tokenizer: StoredTokenizer, kept: KeptTokens) -> dict[str, Any]:
    """Return the contents of tokenizer.json with the kept tokens only."""
    contents, new_ids = tokenizer.contents, kept.new_ids
    added = [{**token, "id": new_ids[token["id"]]} for token in contents.get("added_tokens") or ()]
    inserted = change_inserted(contents, lambda token: new_ids.get(token, token))
    return {**contents, "added_tokens": added, "model": tokenizer.model.cut(new_ids), **inserted}


def _cut_config(config: dict[str, Any], kept: KeptTokens) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json with new ids."""
    decoder = config.get("added_tokens_decoder")
    if not decoder:
        return config
    return {**config, "added_tokens_decoder": {str(kept.new_ids[int(old)]): token for old, token in decoder.items()}}


def _cut_added(added: dict[str, int], kept: KeptTokens) -> dict[str, int]:
    """Return the contents of added_tokens.json with new ids."""
    return {name: kept.new_ids[old] for name, old in added.items()}


_EDITS: dict[str, Callable[[dict[str, Any], KeptTokens], dict[str, Any]]] = {
    "tokenizer_config.json": _cut_config,
    "added_tokens.json": _cut_added,
}
