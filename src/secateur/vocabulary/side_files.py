"""Files beside the weights for a smaller vocabulary: config.json, the tokenizer, and copies of all other files."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.config_file import TEXT
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.token_ids import SIZE_KEYS, change_ids, fixed_ids, ids_in, resize_vocabulary
from secateur.vocabulary.tokenizer import INSERTING, NAME, StoredTokenizer, read_json_object
from secateur.write.files import copy_into, write_json

CONFIG = "config.json"
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


def ids_in_configs(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the token ids that config.json, generation_config.json and the configs of processors name.

    Raises:
        SecateurError: A config has tokens that cannot get other ids.
    """
    rows, found = checkpoint.config.vocab_size, set[int]()
    for name, contents in _configs(checkpoint).items():
        if key := fixed_ids(contents):
            raise SecateurError(f"the vocabulary cannot be cut: {name} has {key}, which fixes the ids of some tokens")
        found |= ids_in(contents, rows)
    return frozenset(token for token in found if 0 <= token < rows)


def write_side_files(checkpoint: Checkpoint, tokenizer: StoredTokenizer, kept: KeptTokens, folder: Path) -> None:
    """Write all files but the weights into a folder that exists, with new token ids.

    Args:
        checkpoint: The model with its whole vocabulary.
        tokenizer: Its tokenizer.
        kept: The tokens to keep.
        folder: The folder.
    """
    rows = checkpoint.config.vocab_size
    for file in checkpoint.files:
        if not any(fnmatch(file.name, name) for name in STALE):
            copy_into(folder, file)
    write_tokenizer(tokenizer, kept, folder)
    for name, contents in _configs(checkpoint).items():
        renumbered = change_ids(contents, rows, lambda token: kept.new_ids.get(token, token))
        write_json(folder / name, _resized(checkpoint, renumbered, kept) if name == CONFIG else renumbered)


def _resized(checkpoint: Checkpoint, contents: dict[str, Any], kept: KeptTokens) -> dict[str, Any]:
    """Return config.json with the new numbers of tokens, also those that it leaves to its class."""
    resized: dict[str, Any] = resize_vocabulary(contents, checkpoint.config.vocab_size, kept)
    part = resized if checkpoint.multimodal_config is None else resized.setdefault(TEXT, {})
    for key in sorted(SIZE_KEYS - part.keys()):
        if isinstance(size := getattr(checkpoint.config, key, None), int):
            part[key] = kept.rows_below(size)
    return resized


def _configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the contents of the JSON files that may name token ids, by file name."""
    side = [file for file in checkpoint.files if file.name.endswith("config.json") and "tokenizer" not in file.name]
    return {file.name: read_json_object(file) for file in (checkpoint.side_folder / CONFIG, *side)}


def write_tokenizer(tokenizer: StoredTokenizer, kept: KeptTokens, folder: Path) -> None:
    """Write the JSON files of a tokenizer with the kept tokens only into a folder that exists."""
    for name, contents in tokenizer.side_files.items():
        # These are the only keys with ids: by the text of a token in one file, and by its id in the other.
        if name == "added_tokens.json":
            contents = {text: kept.new_ids[old] for text, old in contents.items()}
        elif decoder := contents.get("added_tokens_decoder"):
            contents = contents | {
                "added_tokens_decoder": {str(kept.new_ids[int(old)]): token for old, token in decoder.items()}
            }
        write_json(folder / name, contents)
    text = json.dumps(cut_contents(tokenizer, kept), ensure_ascii=False)
    # An indented tokenizer.json takes three times as long to write.
    (folder / NAME).write_text(text, encoding="utf-8", errors="backslashreplace")


def cut_contents(tokenizer: StoredTokenizer, kept: KeptTokens) -> dict[str, Any]:
    """Return the contents of tokenizer.json with the kept tokens only."""
    contents, new_ids = tokenizer.contents, kept.new_ids
    added = [{**token, "id": new_ids[token["id"]]} for token in contents.get("added_tokens") or ()]
    inserting = {key: contents[key] for key in INSERTING if key in contents}
    inserting = change_ids(inserting, tokenizer.size, lambda token: new_ids.get(token, token))
    return {**contents, "added_tokens": added, "model": tokenizer.model.cut(new_ids), **inserting}
