"""The files of a tokenizer with the kept tokens only."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from secateur.vocabulary.inserted_ids import change_inserted
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.tokenizer import NAME, StoredTokenizer

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
