"""The record of a run, secateur.json, which `prune` writes next to the model."""

from pathlib import Path
from typing import Any

from secateur.base.json_files import parse_json

RECORD = "secateur.json"


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder; an empty dictionary if there is none or it is not readable as JSON."""
    try:
        record = parse_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
