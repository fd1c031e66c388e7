"""Rows of the source `general`: kinds of text, and `general+TEXT` for half of each."""

import json
import lzma
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from models import BOS, VOCAB, make_tokenizer
from outputs import assert_error
from secateur import calibration_rows
from secateur.text.general import SHARES, TRAINING_FILE, general_documents, rows_per_kind

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"


class Letters:
    """A tokenizer whose ids are letters, so that rows can be read."""

    bos_token_id = None
    name_or_path = "letters"
    chat_template: str | None = None
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(letter), 0x2FF) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"<{message['role']}> {message['content']}\n" for message in messages)


def draw(source: str, samples: int, length: int, tokenizer: Any = None, **more: Any) -> torch.Tensor:
    how: dict[str, Any] = {"samples": samples, "length": length, "seed": 0, "vocab_size": 0x300}
    return calibration_rows(tokenizer or Letters(), source, **how, **more)


def read(row: torch.Tensor) -> str:
    return "".join(map(chr, row.tolist()))


@given(st.integers(1, 5000))
def test_rows_per_kind_add_up_to_the_samples(samples):
    counts = rows_per_kind(samples)
    assert sum(counts.values()) == samples
    for kind, share in SHARES.items():
        assert abs(counts[kind] - samples * share / sum(SHARES.values())) < 1


def test_repeated_rows_have_their_share_except_in_a_training():
    for length in (64, 65):
        rows = draw("general", 256, length)
        half = -(-length // 2)
        twice = (rows[:, : length - half] == rows[:, half:]).all(1)
        counts = rows_per_kind(256)
        assert twice.sum() == counts["repeated"] + counts["repeated ids"]
        # Every stretch of rows has some of them.
        assert all(part.any() for part in twice.split(32))
        trained = draw("general", 256, length, to_train=True)
        assert not (trained[:, : length - half] == trained[:, half:]).all(1).any()


def test_every_kind_of_text_occurs():
    text = "\n".join(map(read, draw("general", 600, 500)))
    for sign in ("def ", " @-@ ", "The answer is ", "self."):
        assert sign in text, sign


def test_a_training_reads_more_documents_of_more_kinds():
    calibration, training = (general_documents(Letters(), to_train) for to_train in (False, True))
    assert set(training) > set(calibration)
    for kind, documents in calibration.items():
        assert len(training[kind]) > len(documents)
    texts = [text for documents in training.values() for text in documents]
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) > 8_000_000


def test_the_source_of_every_document_of_a_training_is_listed():
    listed = set(re.findall(r"`(\S+)` (\S+) \(", TRAINING_FILE.with_name("general_training.md").read_text("utf-8")))
    with lzma.open(TRAINING_FILE, "rt", encoding="utf-8") as lines:
        packages = {json.loads(line)["source"].split(": ")[0] for line in lines}
    assert {tuple(package.split(" ")[:2]) for package in packages} - {("python-stdlib", "3.11.7")} == listed


def test_a_conversation_follows_the_chat_template():
    class Chatting(Letters):
        chat_template = TEMPLATE

    assert "<assistant> " in "\n".join(map(read, draw("general", 200, 300, tokenizer=Chatting())))
    assert "<assistant> " not in "\n".join(map(read, draw("general", 200, 300)))


def test_general_plus_text_takes_half_of_the_rows_from_the_text(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("æ" * 2000)
    rows = draw(f"general+{own}", 21, 50)
    mine = (rows == ord("æ")).all(1)
    assert mine.sum() == 10
    assert torch.equal(rows[~mine], draw("general", 11, 50))
    assert all(part.any() for part in mine.split(7))
    assert not (draw(f"general+{own}", 1, 50) == ord("æ")).any()


def test_advice_for_general_plus_a_short_text(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("æ" * 130)
    assert_error(r"own.txt: too short, .*; use samples 4 ", draw, f"general+{own}", 64, 50)
    assert draw(f"general+{own}", 4, 50).shape == (4, 50)


@pytest.mark.parametrize("bos", [False, True])
def test_a_tokenizer_that_knows_other_words(bos):
    """Whatever it makes of the text, rows are full, and open with BOS exactly if a text does."""
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(bos)
    how: dict[str, int] = {"samples": 9, "length": 16, "seed": 0, "vocab_size": VOCAB}
    rows = calibration_rows(tokenizer, "general", **how)
    assert rows.shape == (9, 16)
    assert bool((rows[:, 0] == BOS).all()) == bos
    assert_error("general needs a tokenizer", calibration_rows, None, "general", **how)
