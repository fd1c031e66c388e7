"""Calibration rows in a .jsonl file: a row a line, its text for people and other tools, its token ids for us.

The ids decide. What a model writes need not be what its tokenizer makes of the text, so that the text alone would not
give the same rows again; it does tell whether the ids belong to the tokenizer at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.files import parse_json, write_whole
from secateur.text.documents import is_file

KEY = "token_ids"


def write_rows(path: Path, rows: Tensor, tokenizer: Any) -> None:
    """Write rows (rows x length), each with its text, special tokens left out."""
    lines = (json.dumps({"text": _text(tokenizer, ids), KEY: ids}, ensure_ascii=False) for ids in rows.tolist())
    write_whole(path, "".join(f"{line}\n" for line in lines))


def holds_rows(source: str) -> bool:
    """Whether a source is a file of this kind; told by its first line, whatever that is otherwise."""
    if not is_file(source) or not source.lower().endswith(".jsonl"):
        return False
    with Path(source).expanduser().open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = parse_json(first)
    except ValueError:
        return False
    return isinstance(row, dict) and KEY in row


def read_rows(
    source: str, tokenizer: Any, *, samples: int, length: int, vocab_size: int, option: str = "samples", taken: int = 0
) -> Tensor:
    """The first rows of a file, in its order; longer ones are cut behind `length` tokens.

    Args:
        source: The file.
        tokenizer: The model's, which must give each row's text back.
        samples: Rows.
        length: Tokens in a row.
        vocab_size: Every id is below it.
        option: What a person calls the number of rows.
        taken: Rows among them that this number does not count.

    Returns:
        Token ids, int64 [samples, length].

    Raises:
        SecateurError: The file holds fewer rows or shorter ones, or rows of another tokenizer.
    """
    rows: list[list[int]] = []
    # A newline alone ends a line: texts may hold other separators.
    for number, line in enumerate(Path(source).expanduser().read_bytes().split(b"\n"), start=1):
        if line.strip() and len(rows) < samples:
            rows.append(_row(line, f"{source} line {number}", tokenizer, length, vocab_size))
    if len(rows) < samples:
        advice = f"take {option} {len(rows) - taken}" if len(rows) > taken else "take a longer file"
        raise SecateurError(f"{source}: too short for the samples, it has {len(rows)} rows, not {samples}; {advice}")
    return torch.tensor(rows, dtype=torch.int64)


def _row(line: bytes, where: str, tokenizer: Any, length: int, vocab_size: int) -> list[int]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise SecateurError(f"{where} is not JSON ({error}): correct or remove it") from error
    ids, text = (row.get(KEY), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or not isinstance(text, str):
        raise SecateurError(f"{where} has no text and {KEY} as the lines before it: correct or remove it")
    if ids and max(ids) >= vocab_size:
        raise SecateurError(f"{where} has id {max(ids)}, but the model has {vocab_size} ids: another model's rows")
    if _text(tokenizer, ids) != text:
        raise SecateurError(f"{where}: {KEY} are not those of text; leave {KEY} out where another model is to read it")
    if len(ids) < length:
        raise SecateurError(
            f"{where} has {len(ids)} tokens, not {length}; take length {len(ids)}, or write the rows anew"
        )
    return ids[:length]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
