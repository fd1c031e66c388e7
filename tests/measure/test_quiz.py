"""The quiz: its questions, and the answers that a model ranks first."""

from typing import Any

import torch
from command_line import SMALL
from torch import nn

from models import build, make_letters
from outputs import error_of
from secateur.measure.quiz import answer_quiz, questions
from secateur.model.tokens import encode


def test_every_question_has_one_right_and_three_wrong_answers():
    found = questions()
    assert len(found) == len({question.text for question in found}) == 100
    assert all(len(set(question.answers)) == 4 for question in found)
    assert all(text.strip() == text and text for question in found for text in (question.text, *question.answers))


class Knowing(nn.Module):
    """Model that expects the right answers of the questions at even places, and wrong answers of the others."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.rows = [
            encode(tokenizer, f"{text} {answers[0 if place % 2 == 0 else 3]}", special=True)
            for place, (text, answers) in enumerate(questions())
        ]

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """Return logits that are high for the next token of the expected row."""
        logits = torch.zeros(*input_ids.shape, 128)
        row = next(row for row in self.rows if row in (ids[: len(row)] for ids in input_ids.tolist()))
        for place, token in enumerate(row[1:]):
            logits[:, place, token] += 3.0
        return type("Output", (), {"logits": logits})


def test_the_likeliest_answer_counts():
    tokenizer = make_letters()
    result = answer_quiz(Knowing(tokenizer), tokenizer)
    assert (result.name, result.items) == ("quiz", 100)
    # In a few questions a wrong answer begins like the expected one and is shorter.
    assert sum(result.acc.outcomes[0::2]) >= 45
    assert sum(result.acc.outcomes[1::2]) <= 5


def test_logits_must_be_finite():
    model = build("llama")
    model.lm_head.weight.data[5] = float("nan")
    assert "logits are not finite" in error_of(answer_quiz, model, make_letters())


def test_eval_prints_both_accuracies(place, run):
    make_letters().save_pretrained(place / "model")
    (place / "text.txt").write_text("the sea takes the steps " * 60)
    assert run("prune", "model", "out", *SMALL).code == 0
    result = run("eval", "out", "--against", "model", "--quiz", "--no-answers")
    assert result.code == 0, result.err
    (row,) = [line for line in result.out.splitlines() if "quiz acc" in line]
    assert row.count("±") == 2
    assert "Zero-shot: quiz 100 items; ± one standard error" in result.out
