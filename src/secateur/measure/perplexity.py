"""Perplexity of rows: the exponential of the mean negative log-likelihood of a token; and bits per byte.

Every row is scored alone: each of its tokens except the first is predicted from all tokens before it in the row. The
logits of a large vocabulary take far more memory than the model's activations, so the loss is computed in pieces.

Perplexity is a figure per token, so it cannot compare models whose tokenizers cut a text differently. Bits per byte
can: they divide the same negative log-likelihood, in bits, by the UTF-8 bytes of the text that the scored tokens cover.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.checkpoints.facts import positions_of

_FORWARD_LOGITS = 1 << 28
"""Largest number of logits that one forward pass may return, in the model's dtype; batches are chosen accordingly."""
_LOSS_LOGITS = 1 << 24
"""Largest number of logits in float32 at a time: 64 MiB, and about as much again inside the loss."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of all rows together."""

    perplexity: float
    """Exponential of `nll`."""
    nll: float
    """Mean negative log-likelihood of a scored token, in nats."""
    tokens: int
    """Number of scored tokens: rows * (length - 1)."""
    rows: int
    length: int
    """Tokens in a row."""
    bytes: int | None = None
    """Number of UTF-8 bytes of text that the scored tokens cover; None where it is not known."""
    bits_per_byte: float | None = None
    """Negative log-likelihood of all scored tokens in bits, over `bytes`."""


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def perplexity(
    model: PreTrainedModel,
    rows: torch.Tensor,
    *,
    text_bytes: int | None = None,
    batch: int = 8,
    watcher: Watcher | None = None,
    what: str = "Perplexity",
) -> Perplexity:
    """Measure the perplexity of rows; the losses are summed in float64.

    Args:
        model: Any causal language model of transformers.
        rows: Token ids on any device (rows x length), length at least 2.
        text_bytes: Number of UTF-8 bytes of text that the scored tokens cover, if bits per byte are wanted.
        batch: Largest number of rows in a forward pass; fewer if there would be too many logits.
        watcher: Progress output.
        what: Label of the progress bar.

    Raises:
        SecateurError: There is nothing to score, an id is outside the model's vocabulary, or the loss is not finite.
    """
    count, length = rows.shape
    if batch < 1:
        raise SecateurError(f"batch is {batch}, but at least 1 is needed")
    if count < 1 or length < 2:
        raise SecateurError(f"{count} rows of {length} tokens leave nothing to score: a row needs at least 2 tokens")
    check_ids(model, rows)
    batch = rows_per_forward(model, length, batch)
    total = 0.0
    with scoring(model):
        for start in (watcher or Silent()).track(range(0, count, batch), what):
            ids = rows[start : start + batch].to(device_of(model))
            loss = _loss(model(input_ids=ids, use_cache=False).logits, ids)
            if not math.isfinite(loss):
                raise SecateurError(
                    f"the model's loss is {loss} in rows {start} to {start + len(ids) - 1}: "
                    "its weights are damaged, or its dtype overflows"
                )
            total += loss
    tokens = count * (length - 1)
    nll = total / tokens
    # math.exp raises on overflow, where a useless model should get an infinite perplexity; torch's exp gives it.
    value = float(torch.tensor(nll, dtype=torch.float64).exp())
    bits_per_byte = total / math.log(2) / text_bytes if text_bytes else None
    return Perplexity(value, nll, tokens, count, length, text_bytes, bits_per_byte)


def check_ids(model: PreTrainedModel, rows: torch.Tensor) -> None:
    """Raise `SecateurError` if rows hold ids outside the vocabulary of a model, or are longer than it allows."""
    vocabulary, positions = model.get_input_embeddings().weight.shape[0], positions_of(model.config)
    if not 0 <= int(rows.min()) <= int(rows.max()) < vocabulary:
        raise SecateurError(f"the rows hold ids outside the vocabulary of {vocabulary}; use the model's own tokenizer")
    if positions is not None and rows.shape[1] > positions:
        raise SecateurError(f"a row has {rows.shape[1]:,} tokens, but the model has only {positions:,} positions")


def rows_per_forward(model: PreTrainedModel, length: int, most: int) -> int:
    """Return the number of rows of a length (tokens) in one forward: `most`, or fewer to bound the logits."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return max(1, min(most, _FORWARD_LOGITS // (length * vocabulary)))


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model computes, which is the CPU if its weights stay on disk."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the summed negative log-likelihood of ids (rows x length) under logits (rows x length x vocabulary)."""
    step = max(1, _LOSS_LOGITS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for row, targets in zip(logits, ids, strict=True):
        for piece, target in zip(row[:-1].split(step), targets[1:].split(step), strict=True):
            losses = cross_entropy(piece.float(), target.to(piece.device), reduction="none")
            # Summed on the CPU: not every accelerator has float64.
            total += losses.cpu().double().sum()
    return float(total)
