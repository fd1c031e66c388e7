"""The record that `prune` puts beside a model, secateur.json."""

from pathlib import Path
from typing import Any

from secateur.base.json_files import parse_json

RECORD = "secateur.json"


def read_record(folder: Path) -> dict[str, Any]:
    """What `prune` said of a model; nothing where it was saved by something else since, or says nothing readable."""
    try:
        found = parse_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}
