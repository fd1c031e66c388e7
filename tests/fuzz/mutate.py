"""Random damage to bytes, JSON values and headers of safetensors files; invalid family files."""

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

DIGITS = "9" * 5000
"""Number with more digits than Python reads."""
DEEP = 100_000
"""Number of nested brackets, beyond any recursion limit."""

_RAW = "@raw "
"""Prefix of strings that are written to JSON without quotes."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, -(10**9), 2**31, 2**63, 2**64 - 1, 10**30),
    *(0.0, -0.0, 0.5, 1.5, -2.5, 1e-300, 1e38, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "a", "0", "1", "48", "true", "None", "auto", "float16", "../x", "/", "\0", "\n", "\ud800", "é" * 300, "{{"),
    *([], {}, [[]], [None], [1, "a"], [0] * 50, [-1], {"a": 1}, {"": {}}, [[[[[[1]]]]]], {"0": 1}, {"rope_type": "x"}),
    _RAW + DIGITS,
    _RAW + f"-{DIGITS}.5",
    _RAW + "1e400",
    _RAW + "[" * 400 + "]" * 400,
)
"""Values that may replace any JSON value."""


class _DuplicateKey(str):
    """Key that an object may contain twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def spelled(value: Any) -> str:
    """Return a value as JSON; strings that begin with `_RAW` are written without quotes."""
    parts = json.dumps(value).split(f'"{_RAW}')
    return parts[0] + "".join(part.replace('"', "", 1) for part in parts[1:])


def _near(rng: random.Random, value: Any) -> Any:
    """Return a value that is similar to the given one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, value * 2, -value, value * 1000, value / 2, str(value), [value]])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), [value], value * 2, value[::-1]])
    if isinstance(value, list):
        return rng.choice([value[:-1], value + value[:1], value[::-1], value * 2, dict.fromkeys(map(str, value)), []])
    if isinstance(value, dict):
        return rng.choice([list(value), {**value, "a": 1}, dict(list(value.items())[:-1]), {}])
    return 0


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return the containers and keys of all values inside a value, at most 60 of each inner container."""
    found = []
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += _places(inner)[:60]
    return found


def changed(rng: random.Random, value: Any, odd: tuple[Any, ...] = ODD, times: int = 2) -> Any:
    """Return a JSON value with a few values replaced, and keys removed, renamed or duplicated."""
    whole = [copy.deepcopy(value)]
    for _ in range(rng.choice([1, 1, times])):
        places = _places(whole[0]) if isinstance(whole[0], dict | list) else []
        if not places or rng.random() < 0.02:
            whole[0] = rng.choice(odd)
            continue
        owner, key = rng.choice(places)
        what = rng.random()
        if what < 0.5:
            owner[key] = copy.deepcopy(rng.choice(odd))
        elif what < 0.75:
            owner[key] = _near(rng, owner[key])
        elif what < 0.85:
            other, name = rng.choice(places)
            owner[key] = copy.deepcopy(other[name] if name in other or isinstance(other, list) else None)
        elif what < 0.93:
            del owner[key]
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(rng.choice(odd)))
        elif what < 0.97:
            owner[_DuplicateKey(key)] = copy.deepcopy(rng.choice(odd))
        else:
            owner[key + rng.choice("x_ A")] = owner.pop(key)
    return whole[0]


def _damage(rng: random.Random, data: bytearray) -> None:
    """Flip bits, or put other bytes in the place of some: of none, of as many, of some more, or of all the rest."""
    start, size = rng.randrange(len(data)), rng.choice([1, 1, 4, 8, 16, 100, 500])
    if rng.random() < 0.2:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return
    number = rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
    extreme = number.to_bytes(8, "little")[: rng.choice([4, 8])]
    puts = [b"", bytes(size), rng.randbytes(size), bytes(data[start : start + size]), extreme, extreme]
    put = rng.choice([*puts, rng.choice([b'"', b"{", b"}", b"\n", b"\xff", b"9", b"-", b","])])
    drop = rng.choice([0, len(put), len(put), size, len(data)])
    data[start : start + drop] = put


def damaged(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """Return bytes with one to four damages, most of them within the first `within` bytes."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        head = found[:within] if within is not None and rng.random() < 0.8 else found
        if not head:
            break
        rest = found[len(head) :]
        _damage(rng, head)
        found = head if head is found else head + rest
    return bytes(found)


def damaged_file(rng: random.Random, file: Path, odd: tuple[Any, ...] = ODD) -> None:
    """Damage a JSON file: usually its values, sometimes its text."""
    what = rng.random()
    if what < 0.8:
        text = spelled(changed(rng, json.loads(file.read_bytes()), odd)).encode("utf-8", "surrogatepass")
    elif what < 0.97:
        text = damaged(rng, file.read_bytes())
    else:
        text = rng.choice([b"", b"null", b"[" * DEEP, b'{"a":' * DEEP, DIGITS.encode(), b"\xff\xfe{", b'"' * 3])
    file.write_bytes(text)


_HEADER: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, -8, 48.0, 0.5, 2**31, 2**62, 2**63, 2**64, 10**30, "F32", "F4", "F8_E4M3", "I64", "U8"),
    *("BOOL", "", [], {}, [0], [0, 0], [-4, 0], [1, 2**62], [48.0, 48], [2**32, 2**32], [0, 1, 2], [True, 48], "F64"),
    _RAW + DIGITS,
    _RAW + "1e400",
)


def damaged_header(rng: random.Random, file: Path) -> None:
    """Damage the header of a safetensors file, and keep its data."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:
        # One tensor takes an entry of another one.
        names = [name for name in header if name != "__metadata__"]
        first, second = rng.choice(names), rng.choice(names)
        key = rng.choice(["data_offsets", "shape", "dtype"])
        header[first][key] = copy.deepcopy(header[second][key])
    else:
        header = changed(rng, header, _HEADER)
    text = spelled(header).encode("utf-8", "surrogatepass")
    said = len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) - 1, len(text) + 8, 2**40, 2**64 - 1])
    file.write_bytes(struct.pack("<Q", said) + text + data[8 + length :])


_FAMILY = "model_type: t\nstock: {head_counts: dense}\n"
FAMILY_FILES = (
    "a: " + "[" * DEEP,
    "a: " + "[" * 900 + "]" * 900,
    "{a: " * DEEP,
    "- " * DEEP,
    _FAMILY
    + "a: &a [x, x]\n"
    + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=False)
    ),
    _FAMILY + "options: &a {x: *a}",
    _FAMILY + "runs: &a {x: *a}",
    _FAMILY + "options: &a {<<: *a}",
    _FAMILY + "grid: {seed: 2020-02-31}",
    _FAMILY + "grid: {seed: [2020-01-01 25:61:61]}",
    _FAMILY + "grid: {seed: [!!int x]}",
    _FAMILY + "grid: {seed: [!!binary x]}",
    _FAMILY + f"grid: {{seed: [{DIGITS}]}}",
    _FAMILY + f"grid: {{sparsity: [{DIGITS}.5, .inf, .nan, 1e400]}}",
    _FAMILY + "grid: {seed: [0b, 0x, 1_0, 190:20:30, 1:1]}",
    _FAMILY + "{a: b}: c",
    _FAMILY + "? [a, [b]]\n: c",
    _FAMILY + "!!python/object/apply:os.system [ls]",
    _FAMILY + "grid: " + str({name: list(range(1, 3001)) for name in ("seed", "samples", "length")}),
    "%YAML 9.9\n---\na: b",
    "a: b\n---\nc: d",
    "a: \x07",
    "",
    "[]",
)
