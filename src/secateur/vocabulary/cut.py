"""A checkpoint with fewer tokens: a view of the stored one, without a copy of its weights.

The view is an ordinary checkpoint. Of every tensor with one row per token it reads the rows of the kept tokens, and its
config.json and tokenizer are edited copies in a folder of the user's cache. So all that reads checkpoints, such as the
survey, the fit and the output formats, works on it unchanged.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from secateur.base.cache import cached_folder
from secateur.base.hashes import hash_json
from secateur.checkpoints.checkpoint import Checkpoint, described
from secateur.checkpoints.config_file import empty_model, load_config, read_config
from secateur.checkpoints.weights import selected_rows
from secateur.model.per_layer import decoder_class, empty_decoder
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.side_files import CONFIG, write_side_files
from secateur.vocabulary.token_ids import SIZE_KEYS
from secateur.vocabulary.tokenizer import StoredTokenizer, read_tokenizer

_VERSION = 2
"""Version of the files in the cache, part of their key; to be raised when their contents change."""
ROWS_MORE = 64
"""Number of tokens by which a config is made larger, to find the tensors with one row per token."""


def cut_vocabulary(checkpoint: Checkpoint, tokenizer: StoredTokenizer, kept: KeptTokens) -> Checkpoint:
    """Return a checkpoint with some of its tokens, which get new ids in the same order.

    Args:
        checkpoint: The model with its whole vocabulary.
        tokenizer: Its tokenizer.
        kept: The tokens to keep.

    Raises:
        SecateurError: Weights are missing or of another shape, a config cannot be read, or the disk is full.
    """
    per_token, runs = _tensors_per_token(checkpoint), runs_of(kept.ids)
    folder = _side_folder(checkpoint, tokenizer, kept)
    config = load_config(folder, raw := read_config(folder), trust_remote_code=checkpoint.trust_remote_code)
    tensors = {
        name: selected_rows(info, _below(runs, info.shape[0])) if name in per_token else info
        for name, info in checkpoint.tensors.items()
    }
    return replace(
        checkpoint,
        side_folder=folder,
        uncut=checkpoint,
        kept_tokens=kept.ids,
        tensors=tensors,
        **described(raw, config),
    )


def cut_as_before(checkpoint: Checkpoint, ids: Sequence[int]) -> Checkpoint:
    """Return a checkpoint with the tokens that another folder kept; see `cut_vocabulary`.

    Args:
        checkpoint: The model with its whole vocabulary.
        ids: Ids of the kept tokens that have a row in the embedding, ascending.
    """
    tokenizer = read_tokenizer(checkpoint.side_folder)
    return cut_vocabulary(checkpoint, tokenizer, tokenizer.keeping(ids, checkpoint.config.vocab_size))


def runs_of(ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending ids as runs: the first id of each run of consecutive ids, and the id after its last.

    Example:
        >>> runs_of([0, 1, 2, 5, 7, 8])
        ((0, 3), (5, 6), (7, 9))
    """
    firsts = [at for at in range(len(ids)) if at == 0 or ids[at] != ids[at - 1] + 1]
    return tuple((ids[first], ids[stop - 1] + 1) for first, stop in zip(firsts, [*firsts[1:], len(ids)], strict=True))


def _below(runs: tuple[tuple[int, int], ...], rows: int) -> tuple[tuple[int, int], ...]:
    """Return the runs of a tensor with fewer rows than tokens, such as Gemma 3n's embeddings of each layer."""
    return tuple((first, min(stop, rows)) for first, stop in runs if first < rows)


def _tensors_per_token(checkpoint: Checkpoint) -> set[str]:
    """Return the stored names of all tensors with one row per token: those that grow with the vocabulary."""
    network, config = empty_decoder(checkpoint), copy.deepcopy(checkpoint.config)
    checkpoint.check_shapes(network)
    for key in SIZE_KEYS:
        if getattr(config, key, None):
            setattr(config, key, getattr(config, key) + ROWS_MORE)
    larger = empty_model(decoder_class(config, checkpoint.multimodal_config), config).state_dict()
    names = [name for name, tensor in network.state_dict().items() if tensor.shape != larger[name].shape]
    return {piece for name in names for piece in checkpoint.pieces(name)}


def _side_folder(checkpoint: Checkpoint, tokenizer: StoredTokenizer, kept: KeptTokens) -> Path:
    """Return the folder of the cache with config.json, tokenizer and all other files for the kept tokens."""
    read = [checkpoint.side_folder / CONFIG, *checkpoint.files]
    inside = [file for entry in read for file in (entry, *sorted(entry.rglob("*")))]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in inside]
    key = hash_json([_VERSION, str(checkpoint.path.resolve()), checkpoint.identity, stamps, list(kept.ids)])
    name = f"{checkpoint.path.name}-vocabulary-{key}"
    return cached_folder(name, lambda partial: write_side_files(checkpoint, tokenizer, kept, partial))
