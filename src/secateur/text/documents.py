"""Documents of a source of text: a file, standard input or a data set."""

import sys
from codecs import BOM_UTF8
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.json_files import parse_json
from secateur.checkpoints.tokens import ExcessError, begins_with_bos, rendered
from secateur.text.data_sets import MAX_CHARACTERS, Split, data_set_documents, is_data_set_folder
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
    if not source.lower().endswith(".jsonl"):
        return [text]
    # Lines end at newlines only, since JSON strings may hold other line separators.
    lines = enumerate(text.split("\n"), start=1)
    return [_document(line, f"{source} line {number}", tokenizer) for number, line in lines if line.strip()]


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


def _document(line: str, where: str, tokenizer: Any) -> str:
    """Return the document of one line of JSON: its text, or the messages of a conversation, rendered."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise SecateurError(f"{where} is not JSON ({error}): correct or remove it") from error
    if not isinstance(row, dict):
        raise SecateurError(f"{where} is not an object: each line needs the key text or messages")
    if "text" in row:
        document = row["text"]
        if not isinstance(document, str):
            raise SecateurError(f"{where}: text is not a string but {type(document).__name__}")
    elif "messages" in row:
        document = _render(row["messages"], where, tokenizer)
    else:
        raise SecateurError(f"{where} has neither text nor messages: add one of these keys")
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SecateurError(f"{where} holds half of a surrogate pair, which is not a character: remove it") from error
    return document


def _render(messages: Any, where: str, tokenizer: Any) -> str:
    """Return a conversation as the model was trained to see it, by the tokenizer's chat template."""
    if not isinstance(messages, list) or not messages or not all(isinstance(entry, dict) for entry in messages):
        raise SecateurError(f"{where}: messages is not a list of objects with role and content")
    if not has_chat_template(tokenizer):
        raise SecateurError(f"{where}: messages need a tokenizer with a chat template; use the key text instead")
    try:
        text = rendered(tokenizer, messages)
    except SecateurError as error:
        raise type(error)(f"{where}: {error}") from error
    # Many templates write BOS themselves, and every row gets BOS anyway.
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


def render_or_join(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Return a conversation of the package's own text, turn by turn where no chat template accepts it."""
    try:
        return _render(messages, "the package's text", tokenizer)
    except ExcessError:
        raise
    except SecateurError:
        return "\n\n".join(message["content"] for message in messages)


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
