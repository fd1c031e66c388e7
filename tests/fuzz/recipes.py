"""Invalid recipes of `secateur compare`."""

from mutate import DEEP, DIGITS

_RECIPE = "title: t\nevaluation: {perplexity: [wikitext2]}\n"
RECIPES = (
    "a: " + "[" * DEEP,
    "a: " + "[" * 900 + "]" * 900,
    "{a: " * DEEP,
    "- " * DEEP,
    _RECIPE
    + "a: &a [x, x]\n"
    + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=False)
    ),
    _RECIPE + "options: &a {x: *a}",
    _RECIPE + "runs: &a {x: *a}",
    _RECIPE + "options: &a {<<: *a}",
    _RECIPE + "grid: {seed: 2020-02-31}",
    _RECIPE + "grid: {seed: [2020-01-01 25:61:61]}",
    _RECIPE + "grid: {seed: [!!int x]}",
    _RECIPE + "grid: {seed: [!!binary x]}",
    _RECIPE + f"grid: {{seed: [{DIGITS}]}}",
    _RECIPE + f"grid: {{sparsity: [{DIGITS}.5, .inf, .nan, 1e400]}}",
    _RECIPE + "grid: {seed: [0b, 0x, 1_0, 190:20:30, 1:1]}",
    _RECIPE + "{a: b}: c",
    _RECIPE + "? [a, [b]]\n: c",
    _RECIPE + "!!python/object/apply:os.system [ls]",
    _RECIPE + "grid: " + str({name: list(range(1, 3001)) for name in ("seed", "samples", "length")}),
    "%YAML 9.9\n---\na: b",
    "a: b\n---\nc: d",
    "\ufeff" + _RECIPE,
    "a: \x07",
    "",
    "[]",
)
