"""Perplexity over given rows: how surprised a model is by the next token.

Every row is scored alone and each of its tokens but the first counts once, with all tokens before it in the
row as context. The logits of large vocabularies dwarf the model's activations, so they are turned into a
loss in pieces.
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

_FORWARD_LOGITS = 1 << 28
"""Logits that one forward may return, in the model's own dtype: rows are taken in smaller batches beyond."""
_LOSS_LOGITS = 1 << 24
"""Logits that are held in float32 at a time: 64 MiB, and about as much again inside the loss."""


@dataclass(frozen=True)
class Perplexity:
    """The result over all rows."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean negative log likelihood of a scored token, in nats."""
    tokens: int
    """Scored tokens: rows * (length - 1)."""
    rows: int
    length: int
    """Tokens in a row."""


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model is left in the mode it came in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def perplexity(
    model: PreTrainedModel,
    rows: torch.Tensor,
    *,
    batch: int = 8,
    watcher: Watcher | None = None,
    what: str = "Perplexity",
) -> Perplexity:
    """Perplexity of rows [rows, length], length at least 2, from a sum in float64.

    Args:
        model: any causal language model of transformers.
        rows: token ids, on any device.
        batch: rows in a forward, at most; fewer where the logits would grow too large.
        what: what to tell it is being done.

    Raises:
        SecateurError: nothing to score, ids that the model does not have, or a loss that is not finite.
    """
    count, length = rows.shape
    if batch < 1:
        raise SecateurError(f"batch is {batch}, but at least 1 is needed")
    if count < 1 or length < 2:
        raise SecateurError(f"{count} rows of {length} tokens leave nothing to score: a row needs at least 2 tokens")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(rows.min()) <= int(rows.max()) < vocabulary:
        raise SecateurError(f"the rows hold ids outside the model's {vocabulary}: wrong tokenizer for this model")
    batch = max(1, min(batch, _FORWARD_LOGITS // (length * vocabulary)))
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
    # Through torch, since math.exp raises where a hopeless model should get an infinite perplexity.
    return Perplexity(float(torch.tensor(nll, dtype=torch.float64).exp()), nll, tokens, count, length)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes, also one whose weights stay on disk."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Negative log likelihood of ids [rows, length] under logits [rows, length, vocabulary], summed."""
    step = max(1, _LOSS_LOGITS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for row, targets in zip(logits, ids, strict=True):
        for piece, target in zip(row[:-1].split(step), targets[1:].split(step), strict=True):
            losses = cross_entropy(piece.float(), target.to(piece.device), reduction="none")
            # Summed on the CPU: not every accelerator has float64.
            total += losses.cpu().double().sum()
    return float(total)
