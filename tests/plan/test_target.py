"""Targets as users write them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outputs import error_of
from secateur.plan.target import QUANTITIES, Target, parse_target

RATIOS = ("prefill", "decode", "ppl")
AMOUNTS = tuple(name for name in QUANTITIES if name not in RATIOS)


@pytest.mark.parametrize(
    ("text", "value", "relative"),
    [
        ("params=100M", 100e6, False),
        ("params=1.5B", 1.5e9, False),
        ("params=2g", 2e9, False),
        ("params=250k", 250e3, False),
        ("params=1e8", 1e8, False),
        (" Params = 12.5 % ", 0.125, True),
        ("bytes=60mb", 60e6, False),
        ("bytes=1.5GiB", 1.5 * 2**30, False),
        ("bytes=700B", 700, False),
        ("kv=12KiB", 12 * 1024, False),
        ("kv=.5MiB", 2**19, False),
        ("decode=2X", 2.0, True),
        ("ppl=1.2x", 1.2, True),
    ],
)
def test_a_target_is_parsed(text, value, relative):
    target = parse_target(text)
    assert (target.quantity, target.value, target.relative) == (text.split("=")[0].strip().lower(), value, relative)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "params=80%"),
        ("80%", "params=80%"),
        ("sparsity=0.2", "one of params, active, bytes, kv"),
        ("params=", "'' is not a number"),
        ("params=1.2.3M", "'1.2.3M' is not a number"),
        ("params=nan", "'nan' is not a number"),
        ("params=1e999M", "write a number|is not a number"),
        ("params=60MB", "'MB' is not a unit of params"),
        ("bytes=60M", "'M' is not a unit of bytes.*bytes=60MB"),
        ("params=-5M", "at least 1"),
        ("params=0.8", "write 80% for a share"),
        ("params=0.07", "write 7% for a share"),
        ("params=0%", "between 0% and 100%"),
        ("params=100%", "between 0% and 100%"),
        ("prefill=1x", "above 1x"),
        ("prefill=1.5", "'' is not a unit of prefill .use x."),
        ("prefill=60%", "'%' is not a unit of prefill .use x."),
        ("ppl=12", "ppl=1.2x"),
    ],
)
def test_a_wrong_target_is_an_error_with_an_example(text, says):
    error = error_of(parse_target, text)
    assert re.search(says, error)
    assert "for example" in error


positive = st.floats(1, 1e15, allow_nan=False)
targets = st.one_of(
    st.builds(Target, st.sampled_from(AMOUNTS), positive, st.just(False)),
    st.builds(Target, st.sampled_from(AMOUNTS), st.integers(1, 10**14).map(float), st.just(False)),
    st.builds(Target, st.sampled_from(AMOUNTS), st.floats(0, 1, exclude_min=True, exclude_max=True), st.just(True)),
    st.builds(Target, st.sampled_from(RATIOS), st.floats(1, 1e6, exclude_min=True), st.just(True)),
)


@given(targets)
def test_every_target_survives_writing_and_reading(target):
    assert parse_target(str(target)) == target
