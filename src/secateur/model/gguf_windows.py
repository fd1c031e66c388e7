"""Sliding windows in GGUF files, in both directions: llama.cpp's pattern, and which blocks have a window.

The pattern is a list with one flag per block, or a number n: the last of every n blocks has no window; 0 means that all
blocks have one.
"""

from collections.abc import Sequence
from typing import Any


def has_window(pattern: int, index: int) -> bool:
    """Return whether a block has a window, by the pattern's number."""
    return not pattern or index % pattern < pattern - 1


def pattern_of(windows: Sequence[bool]) -> int | None:
    """Return the smallest number that describes which blocks have a window; None if there is no such number."""
    blocks = range(len(windows))
    described = (n for n in range(len(windows) + 1) if list(windows) == [has_window(n, index) for index in blocks])
    return next(described, None)


def layer_types(metadata: dict[str, Any], blocks: int) -> list[str]:
    """Return the type of attention of each block, as configs name it; an empty list if metadata do not state it."""
    pattern = metadata.get("attention.sliding_window_pattern", [])
    windows = pattern if isinstance(pattern, list) else [has_window(pattern, index) for index in range(blocks)]
    return ["sliding_attention" if window else "full_attention" for window in windows[:blocks]]
