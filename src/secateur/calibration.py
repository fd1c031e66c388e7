"""Text to batches of token ids, for calibration (random windows) and for evaluation (consecutive rows).

Statistics and perplexities are only comparable when the rows are built alike, so everything that decides
what a row holds stands in this one file: how a source is read, how documents are joined, where a window
may begin, and whether a row opens with the beginning-of-sequence token.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "evaluation"]

RANDOM = "random"
"""The source that is no text: random token ids."""
STDIN = "-"
"""The source that is standard input; it can be read once."""
MOST_CHARACTERS = 16_000_000
"""How much of a data set is read: some four million tokens of English, more than any calibration uses."""

_EXTENSIONS = (".txt", ".jsonl")
# A source that ends like this is meant as a file, so it is never looked up as the name of a data set.
_OTHER_FILES = (".bin", ".csv", ".gz", ".html", ".json", ".md", ".parquet", ".pdf", ".tsv", ".utf8", ".zip")
_JOIN = "\n\n"
_CONNECT_SECONDS = 3.0


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


def check_calibration(source: str, *, samples: int = 1, length: int, max_positions: int | None = None) -> None:
    """What can be found wrong without reading a token: to be called before a large model is opened.

    Args:
        source: As for `read_documents`, or `random`; a file must exist and have a known extension.
        samples: Rows wanted, at least 1.
        length: Tokens in a row, at least 2: a row of one token predicts nothing.
        max_positions: The longest row that the model's positions allow, if there is a limit.

    Raises:
        SecateurError: One of these does not hold.
    """
    if samples < 1:
        raise SecateurError(f"samples is {samples}, but at least 1 is needed")
    if length < 2:
        raise SecateurError(f"length is {length}, but a row needs at least 2 tokens")
    if max_positions is not None and length > max_positions:
        raise SecateurError(f"length is {length}, but the model has {max_positions} positions: take a smaller length")
    _is_file(source)


def read_documents(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    if source == STDIN:
        documents = [_decode(sys.stdin.buffer.read(), "standard input")]
    elif _is_file(source):
        text = _decode(_read(source), source)
        documents = list(_jsonl(text, source, tokenizer)) if source.lower().endswith(".jsonl") else [text]
    else:
        documents = _from_dataset(source, split, characters)
    if not any(document.strip() for document in documents):
        raise SecateurError(f"{'standard input' if source == STDIN else source} holds no text")
    return documents


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its beginning-of-sequence token in front of a text.

    Tried and not looked up: tokenizers keep this in their post-processor, whatever their settings say.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    plain, full = _encode(tokenizer, "a"), _encode(tokenizer, "a", special=True)
    return len(full) > len(plain) and full[0] == bos


def calibration_rows(
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    max_positions: int | None = None,
    split: Split = "calibration",
) -> torch.Tensor:
    """Draw random rows from a source, the same ones for the same seed.

    The text is cut into windows behind a random offset, and windows are drawn without repetition: no token
    is used twice. A row opens with the beginning-of-sequence token exactly if the tokenizer would add it.

    Args:
        tokenizer: The model's; may be None for `random`.
        source: As for `read_documents`; or `random`, token ids drawn evenly, special ones excepted where a
            tokenizer tells which they are.
        samples: Rows.
        length: Tokens in a row, the beginning-of-sequence token included.
        seed: Of the draw.
        vocab_size: Rows of the model's embedding; every id is below it.
        max_positions: The longest row that the model's positions allow, if there is a limit.
        split: Which part of a data set.

    Returns:
        Token ids, int64 [samples, length].

    Raises:
        SecateurError: A source that cannot be read or is too short, a size out of range, or ids that the
            model does not have.
    """
    check_calibration(source, samples=samples, length=length, max_positions=max_positions)
    generator = torch.Generator().manual_seed(seed)
    body = length - _bos_width(tokenizer)
    if source == RANDOM:
        allowed = _plain_ids(tokenizer, vocab_size)
        picks = torch.randint(len(allowed), (samples, body), generator=generator)
        return _with_bos(tokenizer, allowed[picks], vocab_size)
    ids = _ids(tokenizer, read_documents(source, tokenizer, split=split), source, vocab_size)
    spare = len(ids) - samples * body
    if spare < 0:
        raise _too_short(source, len(ids), samples, length, length - body)
    offset = int(torch.randint(min(body, spare + 1), (1,), generator=generator))
    windows = ids[offset : offset + (len(ids) - offset) // body * body].view(-1, body)
    chosen = torch.randperm(len(windows), generator=generator)[:samples]
    return _with_bos(tokenizer, windows[chosen], vocab_size)


def consecutive_rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    length: int,
    tokens: int | None,
    vocab_size: int,
    max_positions: int | None = None,
    split: Split = "evaluation",
) -> torch.Tensor:
    """Cut the beginning of a source into consecutive rows, as perplexity is usually measured.

    Args:
        tokenizer: The model's.
        source: As for `read_documents`.
        length: Tokens in a row, the beginning-of-sequence token included where the tokenizer would add it.
        tokens: Tokens in all rows together; an incomplete last row is dropped. None takes the whole text.
            A shorter text gives fewer rows.
        vocab_size: Rows of the model's embedding; every id is below it.
        max_positions: The longest row that the model's positions allow, if there is a limit.
        split: Which part of a data set.

    Returns:
        Token ids, int64 [rows, length], at least one row.

    Raises:
        SecateurError: A source that cannot be read or does not fill a row, a size out of range, or ids that
            the model does not have.
    """
    check_calibration(source, length=length, max_positions=max_positions)
    if tokens is not None and tokens < length:
        raise SecateurError(f"tokens is {tokens}, which does not fill one row of length {length}")
    body = length - _bos_width(tokenizer)
    # Sixteen characters a token are ample in every script; the floor covers a text of unusual words.
    characters = MOST_CHARACTERS if tokens is None else min(MOST_CHARACTERS, max(16 * tokens, 1_000_000))
    documents = read_documents(source, tokenizer, split=split, characters=characters)
    ids = _ids(tokenizer, documents, source, vocab_size)
    rows = len(ids) // body if tokens is None else min(len(ids) // body, tokens // length)
    if rows == 0:
        raise _too_short(source, len(ids), 1, length, length - body)
    return _with_bos(tokenizer, ids[: rows * body].view(rows, body), vocab_size)


def _is_file(source: str) -> bool:
    """Whether a source names a file, which then exists; raises where it looks like one but is not."""
    if source in (RANDOM, STDIN):
        return False
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix not in _EXTENSIONS and Path(source.split(":")[0]).expanduser().is_dir():
        return False  # a folder of Parquet files, perhaps with a config and a column
    named = suffix in _EXTENSIONS or suffix in _OTHER_FILES or source.startswith((".", "/", "~", "\\"))
    if not (named or path.is_file()):
        return False
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise SecateurError(f"{source} {what}: check the path of the text")
    if suffix not in _EXTENSIONS:
        raise SecateurError(f"{source} has an unknown extension: text is read from .txt and .jsonl files, or from -")
    return True


def _read(source: str) -> bytes:
    try:
        return Path(source).expanduser().read_bytes()
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


def _jsonl(text: str, source: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """The documents of a .jsonl file; lines end at newlines only, since strings may hold other separators."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SecateurError(f"{where} is not JSON: {error}") from error
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


def _chat(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as the model was trained to see it."""
    if not isinstance(messages, list) or not messages or not all(isinstance(entry, dict) for entry in messages):
        raise SecateurError(f"{where}: messages is not a list of objects with role and content")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise SecateurError(f"{where}: messages need a tokenizer with a chat template; use the key text instead")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise SecateurError(f"{where}: the chat template refuses these messages: {_one_line(error)}") from error
    # Many templates write the token that opens every row anyway.
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


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
        raise SecateurError(f"data set {source} cannot be read: {_one_line(error)}") from error
    return documents if dataset.join is None else [dataset.join.join(documents)]


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """`name:config:column`, the last two optional."""
    parts = source.split(":")
    if len(parts) > 3 or not parts[0]:
        raise SecateurError(f"{source} names no data set: write name, name:config or name:config:column")
    name, config, column = (*parts, "", "")[:3]
    return name, config or None, column or None


def _open_dataset(dataset: _Dataset, source: str) -> dict[str, Any]:
    """The splits of a data set: of the local copy if there is one, else from the hub, else an error."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    local = os.path.isdir(Path(dataset.name).expanduser())
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
        offline = datasets.config.HF_HUB_OFFLINE
        host, port = _hub_address()
        if offline or not _answers(host, port):
            why = "the hub is switched off (offline mode)" if offline else f"{host} does not answer"
            raise SecateurError(
                f"data set {source} is not in the local cache and {why}: give a .txt or .jsonl file instead"
            )
    try:
        # Without a split this reads the index only; a big data set is streamed, never downloaded whole.
        loaded = datasets.load_dataset(
            os.path.expanduser(dataset.name) if local else dataset.name,
            dataset.config,
            revision=dataset.revision,
            data_files=dataset.data_files,
            streaming=dataset.stream,
        )
    except Exception as error:  # from a wrong name to a broken connection, each has its own class
        raise SecateurError(f"data set {source} cannot be loaded: {_one_line(error)}") from error
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


def _hub_address() -> tuple[str, int]:
    """Host and port that a request to the hub connects to: its own, or the proxy's."""
    from huggingface_hub import constants

    target = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return target.hostname or "", target.port or (80 if target.scheme == "http" else 443)


def _answers(host: str, port: int) -> bool:
    """Whether a connection opens within seconds; in a thread, since looking up a name has no time limit."""
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return opened.is_set()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text of any length; `verbose=False` because rows are cut to the model's length afterwards."""
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _ids(tokenizer: PreTrainedTokenizerBase | None, documents: list[str], source: str, vocab_size: int) -> torch.Tensor:
    """All documents as one sequence of ids, int64 [tokens]."""
    if tokenizer is None:
        raise SecateurError(f"{source} needs a tokenizer, and the model has none: take the source {RANDOM}")
    ids = torch.tensor(_encode(tokenizer, _JOIN.join(documents)), dtype=torch.int64)
    if len(ids):
        _check_vocabulary(int(ids.max()), vocab_size)
    return ids


def _check_vocabulary(highest: int, vocab_size: int) -> None:
    if highest >= vocab_size:
        raise SecateurError(
            f"the tokenizer gives id {highest}, but the model has {vocab_size} ids: "
            "take the tokenizer that belongs to the model"
        )


def _bos_width(tokenizer: PreTrainedTokenizerBase | None) -> int:
    return int(tokenizer is not None and begins_with_bos(tokenizer))


def _with_bos(tokenizer: PreTrainedTokenizerBase | None, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Rows of text, opened by the beginning-of-sequence token if the tokenizer does so: [rows, length]."""
    if tokenizer is None or not begins_with_bos(tokenizer):
        return rows.contiguous()
    bos = int(tokenizer.bos_token_id)
    _check_vocabulary(bos, vocab_size)
    return torch.cat([torch.full((len(rows), 1), bos, dtype=torch.int64), rows], dim=1)


def _plain_ids(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> torch.Tensor:
    """The ids that stand for text, int64; rows that only pad the embedding are untrained and stay out."""
    if tokenizer is None:
        return torch.arange(vocab_size)
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    plain = [index for index in range(min(vocab_size, len(tokenizer))) if index not in special]
    if not plain:
        raise SecateurError("every id of the tokenizer is a special one, so no random ids can be drawn")
    return torch.tensor(plain, dtype=torch.int64)


def _too_short(source: str, found: int, samples: int, length: int, bos: int) -> SecateurError:
    """What is missing, and what the text at hand would give."""
    name = "standard input" if source == STDIN else source
    body = length - bos
    fits = []
    if samples > 1 and found // body:
        fits.append(f"samples {found // body}")
    if found // samples + bos >= 2:
        fits.append(f"length {found // samples + bos}")
    advice = f"take {' or '.join(fits)}, or a longer text" if fits else "take a longer text"
    return SecateurError(
        f"{name}: text too short for the samples, it has {found:,} tokens, but {samples} x {length} need "
        f"{samples * body:,}; {advice}"
    )


def _one_line(error: BaseException) -> str:
    """The message of somebody else's exception, fit to stand inside a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
