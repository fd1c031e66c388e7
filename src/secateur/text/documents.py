"""Where text comes from: a file, standard input or a data set, read into documents."""

import os
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TextIO

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.json_files import parse_json
from secateur.base.quiet import first_line
from secateur.model.hub_source import out_of_reach
from secateur.model.tokens import begins_with_bos
from secateur.text.sources import GENERAL, RANDOM, SELF, STDIN, beside_general

Split = Literal["calibration", "evaluation"]

MOST_CHARACTERS = 16_000_000
"""How much of a data set is read: some four million tokens of English, more than any calibration uses."""

_EXTENSIONS = (".txt", ".jsonl")
# A source that ends like this is meant as a file, so it is never looked up as the name of a data set.
_OTHER_FILES = (".bin", ".csv", ".gz", ".html", ".json", ".md", ".parquet", ".pdf", ".tsv", ".utf8", ".zip")


@dataclass(frozen=True)
class _Dataset:
    """Where the text of a named data set is found."""

    name: str
    config: str | None = None
    column: str | None = None
    """None: the column `text`, or the only one that holds strings."""
    evaluation: tuple[str, ...] = ("test", "validation")
    """The splits that serve to evaluate, the preferred one first; calibration always reads `train`."""
    revision: str | None = None
    data_files: dict[str, str] | None = None
    stream: bool = True
    """Read as it arrives and leave no copy in the cache; off where the whole set is small."""
    join: str | None = None
    """Rows are pieces of running text: joined with this into one document."""


# Each of these is stored as Parquet or JSON: data sets that need their own loading script can no longer be
# loaded. PTB's usual evaluation is its validation split; BookCorpus has no held-out text.
_SHORTHANDS = {
    "wikitext2": _Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "text", ("test",), stream=False),
    "c4": _Dataset(
        "allenai/c4",
        column="text",
        evaluation=("validation",),
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ptb": _Dataset(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        evaluation=("validation",),
        revision="refs/convert/parquet",
        stream=False,
    ),
    "bookcorpus": _Dataset("rojagtap/bookcorpus", column="text", evaluation=(), join=" "),
}


def read_documents(
    source: str,
    tokenizer: Any = None,
    *,
    split: Split = "calibration",
    characters: int = MOST_CHARACTERS,
) -> list[str]:
    """Read the documents of a source.

    Args:
        source: A `.txt` file (one document); a `.jsonl` file, an object a line with the key `text` or else
            `messages`; `-` for plain text on standard input; or a data set, by shorthand (wikitext2, c4, ptb,
            bookcorpus) or as `name`, `name:config` or `name:config:column`.
        tokenizer: Renders `messages` by its chat template; not needed otherwise.
        split: Which part of a data set: the train split to calibrate, test or validation to evaluate.
            Files have no splits.
        characters: Where to stop reading a data set; files are read whole.

    Returns:
        The documents, not empty as a whole.

    Raises:
        SecateurError: The source does not exist, cannot be reached, or is not what its name says.
    """
    if source == RANDOM:
        raise SecateurError("random ids are not text: name a file or a data set")
    if source == GENERAL:
        raise SecateurError("general is what models are calibrated on by default: name a file or a data set")
    if source == SELF:
        raise SecateurError("self is what the model writes to prune itself by: name a file or a data set")
    if source == STDIN:
        source = "standard input"
        if sys.stdin is None:
            raise SecateurError("standard input is closed: pipe a text in, or name a file")
        documents = [_decode(_piped(sys.stdin), source)]
    elif is_file(source):
        text = _decode(_read(source), source)
        documents = list(_jsonl(text, source, tokenizer)) if source.lower().endswith(".jsonl") else [text]
    else:
        documents = _from_dataset(source, split, characters)
    if not any(document.strip() for document in documents):
        raise SecateurError(f"{source} holds no text: give some")
    return documents


def is_file(source: str) -> bool:
    """Whether a source names a file, which then exists; raises where it looks like one but is not."""
    if (own := beside_general(source)) is not None:
        return is_file(own)
    if source in (GENERAL, RANDOM, SELF, STDIN):
        return False
    if not source.strip():
        raise SecateurError("no text is named: give a .txt or .jsonl file, - or a data set")
    path = local_path(source)
    suffix = path.suffix.lower()
    folder = local_path(source.split(":")[0])
    if suffix not in _EXTENSIONS and folder.is_dir():
        if next(folder.rglob("*.parquet"), None) is None:
            raise SecateurError(f"{source} is a folder without Parquet files: name a .txt or .jsonl file")
        return False  # with a config and a column perhaps
    named = suffix in _EXTENSIONS or suffix in _OTHER_FILES or source.startswith((".", "/", "~", "\\"))
    if not (named or path.is_file()):
        return False
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise SecateurError(f"{source} is no regular file: give - and pipe its text in")
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise SecateurError(f"{source} {what}: check the path of the text")
    if suffix not in _EXTENSIONS:
        raise SecateurError(f"{source} has an unknown extension: text is read from .txt and .jsonl files, or from -")
    return True


@cache
def _piped(stream: TextIO) -> bytes:
    """All of standard input; remembered, since two models may be scored on it."""
    return stream.buffer.read()


def _read(source: str) -> bytes:
    try:
        return local_path(source).read_bytes()
    except OSError as error:
        raise SecateurError(f"{source} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, source: str) -> str:
    """Bytes to text, strictly: a binary file read with replacement characters would calibrate on noise."""
    if not data:
        raise SecateurError(f"{source} is empty: give some text")
    position = data.find(b"\0")
    if position >= 0:
        raise SecateurError(f"{source} is not text: a NUL at byte {position}; give UTF-8 text")
    mark = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{source} is not UTF-8: invalid byte at {mark + error.start}; convert it to UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _jsonl(text: str, source: str, tokenizer: Any) -> Iterator[str]:
    """The documents of a .jsonl file; lines end at newlines only, since strings may hold other separators."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
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
            document = _chat(row["messages"], where, tokenizer)
        else:
            raise SecateurError(f"{where} has neither text nor messages: add one of these keys")
        try:
            document.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SecateurError(f"{where} holds half of a surrogate pair, which is no character: remove it") from error
        yield document


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    """A conversation as the model was trained to see it."""
    if not isinstance(messages, list) or not messages or not all(isinstance(entry, dict) for entry in messages):
        raise SecateurError(f"{where}: messages is not a list of objects with role and content")
    if not getattr(tokenizer, "chat_template", None):
        raise SecateurError(f"{where}: messages need a tokenizer with a chat template; use the key text instead")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise SecateurError(f"{where}: the chat template refuses these messages: {first_line(error)}") from error
    # Many templates write the token that opens every row anyway.
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


def rendered(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """A conversation of ours, by the tokenizer's chat template, or turn by turn where it has none."""
    if getattr(tokenizer, "chat_template", None):
        try:
            return _chat(messages, "the package's text", tokenizer)
        except SecateurError:
            pass
    return "\n\n".join(message["content"] for message in messages)


def _from_dataset(source: str, split: Split, characters: int) -> list[str]:
    dataset = _SHORTHANDS.get(source) or _Dataset(*_parts(source))
    if split == "evaluation" and not dataset.evaluation:
        raise SecateurError(f"data set {source} has no text held out for evaluation: name another one")
    wanted = dataset.evaluation if split == "evaluation" else ("train",)
    splits = _open_dataset(dataset, source)
    name = next((name for name in wanted if name in splits), None)
    if name is None:
        raise SecateurError(
            f"data set {source} has no split {' or '.join(wanted)} for {split}: it has {', '.join(map(str, splits))}"
        )
    try:
        documents = list(_column(splits[name], dataset.column, source, characters))
    except SecateurError:
        raise
    except Exception as error:  # readers of remote files raise whatever their transport raises
        raise SecateurError(f"data set {source} cannot be read: {first_line(error)}") from error
    return documents if dataset.join is None else [dataset.join.join(documents)]


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """`name:config:column`, the last two optional."""
    parts = source.split(":")
    if len(parts) > 3 or not parts[0]:
        raise SecateurError(f"{source} names no data set: write name, name:config or name:config:column")
    name, config, column = (*parts, "", "")[:3]
    return name, config or None, column or None


def _open_dataset(dataset: _Dataset, source: str) -> dict[str, Any]:
    """The splits of a data set: of a folder or the local copy if there is one, else from the hub, else an error."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    local = os.path.isdir(local_path(dataset.name))
    if not local:
        # Asked first: the hub's client would retry for minutes before it looked at the local copy.
        try:
            copy = Cache(
                repo_id=dataset.name,
                dataset_name=dataset.name.split("/")[-1],
                config_name=dataset.config,
                version="auto",
                hash="auto",
            )
            return dict(copy.as_dataset())
        except (ValueError, OSError):
            pass
        reason = out_of_reach()
        if reason is not None:
            raise SecateurError(
                f"data set {source} is not in the local cache, and {reason}: give a .txt or .jsonl file instead"
            )
    try:
        # Without a split this reads the index only; a big data set is streamed, never downloaded whole.
        loaded = datasets.load_dataset(
            str(local_path(dataset.name)) if local else dataset.name,
            dataset.config,
            revision=dataset.revision,
            data_files=dataset.data_files,
            streaming=dataset.stream,
        )
    except Exception as error:  # from a wrong name to a broken connection, each has its own class
        raise SecateurError(f"data set {source} cannot be loaded: {first_line(error)}") from error
    return dict(loaded)


def _column(rows: Iterable[dict[str, Any]], column: str | None, source: str, characters: int) -> Iterator[str]:
    """The texts of one column, until there are enough characters."""
    for row in rows:
        if column is None:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if column is None or column not in row:
            raise SecateurError(
                f"data set {source} has {f'no column {column}' if column else 'no single text column'}: "
                f"write name:config:column with one of {', '.join(map(str, row))}"
            )
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise SecateurError(f"data set {source}: column {column} holds {type(text).__name__}, not text")
        yield text
        characters -= len(text)
        if characters <= 0:
            return
