"""Evaluate one model, or two side by side: sizes, perplexity of texts, speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from secateur.calibration import consecutive_rows
from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.errors import SecateurError
from secateur.evaluate.perplexity import perplexity
from secateur.evaluate.speed import Speed, compare_speed
from secateur.evaluate.speed import speed as measure_speed
from secateur.options import DTYPES
from secateur.progress import Silent, Watcher
from secateur.quiet import quiet


@dataclass(frozen=True)
class TextScore:
    """Perplexity of one text."""

    source: str
    perplexity: float
    tokens: int
    length: int


@dataclass
class ModelScore:
    """All figures of one model."""

    name: str
    parameters: int
    bytes: int
    bos: bool
    texts: list[TextScore] = field(default_factory=list)
    prefill: float | None = None
    decode: float | None = None


@dataclass
class Evaluation:
    """One model, or the model and what it is held against."""

    models: list[ModelScore]

    def rows(self) -> list[tuple[str, list[float], str]]:
        """Label, one value a model, and format of each row of a table."""
        models = self.models
        rows: list[tuple[str, list[float], str]] = [
            ("parameters", [m.parameters for m in models], "{:,}"),
            ("bytes at equal dtype", [m.bytes for m in models], "{:,}"),
        ]
        for index, text in enumerate(models[0].texts):
            rows.append((f"perplexity {text.source}", [m.texts[index].perplexity for m in models], "{:.3f}"))
        for label, name in (("prefill tokens/s", "prefill"), ("decoding tokens/s", "decode")):
            values = [getattr(m, name) for m in models]
            if values[0] is not None:
                rows.append((label, values, "{:,.1f}"))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def evaluate(
    model: str,
    *,
    against: str | None = None,
    texts: list[str],
    length: int = 128,
    tokens: int | None = 8192,
    speed: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure a model, and another beside it.

    Args:
        model: a folder, a .gguf file or a hub id.
        against: another one, to compare with.
        texts: files or data sets to score.
        length: tokens in a row.
        tokens: tokens from the start of each text; None for all.
        speed: measure prefill and decoding; two models are measured in turn, so that their ratio holds.
        device: where to compute.
        dtype: what to compute in.
        revision: of a hub id.
        trust_remote_code: let the checkpoints' own code run.
        watcher: told about progress.
        check: run first of all; raises if the result could not be kept.

    Raises:
        SecateurError: for anything that cannot be read or measured, before long work.
    """
    from secateur.steps.prune import pick_device

    check()
    watcher = watcher or Silent()
    if dtype not in DTYPES:
        raise SecateurError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}")
    where = pick_device(device)
    names = [model] if against is None else [model, against]
    checkpoints = [
        open_checkpoint(name, revision=revision if name == model else None, trust_remote_code=trust_remote_code)
        for name in names
    ]
    # All texts are read before a model is loaded: mistakes come first.
    rows = [[_rows(checkpoint, text, length, tokens) for text in texts] for checkpoint in checkpoints]
    scores: list[ModelScore] = []
    loaded: list[Any] = []
    for checkpoint, batches in zip(checkpoints, rows, strict=True):
        network = load(checkpoint, getattr(torch, dtype), where)
        loaded.append(network)
        count = sum(p.numel() for p in network.parameters())
        score = ModelScore(
            checkpoint.source,
            count,
            count * checkpoints[0].dtype.itemsize,
            begins_with_bos(checkpoint.tokenizer()),
        )
        for text, ids in zip(texts, batches, strict=True):
            result = perplexity(network, ids, watcher=watcher, what=Path(checkpoint.source).name)
            score.texts.append(TextScore(text, result.perplexity, result.tokens, result.length))
        scores.append(score)
    if speed:
        found = _speeds(loaded)
        for score, value in zip(scores, found, strict=True):
            score.prefill, score.decode = value.prefill, value.decode
    return Evaluation(scores)


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The whole model through transformers, for evaluation only."""
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        )
    return network.eval().to(device)


def _rows(checkpoint: Checkpoint, text: str, length: int, tokens: int | None) -> torch.Tensor:
    return consecutive_rows(
        checkpoint.tokenizer(),
        text,
        length=length,
        tokens=tokens,
        vocab_size=checkpoint.config.vocab_size,
        max_positions=getattr(checkpoint.config, "max_position_embeddings", None),
    )


def _speeds(networks: list[Any]) -> list[Speed]:
    if len(networks) == 1:
        return [measure_speed(networks[0])]
    both = compare_speed(networks[0], networks[1])
    return [both.a, both.b]
