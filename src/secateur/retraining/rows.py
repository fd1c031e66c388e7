"""Rows of token ids for a training, and held-out rows of the same text."""

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import busy_reading
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.tokens import begins_with_bos
from secateur.retraining.options import Training
from secateur.text.calibration import Portion, cached_token_ids, calibration_rows, text_ids
from secateur.text.sources import GENERAL, text_added_to_general

HELD_OUT = 16
"""Number of held-out rows, on which perplexity is measured before and after the training."""
TRAINED_SHARE = 0.95
"""Share of the text's tokens that the training may use; held-out rows come from the rest."""


class TrainingRows(NamedTuple):
    """Token ids of a training (each rows x length)."""

    train: Tensor
    held_out: Tensor
    passes: float
    """Number of times that the text is used, on average."""


def training_rows(checkpoint: Checkpoint, training: Training, tokens: int, services: Services) -> TrainingRows:
    """Return the rows of a training, which one process reads for all.

    Args:
        checkpoint: The pruned model.
        training: Text, length, batch and seed.
        tokens: Number of tokens to train on; rows that do not fill a step are left out.
        services: Processes and progress output.

    Raises:
        SecateurError: The text cannot be read or does not fill a row, or the tokens do not fill a step.
    """
    count = training.steps_of(tokens) * training.batch

    def read() -> dict[str, Tensor]:
        train, held_out, text = _read(checkpoint, training, count)
        passes = count * training.length / (TRAINED_SHARE * text)
        return {"train": train, "held_out": held_out, "passes": torch.tensor(passes, dtype=torch.float64)}

    with busy_reading(services.watcher, "Reading", training.calibration):
        rows = services.processes.compute_at(0, read, torch.device("cpu"))
    return TrainingRows(rows["train"], rows["held_out"], float(rows["passes"]))


def _tokens_of_text(checkpoint: Checkpoint, training: Training) -> tuple[int, int]:
    """Return the number of tokens of the text, with those that are held out, and of its shortest source.

    Half of the rows of general+TEXT are from each of the two sources, so the shorter one counts twice.
    """
    tokenizer, vocabulary, text = checkpoint.tokenizer(), checkpoint.config.vocab_size, training.calibration
    sources = [GENERAL, added] if (added := text_added_to_general(text)) else [text]
    shortest = min(sum(map(len, text_ids(tokenizer, source, vocabulary, to_train=True))) for source in sources)
    return len(sources) * shortest, shortest


def _read(checkpoint: Checkpoint, training: Training, count: int) -> tuple[Tensor, Tensor, int]:
    """Return a number of rows to train on, the held-out rows, and the number of tokens of the text."""
    tokenizer, vocabulary = checkpoint.tokenizer(), checkpoint.config.vocab_size

    def draw(samples: int, portion: Portion) -> Tensor:
        return calibration_rows(
            tokenizer,
            training.calibration,
            samples=samples,
            length=training.length,
            seed=training.seed,
            vocab_size=vocabulary,
            max_positions=checkpoint.max_positions,
            portion=portion,
            to_train=True,
        )

    with cached_token_ids():
        text, shortest = _tokens_of_text(checkpoint, training)
        if shortest - round(TRAINED_SHARE * shortest) < training.length - begins_with_bos(tokenizer):
            raise SecateurError(
                f"{training.calibration}: too short, it has {shortest:,} tokens, of which {1 - TRAINED_SHARE:.0%} are "
                f"held out; rows of {training.length} tokens need {training.length / (1 - TRAINED_SHARE):,.0f}, or use "
                "a smaller --length"
            )
        return draw(count, Portion(0.0, TRAINED_SHARE)), draw(HELD_OUT, Portion(TRAINED_SHARE, 1.0)), text
