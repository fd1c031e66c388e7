"""Files beside the weights for a smaller vocabulary: config.json, the tokenizer, and copies of all other files."""

from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.model.checkpoint import Checkpoint
from secateur.model.config_file import TEXT
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.token_ids import SIZE_KEYS, fixed_range, named_ids, renumber_ids, resize_vocabulary
from secateur.vocabulary.tokenizer import StoredTokenizer, read_json_object
from secateur.vocabulary.tokenizer_files import stale_files, write_cut
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
