"""Documents of a source of text: a file, standard input or a data set."""

import sys
from codecs import BOM_UTF8
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.text.data_sets import MAX_CHARACTERS, Split, data_set_documents, is_data_set_folder
from secateur.text.jsonl import jsonl_documents
from secateur.text.sources import GENERAL, RANDOM, SELF, STDIN, text_added_to_general

_NOT_TEXT = {
    RANDOM: "random ids are not text",
    GENERAL: "general is the default calibration text of secateur, and cannot be read as a document",
    SELF: "self stands for text that the model generates to be calibrated on",
}
"""Reasons why some sources cannot be read as text."""
_EXTENSIONS = (".txt", ".jsonl")
_OTHER_FILES = (".bin", ".csv", ".gz", ".html", ".json", ".md", ".parquet", ".pdf", ".tsv", ".utf8", ".zip")
"""Extensions of a source that is meant as a file, so that it is never looked up as the name of a data set."""
_PATH_STARTS = (".", "/", "~", "\\")
"""First characters of a source that is meant as a path."""


def read_documents(
    source: str,
    tokenizer: Any = None,
    *,
    split: Split = "calibration",
    characters: int = MAX_CHARACTERS,
) -> list[str]:
    """Read the documents of a source.

    Args:
        source: A `.txt` file, which is one document; a `.jsonl` file with one object a line, whose text is under the
            key `text` or `messages`; `-` for plain text on standard input; or a data set, by a shorthand (wikitext2,
            c4, ptb, bookcorpus) or as `name`, `name:config` or `name:config:column`.
        tokenizer: The tokenizer whose chat template renders `messages`; not needed otherwise.
        split: The part of a data set: `calibration` reads the train split, `evaluation` the test or validation split.
            Files have no splits.
        characters: Number of characters after which reading a data set stops. Files are read whole.

    Returns:
        The documents, of which at least one holds text.

    Raises:
        SecateurError: The source does not exist, cannot be reached, or is not what its name says.
    """
    if source in _NOT_TEXT:
        raise SecateurError(f"{_NOT_TEXT[source]}: name a file or a data set")
    if source == STDIN:
        source, documents = "standard input", [_standard_input()]
    elif is_file(source):
        documents = _file_documents(source, tokenizer)
    else:
        documents = data_set_documents(source, split, characters)
    if not any(document.strip() for document in documents):
        raise SecateurError(f"{source} holds no text: give some")
    return documents


def is_file(source: str) -> bool:
    """Return whether a source names a file.

    Raises:
        SecateurError: The source looks like a file, but does not exist, is not a regular file or has an extension
            that is not read.
    """
    if (text := text_added_to_general(source)) is not None:
        if text in _NOT_TEXT:
            raise SecateurError(f"{source}: what is added to general must be a text, so name a file or a data set")
        return is_file(text)
    if source in (*_NOT_TEXT, STDIN):
        return False
    if not source.strip():
        raise SecateurError("no text is named: give a .txt or .jsonl file, - or a data set")
    path = local_path(source)
    suffix = path.suffix.lower()
    if suffix not in _EXTENSIONS and is_data_set_folder(source):
        return False
    looks_like_file = suffix in (*_EXTENSIONS, *_OTHER_FILES) or source.startswith(_PATH_STARTS)
    if not (looks_like_file or path.is_file()):
        return False
    _check_file(path, source)
    return True


def _check_file(path: Path, source: str) -> None:
    """Raise `SecateurError` unless a path is a regular file with an extension that is read."""
    if path.is_dir():
        raise SecateurError(f"{source} is a folder, not a file: check the path of the text")
    if not path.exists():
        raise SecateurError(f"{source} does not exist: check the path of the text")
    if not path.is_file():
        raise SecateurError(f"{source} is not a regular file: give - and pipe its text in")
    if path.suffix.lower() not in _EXTENSIONS:
        raise SecateurError(f"{source} has an unknown extension: text is read from .txt and .jsonl files, or from -")


def _file_documents(source: str, tokenizer: Any) -> list[str]:
    """Return the documents of a .txt or .jsonl file."""
    try:
        data = local_path(source).read_bytes()
    except OSError as error:
        raise SecateurError(f"{source} cannot be read: {error.strerror or error}") from error
    text = _decode(data, source)
    return list(jsonl_documents(text, source, tokenizer)) if source.lower().endswith(".jsonl") else [text]


def _standard_input() -> str:
    """Return the text on standard input."""
    if sys.stdin is None:
        raise SecateurError("standard input is closed: pipe a text in, or name a file")
    return _decode(_piped(sys.stdin), "standard input")


@cache
def _piped(stream: TextIO) -> bytes:
    """Read a stream to its end; the bytes are remembered, since two models may be scored on them."""
    return stream.buffer.read()


def _decode(data: bytes, source: str) -> str:
    """Decode UTF-8 strictly: a binary file read with replacement characters would calibrate on noise."""
    if not data:
        raise SecateurError(f"{source} is empty: give some text")
    position = data.find(b"\0")
    if position >= 0:
        raise SecateurError(f"{source} is not text: byte {position} is NUL; give a text in UTF-8")
    mark = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{source} is not UTF-8: invalid byte at {mark + error.start}; convert it to UTF-8"
        ) from error
    return text.replace("\r\n", "\n")
