"""The record of a run, secateur.json, which `prune` writes next to the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.base.json_files import parse_json

RECORD = "secateur.json"
MAP_FILE = "vocabulary.json"
"""File of a folder with fewer tokens: which token of the original model each token was."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder; an empty dictionary if there is none or it is not readable as JSON."""
    try:
        record = parse_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def earlier_prunings(folder: Path) -> list[dict[str, Any]]:
    """Return the prunings that made a folder, the first one first; empty for a dense model.

    Anybody may have edited the record, so that only texts and numbers are taken over.
    """
    record = read_record(folder)
    if not isinstance(record.get("command"), str):
        return []
    before = record.get("earlier")
    steps = [one for one in before if isinstance(one, dict)] if isinstance(before, list) else []
    return [
        {
            "model": str(one.get("model")),
            "on_hub": bool(one.get("on_hub")),
            "command": str(one.get("command")),
            "sparsity": {"reached": _share_removed(one)},
            "retrained": bool(one.get("retrained")),
            "later": _texts(one.get("later")),
            "options": {"blocks": _blocks(one)},
            "vocabulary": {"tokens": tokens} if (tokens := tokens_kept(one)) else None,
        }
        for one in (*steps, record)
    ]


def original_model(folder: Path) -> str | None:
    """Return the dense model that a folder was pruned from, as the user named it; None if its record does not say."""
    record = read_record(folder)
    source = next(iter(earlier_prunings(folder)), record).get("model")
    return source if isinstance(source, str) else None


def tokens_kept(step: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the numbers of tokens before and after the vocabulary was cut; None if the record of a step names none."""
    match step.get("vocabulary"):
        case {"tokens": [int(before), int(after)]}:
            return before, after
    return None


def _blocks(step: Mapping[str, Any]) -> str | None:
    """Return the range of blocks to which a pruning was limited, as in `--blocks`; None if it was not."""
    match step.get("options"):
        case {"blocks": str(blocks)} if re.fullmatch("[0-9]{0,9}:[0-9]{0,9}", blocks):
            return blocks
    return None


def _texts(value: Any) -> list[str]:
    """Return the texts of a list; empty if the value is no list."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _share_removed(step: dict[str, Any]) -> float | None:
    """Return the share of the pruned blocks' parameters that a pruning removed; None if its record does not say it."""
    match step.get("sparsity"):
        case {"reached": float(share)}:
            return share
    return None
