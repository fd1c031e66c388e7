"""Quiz: a hundred multiple-choice questions that come with the package, a quick test of accuracy without a download.

The questions are about everyday knowledge. A difference between two models that their interval does not explain is
real, but a hundred questions do not rank models: use the tasks of lm-eval for that.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from secateur.base.progress import Silent, Watcher
from secateur.measure.generation import check_logits
from secateur.measure.perplexity import check_ids, device_of, scoring
from secateur.measure.zero_shot import Accuracy, TaskResult
from secateur.model.tokens import encode_start

FILE = Path(__file__).with_name("quiz.txt")
"""File with a question on each line: the start of a sentence, its right end and three wrong ones, between bars."""
NAME = "quiz"


class Question(NamedTuple):
    """Beginning of a sentence, with its possible ends."""

    text: str
    answers: tuple[str, ...]
    """Possible ends, the right one first."""


@cache
def questions() -> tuple[Question, ...]:
    """Return the questions of the package."""
    lines = (line.split(" | ") for line in FILE.read_text(encoding="utf-8").splitlines())
    return tuple(Question(text, tuple(answers)) for text, *answers in lines)


def answer_quiz(network: Any, tokenizer: Any, *, watcher: Watcher | None = None, what: str = "Scoring") -> TaskResult:
    """Measure the share of questions whose right answer is the likeliest one, by log-likelihood per byte.

    Args:
        network: A causal language model of transformers.
        tokenizer: Its tokenizer.
        watcher: Progress output.
        what: Label of the progress bar.

    Raises:
        SecateurError: The tokenizer has no ids for a question, the model lacks an id or has too few positions, or
            logits are not finite.
    """
    outcomes = []
    with scoring(network):
        for question in (watcher or Silent()).track(questions(), f"{what} {NAME}"):
            lengths = torch.tensor([len(answer.encode()) for answer in question.answers])
            outcomes.append(int((_log_likelihoods(network, tokenizer, question) / lengths).argmax() == 0))
    return TaskResult(NAME, len(outcomes), Accuracy.of(outcomes), None)


def _log_likelihoods(network: Any, tokenizer: Any, question: Question) -> Tensor:
    """Return the log-likelihood of each answer after the text of a question, in nats."""
    start = len(encode_start(tokenizer, question.text))
    rows = [torch.tensor(encode_start(tokenizer, f"{question.text} {end}")) for end in question.answers]
    # Padded on the right, where no token before the padding depends on it.
    ids = pad_sequence(rows, batch_first=True)
    check_ids(network, ids)
    ids = ids.to(device_of(network))
    logits = network(input_ids=ids, use_cache=False).logits.float()
    check_logits(logits.amax(-1))
    scores = logits.log_softmax(-1).cpu()
    return torch.stack(
        [
            scores[number, start - 1 : len(row) - 1].gather(-1, row[start:, None]).sum()
            for number, row in enumerate(rows)
        ]
    )
