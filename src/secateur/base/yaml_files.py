"""YAML files from outside, checked for size and nesting."""

import math
from pathlib import Path
from typing import Any

import yaml

from secateur.base.errors import SecateurError

_MAX_ENTRIES = 1_000_000
"""Largest number of entries of a YAML value, as a few lines of aliases can expand to billions."""


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file.

    Raises:
        SecateurError: The file is not valid YAML, or too large after its aliases are expanded.
    """
    text = path.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SecateurError(f"{path}{line}: not valid YAML ({problem}); correct it") from error
    except RecursionError as error:
        raise SecateurError(f"{path}: nested too deeply; correct it") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # For example the 31st of February, or a number with more digits than Python reads.
        raise SecateurError(f"{path}: a value cannot be read ({error}); correct it") from error
    if _count_entries(value, {}) > _MAX_ENTRIES:
        raise SecateurError(f"{path}: its aliases expand to more than {_MAX_ENTRIES:,} entries; use fewer aliases")
    return value


def _count_entries(value: Any, known: dict[int, float]) -> float:
    """Return the number of entries of a value with all aliases expanded; infinity if a value contains itself.

    Args:
        value: The value of a YAML file.
        known: Counts of the values that were visited before, by id.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        children = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_entries(child, known) for child in children)
    return known[id(value)]
