"""Results as values that JSON can hold."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def json_value(value: Any) -> Any:
    """Return a value as JSON can hold it.

    Data classes and named tuples become dictionaries, paths become text, and numbers that are not finite become None.
    """
    if hasattr(value, "as_dict"):
        return json_value(value.as_dict())
    if hasattr(value, "_asdict"):
        return json_value(value._asdict())
    if is_dataclass(value):
        return {field.name: json_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
