"""Documents of a data set: from a folder, from the local cache of the `datasets` library, or from the hub."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.quiet import first_line
from secateur.checkpoints.hub_source import out_of_reach

Split = Literal["calibration", "evaluation"]

MAX_CHARACTERS = 16_000_000
"""Number of characters that are read of a data set: about four million tokens of English, enough for calibration."""


@dataclass(frozen=True)
class _DataSet:
    """Place of the text of a data set."""

    name: str
    """Hub id, or a folder with Parquet files."""
    config: str | None = None
    column: str | None = None
    """Column of the text; None takes the column `text`, or the only one that holds strings."""
    evaluation: tuple[str, ...] = ("test", "validation")
    """Splits for evaluation, the preferred one first. Calibration always reads `train`."""
    revision: str | None = None
    data_files: dict[str, str] | None = None
    stream: bool = True
    """Whether rows are streamed, without a copy in the cache; false for small data sets."""
    join: str | None = None
    """Separator that joins all rows into one document, if rows are pieces of running text."""

    @classmethod
    def of(cls, source: str) -> "_DataSet":
        """Return the data set of a shorthand, or of `name:config:column` with the last two parts optional."""
        if source in _SHORTHANDS:
            return _SHORTHANDS[source]
        parts = source.split(":")
        if len(parts) > 3 or not parts[0]:
            raise SecateurError(f"{source} names no data set: write name, name:config or name:config:column")
        name, config, column = (*parts, "", "")[:3]
        return cls(name, config or None, column or None)

    def splits(self, split: Split) -> tuple[str, ...]:
        """Return the names of the splits to read, the preferred one first."""
        return self.evaluation if split == "evaluation" else ("train",)


# Each of these is stored as Parquet or JSON: data sets that need their own loading script can no longer be
# loaded. PTB is usually evaluated on its validation split; BookCorpus has no held-out text.
_SHORTHANDS = {
    "wikitext2": _DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text", ("test",), stream=False),
    "c4": _DataSet(
        "allenai/c4",
        column="text",
        evaluation=("validation",),
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ptb": _DataSet(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        evaluation=("validation",),
        revision="refs/convert/parquet",
        stream=False,
    ),
    "bookcorpus": _DataSet("rojagtap/bookcorpus", column="text", evaluation=(), join=" "),
}


def is_data_set_folder(source: str) -> bool:
    """Return whether a source is a local folder of Parquet files, with a config and a column perhaps.

    Raises:
        SecateurError: The source is a folder without Parquet files.
    """
    folder = local_path(source.split(":")[0])
    if folder.is_dir() and next(folder.rglob("*.parquet"), None) is None:
        raise SecateurError(f"{source} is a folder without Parquet files: name a .txt or .jsonl file")
    return folder.is_dir()


def data_set_documents(source: str, split: Split, characters: int) -> list[str]:
    """Read the documents of a data set, until they have a number of characters.

    Raises:
        SecateurError: The data set cannot be read, or has no such split or column.
    """
    data_set = _DataSet.of(source)
    names = data_set.splits(split)
    if not names:
        raise SecateurError(f"data set {source} has no text held out for evaluation: name another one")
    splits = _open(data_set, source)
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise SecateurError(
            f"data set {source} has no split {' or '.join(names)} for {split}: it has {', '.join(map(str, splits))}"
        )
    try:
        documents = list(_texts(splits[name], data_set.column, source, characters))
    except SecateurError:
        raise
    except Exception as error:  # readers of remote files raise whatever their transport raises
        raise SecateurError(f"data set {source} cannot be read: {first_line(error)}") from error
    return documents if data_set.join is None else [data_set.join.join(documents)]


def _open(data_set: _DataSet, source: str) -> dict[str, Any]:
    """Return the splits of a data set by name."""
    import datasets

    folder = local_path(data_set.name)
    if not os.path.isdir(folder):
        # The cache is read first, because the hub's client would retry for minutes before it reads the cache.
        if (cached := _cached(data_set)) is not None:
            return cached
        if (reason := out_of_reach()) is not None:
            raise SecateurError(
                f"data set {source} is not in the local cache, and {reason}: give a .txt or .jsonl file instead"
            )
    try:
        # Without a split only the index is read; a large data set is streamed, never downloaded whole.
        loaded = datasets.load_dataset(
            str(folder) if os.path.isdir(folder) else data_set.name,
            data_set.config,
            revision=data_set.revision,
            data_files=data_set.data_files,
            streaming=data_set.stream,
        )
    except Exception as error:  # from a wrong name to a broken connection, each has its own class
        raise SecateurError(f"data set {source} cannot be loaded: {first_line(error)}") from error
    return dict(loaded)


def _cached(data_set: _DataSet) -> dict[str, Any] | None:
    """Return the splits of a data set's copy in the local cache, or None if there is no copy."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        copy = Cache(
            repo_id=data_set.name,
            dataset_name=data_set.name.split("/")[-1],
            config_name=data_set.config,
            version="auto",
            hash="auto",
        )
        return dict(copy.as_dataset())
    except (ValueError, OSError):
        return None


def _texts(rows: Iterable[dict[str, Any]], column: str | None, source: str, characters: int) -> Iterator[str]:
    """Yield the texts of one column, until there are enough characters."""
    for row in rows:
        if column is None and not any(isinstance(value, str) for value in row.values()):
            continue
        column = column or _text_column(row)
        if column not in row:
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


def _text_column(row: dict[str, Any]) -> str | None:
    """Return the column `text` of a row, or the only one that holds a string; None if that is unclear."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    return "text" if "text" in row else strings[0] if len(strings) == 1 else None
