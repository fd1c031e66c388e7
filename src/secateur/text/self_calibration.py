"""Rows of the source `self`: text that the model generates, sampled from its own distribution.

Generation is the only step that holds a whole model in memory, in its stored dtype. Block by block, it would read the
model from disk once for every token. It is done before pruning starts.

Every row begins with the token that opens a text: BOS, or EOS for a model without BOS, which was trained on texts with
EOS between them. The opening token stays in the row exactly if the tokenizer would put BOS in front of a text, so that
generated rows are built like rows of a text. EOS is never drawn, so that a row is one text.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from secateur.base.device import memory_of
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.tokens import begins_with_bos
from secateur.model.per_layer import model_class
from secateur.text.calibration import check_calibration
from secateur.text.sources import SELF

BATCH_ROWS = 32
"""Largest number of rows that are generated together."""
BATCH_TOKENS = 4096
"""Largest number of tokens in rows that are generated together, which limits the KV cache."""
ALTERNATIVE = "calibrate on a text, or on random"
SPARE = 1.1
"""Free memory needed over weights and cache, for the libraries and the activations of one layer."""


def opening_token(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """Return the id of the token that opens a text.

    Raises:
        SecateurError: Neither the tokenizer nor config.json names a BOS or EOS token that the model has.
    """
    for key in ("bos_token_id", "eos_token_id"):
        for entry in (getattr(tokenizer, key, None), checkpoint.raw_config.get(key)):
            ids = _ids(entry)
            if ids and 0 <= ids[0] < checkpoint.config.vocab_size:
                return ids[0]
    raise SecateurError(
        f"{checkpoint.source}: no BOS or EOS token, with which generated text must begin; {ALTERNATIVE}"
    )


def check_self(
    checkpoint: Checkpoint, tokenizer: Any, *, length: int, cache_bytes: float, device: torch.device
) -> None:
    """Check that a model can generate rows, before it is loaded.

    Args:
        checkpoint: The dense model.
        tokenizer: Its tokenizer.
        length: Tokens in a row.
        cache_bytes: Bytes of one token's keys and values in all blocks together.
        device: The device on which the model generates.

    Raises:
        SecateurError: No token opens a text, rows are too long, or the model does not fit into memory.
    """
    opening_token(checkpoint, tokenizer)
    check_calibration(SELF, length=length, max_positions=checkpoint.max_positions)
    needed = generation_bytes(checkpoint, length=length, cache_bytes=cache_bytes)
    held, available = memory_of(device)
    free = available - held
    if needed > free:
        raise SecateurError(
            f"{checkpoint.source}: to write its own text, the whole model must be in memory, {needed / 1e9:,.1f} GB, "
            f"but {free / 1e9:,.1f} GB are free; {ALTERNATIVE}"
        )


def generation_bytes(checkpoint: Checkpoint, *, length: int, cache_bytes: float) -> float:
    """Return the bytes that generation takes: the model in its stored dtype, keys and values; see `check_self`."""
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
    """Let the model generate rows; the same seed gives the same rows on the same machine.

    Args:
        checkpoint: The dense model.
        tokenizer: Its tokenizer.
        samples: Number of rows.
        length: Tokens in a row, BOS included if the tokenizer would add it.
        seed: Seed of the sampling.
        device: The device on which the model generates.
        watcher: Progress output.

    Returns:
        Token ids, int64 (samples x length).

    Raises:
        SecateurError: No token opens a text, or the model cannot be run.
    """
    watcher, device = watcher or Silent(), torch.device(device)
    opening, kept = opening_token(checkpoint, tokenizer), int(begins_with_bos(tokenizer))
    rows: list[Tensor] = []
    try:
        with watcher.busy(f"Loading {checkpoint.source}"), quiet():
            auto = model_class(checkpoint.config, checkpoint.multimodal_config)
            model = checkpoint.load(auto, checkpoint.dtype, use_safetensors=True)
            model = model.eval().to(device)
        # The checkpoint's own settings would fill in whatever is not given in the call.
        model.generation_config = _sampling(model, tokenizer, checkpoint, length - kept, opening)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(), quiet():
            torch.manual_seed(seed)
            for start in watcher.track(range(0, samples, rows_at_once(length)), "Write"):
                begin = torch.full((min(rows_at_once(length), samples - start), 1), opening, device=device)
                mask = torch.ones_like(begin)
                generated = model.generate(begin, attention_mask=mask, generation_config=model.generation_config)
                rows.append(generated[:, 1 - kept :].cpu())
    except (RuntimeError, MemoryError) as error:
        raise SecateurError(
            f"{checkpoint.source}: the model could not write its own text ({first_line(error)}); {ALTERNATIVE}"
        ) from error
    return torch.cat(rows)


def _sampling(model: Any, tokenizer: Any, checkpoint: Checkpoint, tokens: int, padding: int) -> GenerationConfig:
    """Return settings that sample exactly `tokens` tokens from the model's distribution, never EOS or untrained ids."""
    ends = {*_ids(getattr(tokenizer, "eos_token_id", None)), *_ids(model.generation_config.eos_token_id)}
    untrained = list(range(len(tokenizer), checkpoint.config.vocab_size))
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        suppress_tokens=untrained or None,
    )


def rows_at_once(length: int) -> int:
    """Return the number of rows of a length (tokens) that are generated together."""
    return max(1, min(BATCH_ROWS, BATCH_TOKENS // length))


def _ids(entry: Any) -> list[int]:
    """Return token ids as a list from an entry of a config, which may be None, a number or a list."""
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [int(entry)]
