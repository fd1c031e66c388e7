"""Rows that the model writes itself, sampled from its own distribution: calibration without data.

The one step that holds a whole model in memory, in its stored dtype: writing token by token, block by block from disk,
would read the model once a token. It goes before pruning starts.

Every row begins at the token that opens texts: BOS, or EOS where there is none, since models that know no BOS are
trained on texts with EOS between them. It stays in the row exactly if the tokenizer would put BOS in front of a text,
so that rows are built as those of a text are. EOS is not drawn: a row is one text.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from secateur.base.errors import SecateurError
from secateur.base.memory import available_bytes, rss_bytes
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import first_line, quiet
from secateur.model.checkpoint import Checkpoint
from secateur.model.tokens import begins_with_bos
from secateur.text.calibration import check_calibration
from secateur.text.sources import SELF

BATCH_ROWS = 32
"""Rows written at once."""
BATCH_TOKENS = 4096
"""Most tokens of all of these: bounds the key/value cache."""
INSTEAD = "calibrate on a text, or on random"
SPARE = 1.1
"""Memory that must be free, over weights and cache: the libraries' own and one layer's activations."""


def opening(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """The token that opens a text.

    Raises:
        SecateurError: Neither the tokenizer nor config.json names BOS or EOS.
    """
    for kind in ("bos_token_id", "eos_token_id"):
        for named in (getattr(tokenizer, kind, None), checkpoint.raw_config.get(kind)):
            ids = _ids(named)
            if ids and 0 <= ids[0] < checkpoint.config.vocab_size:
                return ids[0]
    raise SecateurError(
        f"{checkpoint.source}: no BOS or EOS token, from which the model could begin to write; {INSTEAD}"
    )


def check_self(
    checkpoint: Checkpoint, tokenizer: Any, *, length: int, cache_bytes: float, device: torch.device
) -> None:
    """What can be found wrong before the model is loaded.

    Args:
        length: Tokens in a row.
        cache_bytes: Of one token's keys and values, all blocks together.

    Raises:
        SecateurError: No token opens a text, rows are too long, or the model does not fit into memory.
    """
    opening(checkpoint, tokenizer)
    check_calibration(SELF, length=length, max_positions=checkpoint.max_positions)
    needed = writing_bytes(checkpoint, length=length, cache_bytes=cache_bytes)
    free = free_memory(device)
    if needed > free:
        raise SecateurError(
            f"{checkpoint.source}: to write its own text, the whole model must be in memory, {needed / 1e9:,.1f} GB, "
            f"but {free / 1e9:,.1f} GB are free; {INSTEAD}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes() - rss_bytes()


def writing_bytes(checkpoint: Checkpoint, *, length: int, cache_bytes: float) -> float:
    """Memory that writing takes: the whole model in its stored dtype, and keys and values; see `check_self`."""
    return SPARE * (checkpoint.bytes + rows_at_once(length) * (length + 1) * cache_bytes)


def self_rows(
    checkpoint: Checkpoint,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    device: str | torch.device = "cpu",
    watcher: Watcher | None = None,
) -> Tensor:
    """Let the model write rows; the same ones for the same seed, on the same machine.

    Args:
        length: Tokens in a row, BOS included where the tokenizer would add it.

    Returns:
        Token ids, int64 [samples, length].

    Raises:
        SecateurError: No token opens a text, or the model cannot be run.
    """
    watcher, device = watcher or Silent(), torch.device(device)
    first, kept = opening(checkpoint, tokenizer), int(begins_with_bos(tokenizer))
    rows: list[Tensor] = []
    try:
        with watcher.busy(f"Loading {checkpoint.source}"), quiet():
            model = checkpoint.loaded(checkpoint.auto_class, checkpoint.dtype, use_safetensors=True)
            model = model.eval().to(device)
        ends = {*_ids(getattr(tokenizer, "eos_token_id", None)), *_ids(model.generation_config.eos_token_id)}
        untrained = list(range(len(tokenizer), checkpoint.config.vocab_size))
        # In place of the checkpoint's own, which would fill in what is not said here.
        how = model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - kept,
            min_new_tokens=length - kept,
            eos_token_id=sorted(ends) or None,
            pad_token_id=first,
            suppress_tokens=untrained or None,
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(), quiet():
            torch.manual_seed(seed)
            for start in watcher.track(range(0, samples, rows_at_once(length)), "Write"):
                begin = torch.full((min(rows_at_once(length), samples - start), 1), first, device=device)
                written = model.generate(begin, attention_mask=torch.ones_like(begin), generation_config=how)
                rows.append(written[:, 1 - kept :].cpu())
    except (RuntimeError, MemoryError) as error:
        raise SecateurError(
            f"{checkpoint.source}: the model could not write its own text ({first_line(error)}); {INSTEAD}"
        ) from error
    return torch.cat(rows)


def rows_at_once(length: int) -> int:
    """Rows of a batch."""
    return max(1, min(BATCH_ROWS, BATCH_TOKENS // length))


def _ids(named: Any) -> list[int]:
    """Token ids as configs name them: none, one or several."""
    return [] if named is None else list(named) if isinstance(named, list | tuple) else [int(named)]
