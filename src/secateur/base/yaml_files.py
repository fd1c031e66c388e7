"""YAML."""

import math
from pathlib import Path
from typing import Any

import yaml

from secateur.base.errors import SecateurError

_MOST_ENTRIES = 1_000_000
"""Of a YAML file, whose aliases make much of few lines."""


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """What a YAML file holds.

    Raises:
        SecateurError: it is no YAML, with the line, or holds more than any file of ours.
    """
    text = path.read_text(encoding="utf-8")
    try:
        found = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise SecateurError(f"{path}{where}: not YAML ({getattr(error, 'problem', error)}); correct it") from error
    except RecursionError as error:
        raise SecateurError(f"{path}: nested too deeply; correct it") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # A day that no month has, a number with more digits than Python reads.
        raise SecateurError(f"{path}: a value in it cannot be read ({error}); correct it") from error
    if _entries(found, {}) > _MOST_ENTRIES:
        raise SecateurError(f"{path}: its aliases come to more than {_MOST_ENTRIES:,} entries; write out what is meant")
    return found


def _entries(value: Any, known: dict[int, float]) -> float:
    """Entries of a value, as often as they are seen; infinitely many where it is part of itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_entries(one, known) for one in inner)
    return known[id(value)]
