"""The teacher of a training: by default the model that was pruned, which the record of the folder names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.base.errors import SecateurError
from secateur.base.files import existing_path
from secateur.base.progress import Watcher
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.report.folder import fingerprint_of
from secateur.retraining.options import NO_TEACHER
from secateur.vocabulary.cut import cut_as_before
from secateur.vocabulary.kept import original_ids
from secateur.write.record import MAP_FILE, RECORD, read_record

SIZES = ("vocab_size", "hidden_size")
"""Keys of config.json that pruned model and teacher must have in common. The number of layers may differ, so that a
model of which another tool removed whole blocks can learn from the whole model."""


def open_teacher(
    checkpoint: Checkpoint, wanted: str | None, watcher: Watcher, *, trust_remote_code: bool = False
) -> Checkpoint | None:
    """Open the dense model whose distributions the pruned model learns.

    Args:
        checkpoint: The pruned folder.
        wanted: The value of `--teacher`; None for the model that the record names.
        watcher: Progress output.
        trust_remote_code: Whether the teacher's own code may run.

    Returns:
        The teacher; None where the text itself is to be learned.

    Raises:
        SecateurError: There is no record that names a model on this machine, the model cannot be opened or has
            changed, or its vocabulary size or hidden size differs from the pruned model's.
    """
    if wanted == NO_TEACHER:
        return None
    record = {} if wanted else read_record(checkpoint.path)
    source = wanted or _recorded_source(checkpoint.path, record)
    with watcher.busy(f"Opening {source}"):
        if wanted:
            teacher = open_checkpoint(source, trust_remote_code=trust_remote_code)
        else:
            teacher = _open_recorded(checkpoint, source, record, trust_remote_code)
    teacher = _with_tokens_of(checkpoint, teacher)
    for key in SIZES:
        pruned, dense = (getattr(one.config, key, None) for one in (checkpoint, teacher))
        if pruned != dense:
            raise SecateurError(
                f"{source} has {key} {dense}, but {checkpoint.source} has {pruned}; give --teacher the model that was "
                "pruned"
            )
    return teacher


def _with_tokens_of(checkpoint: Checkpoint, teacher: Checkpoint) -> Checkpoint:
    """Return the teacher with the tokens of a pruned folder, so that both have the same ids and probabilities."""
    kept = original_ids(checkpoint)
    if kept is None or teacher.config.vocab_size == len(kept):
        return teacher
    # Tokens may have been cut from the teacher too.
    own = original_ids(teacher) or range(teacher.config.vocab_size)
    places = {token: place for place, token in enumerate(own)}
    if missing := [token for token in kept if token not in places]:
        raise SecateurError(
            f"{teacher.source} has {len(places):,} tokens, but {checkpoint.path / MAP_FILE} names token "
            f"{missing[-1]:,}; give --teacher the model that was pruned"
        )
    return cut_as_before(teacher, [places[token] for token in kept])


def _open_recorded(
    checkpoint: Checkpoint, source: str, record: Mapping[str, Any], trust_remote_code: bool
) -> Checkpoint:
    """Open the model from which a folder was pruned, with the same dtype.

    Raises:
        SecateurError: The model cannot be opened, or has changed since then.
    """
    dtype = getattr(torch, str((record.get("options") or {}).get("dtype")), torch.bfloat16)
    teacher = open_checkpoint(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if record.get("fingerprint") not in (None, fingerprint_of(teacher)):
        raise SecateurError(
            f"{source} has other weights than the model that {checkpoint.source} was pruned from; restore them, or "
            "choose a teacher with --teacher"
        )
    return teacher


def _recorded_source(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the file or folder of the model from which a folder was pruned, according to its record.

    Anybody may have written the record, so that a hub id in it is not fetched.
    """
    source = record.get("model")
    if not isinstance(source, str):
        raise SecateurError(
            f"{folder}: no {RECORD} that names the model that was pruned; give it with --teacher, or --teacher none "
            "to learn the text"
        )
    if existing_path(source) is None:
        raise SecateurError(
            f"{folder / RECORD}: the model that was pruned, {source}, is not a folder or file here; give its new place "
            "or its hub id with --teacher, or --teacher none to learn the text"
        )
    return source
