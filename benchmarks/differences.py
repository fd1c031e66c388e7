"""Find the differences between two folders of written files: tensors, JSON values, texts, units and widths.

Versions, seconds and peak memory are not compared, since they vary from run to run.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from torch import Tensor

VARYING_KEYS = {"secateur", "torch", "transformers", "seconds", "peak_bytes", "hash"}
VARYING_FILES = ("timings.json", ".lock")
VARYING_LINES = re.compile(r"^(\w+ \d+( of \d+)?, \d+:\d\d.*|Time: .*)\n", re.MULTILINE)
VARYING_WORDS = re.compile(r"\d+:\d\d(:\d\d)?|peak memory [\d.]+ .B|\b[\d.,]+ (s|seconds|minutes)\b")
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")
SHOWN = 3
"""Number of differences of one file that are printed."""
SMALL = 1e-4
"""Smallest denominator of a relative difference of JSON numbers: far below it a number is rounding error."""


@dataclass(frozen=True)
class Rules:
    """Rules of a comparison: which differences do not count."""

    within: float = 0.0
    """Largest relative difference of numbers that is accepted."""
    renamed: dict[str, str] = field(default_factory=dict)
    """New name of a JSON key by its old one."""
    ignored: tuple[str, ...] = ()
    """Patterns of the names of files that are not compared."""
    masked: tuple[str, ...] = ()
    """Paths that vary from run to run; they are masked in texts."""


def folder_differences(before: Path, after: Path, rules: Rules) -> list[str]:
    """Return one line for each difference; an empty list where the folders are the same."""
    old, new = files_of(before, rules), files_of(after, rules)
    lines = [f"{name}: is missing now" for name in old if name not in new]
    lines += [f"{name}: is new" for name in new if name not in old]
    for name in old:
        if name in new:
            lines += [f"{name}: {line}" for line in file_differences(old[name], new[name], rules)]
    if lines:
        records = [name for name in old if Path(name).name == "secateur.json" and name in new]
        lines += [f"{name}: units are {units_compared(old[name], new[name])}" for name in records]
    return lines


def files_of(folder: Path, rules: Rules) -> dict[str, Path]:
    """Return all files by their path inside the folder; links to folders are not followed."""
    found = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    patterns = (*VARYING_FILES, *rules.ignored)
    return {
        name: file
        for name, file in found.items()
        if not any(fnmatch.fnmatch(part, pattern) for pattern in patterns for part in (name, file.name))
    }


def file_differences(before: Path, after: Path, rules: Rules) -> list[str]:
    """Return one line for each difference between two files of the same name."""
    if before.read_bytes() == after.read_bytes():
        return []
    if before.suffix == ".safetensors":
        return tensor_differences(load_file(before), load_file(after), rules) or other_bytes(rules)
    if before.suffix == ".gguf":
        lines = tensor_differences(gguf_tensors(before), gguf_tensors(after), rules)
        return lines + value_differences(gguf_fields(before), gguf_fields(after), rules) or other_bytes(rules)
    try:
        was, now = (masked(file.read_text(encoding="utf-8"), rules) for file in (before, after))
    except UnicodeDecodeError:
        return ["other bytes"]
    if before.suffix == ".json":
        return value_differences(json.loads(was), json.loads(now), rules)
    return text_differences(was, now, rules)


def other_bytes(rules: Rules) -> list[str]:
    """Return the difference of two files whose tensors are the same: order, padding or metadata."""
    return [] if rules.within else ["the same tensors in other bytes"]


def tensor_differences(old: dict[str, Tensor], new: dict[str, Tensor], rules: Rules) -> list[str]:
    """Compare shapes (widths), dtypes and values; a difference is relative to the tensor's largest value."""
    lines = [f"tensor {name} is missing now" for name in old if name not in new]
    lines += [f"tensor {name} is new" for name in new if name not in old]
    shared = [name for name in old if name in new]
    for name in shared:
        is_now = [(tuple(one[name].shape), str(one[name].dtype)) for one in (old, new)]
        if is_now[0] != is_now[1]:
            lines.append(f"other width: tensor {name} was {is_now[0]}, now {is_now[1]}")
    shares = {name: largest_difference(old[name], new[name]) for name in shared if old[name].shape == new[name].shape}
    far = {name: share for name, share in shares.items() if not share <= rules.within}
    if far:
        worst = max(far, key=lambda name: far[name])
        lines.append(f"{len(far)} of {len(old)} tensors differ, {worst} most: {far[worst]:.2g} of its largest value")
    return cut(lines)


def largest_difference(old: Tensor, new: Tensor) -> float:
    if torch.equal(old, new) or not old.numel():
        return 0.0
    old, new = old.double(), new.double()
    return float((old - new).abs().max() / old.abs().max())


def gguf_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file in float32."""
    tensors = GGUFReader(file).tensors
    return {one.name: torch.tensor(dequantize(one.data, one.tensor_type)) for one in tensors}


def gguf_fields(file: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file, and the type of each tensor."""
    reader = GGUFReader(file)
    types = {f"type of {one.name}": one.tensor_type.name for one in reader.tensors}
    return {name: one.contents() for name, one in reader.fields.items()} | types


def value_differences(old: Any, new: Any, rules: Rules) -> list[str]:
    """Compare two JSON values path by path; numbers that differ come last, those that differ most first."""
    before, after = dict(leaves(old, rules.renamed)), dict(leaves(new, {}))
    shares = {path: share_of(before.get(path), after.get(path)) for path in before | after}
    paths = sorted((path for path in shares if shares[path] > rules.within), key=lambda path: -shares[path])
    return cut([f"{path} was {brief(before.get(path))}, now {brief(after.get(path))}" for path in paths])


def share_of(old: Any, new: Any) -> float:
    """Return the relative difference of two numbers; infinity where other values differ."""
    if type(old) is type(new) and old == new:
        return 0.0
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (old, new)):
        return float("inf")
    share = abs(old - new) / max(abs(old), abs(new), SMALL)
    return share if share >= 0 else float("inf")


def leaves(value: Any, renamed: dict[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a JSON file by their paths; a list of whole numbers is one value."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            if key not in VARYING_KEYS:
                yield from leaves(one, renamed, f"{path}.{renamed.get(key, key)}")
    elif isinstance(value, list) and value and not whole(value):
        for index, one in enumerate(value):
            yield from leaves(one, renamed, f"{path}[{index}]")
    else:
        yield path, value


def whole(value: list[Any]) -> bool:
    return all(isinstance(one, int) for one in value)


def units_compared(before: Path, after: Path) -> str:
    """Say whether two records keep the same units: the lists of whole numbers of each block, under any key."""
    kept = []
    for file in (before, after):
        blocks = json.loads(file.read_text(encoding="utf-8")).get("blocks", [])
        kept.append([sorted(value for _, value in leaves(block, {}) if isinstance(value, list)) for block in blocks])
    return "the same" if kept[0] == kept[1] else "others"


def masked(text: str, rules: Rules) -> str:
    """Return a text without what differs from run to run."""
    for path in rules.masked:
        text = text.replace(path, "FOLDER")
    return VARYING_WORDS.sub("TIME", VARYING_LINES.sub("", text))


def text_differences(before: str, after: str, rules: Rules) -> list[str]:
    """Compare texts line by line; without their numbers where numbers may differ."""
    if rules.within:
        before, after = (NUMBER.sub("#", text) for text in (before, after))
    old, new = before.splitlines(), after.splitlines()
    lines = [f"{brief(a)} -> {brief(b)}" for a, b in zip(old, new, strict=False) if a != b]
    return cut(lines + ([f"{len(old)} lines, now {len(new)}"] if len(old) != len(new) else []))


def cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


def brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
