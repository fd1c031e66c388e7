"""Calibration and evaluation rows: their contents, the seed, and an error of one line for each bad source."""

import io
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from models import BOS, BREAK, VOCAB, WORDS, make_tokenizer
from outputs import assert_error, error_of
from secateur import SecateurError, calibration_rows, consecutive_rows
from secateur.checkpoints import hub_source
from secateur.checkpoints.tokens import begins_with_bos
from secateur.text import data_sets
from secateur.text.documents import read_documents

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ '\n' }}{% endfor %}"


def text_of(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + i) % (WORDS - 4)}" for i in range(count))


@pytest.fixture(params=[False, True], ids=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(request.param)


@pytest.fixture
def hundred(tmp_path: Path) -> str:
    """A hundred different tokens, ids 4 to 103 in order."""
    path = tmp_path / "text.txt"
    path.write_text(text_of(100))
    return str(path)


def draw(
    tokenizer: PreTrainedTokenizerFast | None, source: str, samples: int, length: int, seed: int = 0, **more: Any
) -> torch.Tensor:
    return calibration_rows(
        tokenizer, source, samples=samples, length=length, seed=seed, **({"vocab_size": VOCAB} | more)
    )


@pytest.mark.parametrize(("samples", "length"), [(3, 8), (10, 10), (1, 100)])
def test_windows_are_runs_of_the_text_without_overlap(tokenizer, hundred, samples, length):
    rows = draw(tokenizer, hundred, samples, length)
    assert rows.shape == (samples, length)
    assert rows.dtype == torch.int64
    bos = begins_with_bos(tokenizer)
    assert (rows[:, 0] == BOS).tolist() == [bos] * samples
    body = rows[:, int(bos) :]
    assert torch.equal(body.diff(dim=1), torch.ones_like(body[:, 1:]))
    assert body.unique().numel() == body.numel()
    assert body.min() >= 4
    assert body.max() < 104


FILES: dict[str, tuple[bytes, list[str]]] = {
    "UPPER.TXT": (b"\xef\xbb\xbfw1\r\nw2 \xc3\xa9", ["w1\nw2 é"]),
    "odd.jsonl": ('{"text": "a\u2028b"}\r\n{"text": "c"}'.encode(), ["a\u2028b", "c"]),
    "two.jsonl": (b'{"text": "w1 w2"}\n\n{"text": "w3", "messages": 5}\n', ["w1 w2", "w3"]),
}


@pytest.mark.parametrize("name", FILES)
def test_documents_of_a_file(tmp_path, name):
    """A byte order mark is left out, and lines of JSONL end at newlines only."""
    (tmp_path / name).write_bytes(FILES[name][0])
    assert read_documents(str(tmp_path / name)) == FILES[name][1]


def test_documents_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_bytes(FILES["two.jsonl"][0])
    rows = consecutive_rows(make_tokenizer(), str(path), length=4, tokens=4, vocab_size=VOCAB).ids
    assert rows.tolist() == [[5, 6, BREAK, 7]]


def test_standard_input_can_be_read_twice(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text_of(20).encode())))
    for _ in range(2):  # two models may be scored on it
        assert consecutive_rows(make_tokenizer(), "-", length=5, tokens=20, vocab_size=VOCAB).ids.shape == (4, 5)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert_error("standard input is empty", read_documents, "-")


@pytest.mark.parametrize(("bos", "rendered"), [(False, "<s>user w1\n"), (True, "user w1\n")])
def test_messages_are_rendered_and_bos_is_not_doubled(tmp_path, bos, rendered):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}))
    assert read_documents(str(path), make_tokenizer(bos, TEMPLATE)) == [rendered]


def test_random_ids_are_never_special_tokens(tokenizer):
    rows = draw(tokenizer, "random", 40, 50)
    bos = int(begins_with_bos(tokenizer))
    assert (rows[:, 0] == BOS).all() == bool(bos)
    # Ids from WORDS on only pad the model's embedding.
    assert set(rows[:, bos:].unique().tolist()) == set(range(3, WORDS))
    assert torch.equal(rows, draw(tokenizer, "random", 40, 50))
    assert not torch.equal(rows, draw(tokenizer, "random", 40, 50, seed=1))


def test_the_seed_decides_the_windows(tokenizer, hundred):
    assert torch.equal(draw(tokenizer, hundred, 3, 8, seed=1), draw(tokenizer, hundred, 3, 8, seed=1))
    drawn = torch.stack([draw(tokenizer, hundred, 3, 8, seed=seed)[:, 1:] for seed in range(60)])
    assert len(drawn.flatten(1).unique(dim=0)) > 40
    # The offset is random as well: more starts than one alignment has, and both ends of the text.
    assert len(drawn[..., 0].unique()) > 50
    assert int(drawn[..., 0].min()) < 10
    assert int(drawn.max()) == 103


@pytest.mark.parametrize("tokens", [35, None, 10_000])
def test_consecutive_rows_follow_the_text_to_its_end(tokenizer, hundred, tokens):
    rows = consecutive_rows(tokenizer, hundred, length=8, tokens=tokens, vocab_size=VOCAB).ids
    bos = int(begins_with_bos(tokenizer))
    body = 8 - bos
    assert rows.shape == (4 if tokens == 35 else 100 // body, 8)
    assert rows[:, bos:].flatten().tolist() == list(range(4, 4 + len(rows) * body))
    assert (rows[:, 0] == BOS).all() == bool(bos)


BAD_FILES = [
    ("missing.txt", None, "missing.txt does not exist"),
    ("data.csv", b"a,b", "data.csv has an unknown extension"),
    ("README", b"text", "README has an unknown extension"),
    ("empty.txt", b"", "empty.txt is empty"),
    ("blank.txt", b" \n\n", "blank.txt holds no text"),
    ("empty.jsonl", b"\n\n", "empty.jsonl holds no text"),
    ("nul.txt", b"abc\0def", "nul.txt is not text: byte 3 is NUL"),
    ("marked.txt", b"\xef\xbb\xbfcaf\xe9", "marked.txt is not UTF-8: invalid byte at 6"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl line 2 is not JSON"),
    ("list.jsonl", b'\n["a"]', "list.jsonl line 2 is not an object"),
    ("other.jsonl", b'{"content": "a"}', "other.jsonl line 1 has neither text nor messages"),
    ("number.jsonl", b'{"text": 5}', "number.jsonl line 1: text is not a string but int"),
    ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl line 1 holds half of a surrogate pair"),
    ("flat.jsonl", b'{"messages": "hi"}', "flat.jsonl line 1: messages is not a list of objects"),
    ("chat.jsonl", b'{"messages": [{"role": "user"}]}', "chat.jsonl line 1: messages need a tokenizer with a chat"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES, ids=[row[0] for row in BAD_FILES])
def test_bad_files_are_named(tmp_path, name, data, message):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    assert message in error_of(draw, make_tokenizer(), str(path), 1, 4)


SIZES = [
    ({"samples": 0}, "samples is 0"),
    ({"length": 1}, "length is 1"),
    ({"length": 65, "max_positions": 64}, "length is 65, but the model has only 64 positions"),
    ({"samples": 30}, "it has 100 tokens, but 30 rows of 8 tokens need 240; use samples 12 or length 3"),
    ({"samples": 1, "length": 101}, "it has 100 tokens, but 1 row of 101 tokens needs 101; use length 100"),
    ({"samples": 2, "length": 101}, "it has 100 tokens, but 2 rows of 101 tokens need 202; use length 50"),
    ({"samples": 200}, "it has 100 tokens, but 200 rows of 8 tokens need 1,600; use samples 12, or a longer text"),
    ({"vocab_size": 50}, "the tokenizer gives id 103, but the model has 50 ids"),
]


@pytest.mark.parametrize(("change", "message"), SIZES, ids=[row[1] for row in SIZES])
def test_sizes_out_of_range_are_named(hundred, change, message):
    arguments: dict[str, Any] = {"samples": 2, "length": 8} | change
    assert message in error_of(draw, make_tokenizer(), hundred, **arguments)


def test_advice_of_a_short_text_is_right(tokenizer, hundred):
    body = 8 - begins_with_bos(tokenizer)
    with pytest.raises(SecateurError) as caught:
        draw(tokenizer, hundred, 30, 8)
    samples, length = 100 // body, 100 // 30 + begins_with_bos(tokenizer)
    assert f"use samples {samples} or length {length}," in str(caught.value)
    assert draw(tokenizer, hundred, samples, 8).shape == (samples, 8)
    assert draw(tokenizer, hundred, 30, length).shape == (30, length)


def test_sources_that_cannot_be_read(tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"text": "a"}\n{"messages": [{"role": "tool", "content": "w1"}]}')
    refusing = make_tokenizer(template="{{ raise_exception('no tools') }}")
    said = r"chat\.jsonl line 2: the chat template refuses .* no tools"
    assert_error(said, read_documents, str(chat), refusing)
    (tmp_path / "folder.txt").mkdir()
    assert_error(r"folder\.txt is a folder", read_documents, str(tmp_path / "folder.txt"))


def test_evaluation_sizes_are_named(hundred):
    for length, tokens, said in (
        (8, 7, "tokens is 7, which does not fill one row of length 8"),
        (101, None, "100 tokens, but 1 row of 101 tokens needs 101"),
    ):
        assert_error(said, consecutive_rows, make_tokenizer(), hundred, length=length, tokens=tokens, vocab_size=VOCAB)


def test_text_needs_a_tokenizer_and_random_is_no_text(hundred):
    assert_error("needs a tokenizer", draw, None, hundred, 2, 8)
    how = {"length": 8, "tokens": 8, "vocab_size": VOCAB}
    assert_error("random ids are not text", consecutive_rows, make_tokenizer(), "random", **how)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and a cache of our own; returns that cache's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data_sets, "out_of_reach", lambda: "it does not answer")
    return tmp_path / "cache"


@pytest.mark.parametrize("source", ["wikitext2", "c4", "ptb", "bookcorpus", "some/set:config:column"])
def test_an_unreachable_data_set_is_an_error_at_once(hub, source):
    start = time.perf_counter()
    assert_error(f"data set {source} is not in the local cache, and it does not answer", read_documents, source)
    assert time.perf_counter() - start < 10


def test_a_host_that_stays_silent_is_given_up(monkeypatch):
    """Looking up a name may take longer than any time limit of the client."""
    release = threading.Event()
    monkeypatch.setattr(hub_source, "_PATIENCE", 0.1)
    monkeypatch.setattr(hub_source, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub_source, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: release.wait(20)))
    start = time.perf_counter()
    assert "does not answer" in (hub_source.out_of_reach() or "")
    assert time.perf_counter() - start < 10
    release.set()


def parquet_folder(folder: Path, **columns: list[str]) -> str:
    from datasets import Dataset

    folder.mkdir()
    for split, suffix in (("train", "train"), ("test", "held out")):
        table = {name: [f"{value} {suffix}" if value else None for value in values] for name, values in columns.items()}
        Dataset.from_dict(table).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_data_set_splits_columns_and_limit(hub, tmp_path):
    folder = parquet_folder(tmp_path / "set", text=["a", "b"], title=["c", "d"])
    assert read_documents(folder) == ["a train", "b train"]
    assert read_documents(folder, split="evaluation") == ["a held out", "b held out"]
    assert read_documents(f"{folder}::title") == ["c train", "d train"]
    assert read_documents(folder, characters=3) == ["a train"]
    # An empty row says nothing about the columns.
    assert read_documents(parquet_folder(tmp_path / "first", text=["", "a"], title=["c", "d"])) == ["a train"]
    assert_error(r"no column body: .* one of text, title", read_documents, f"{folder}::body")
