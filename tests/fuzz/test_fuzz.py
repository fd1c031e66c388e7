"""Damaged inputs end in a right result or in a one-line error; `make fuzz` runs many more cases.

The environment variables FUZZ and FIRST hold the number of cases and the number of the first one.
"""

import os

import pytest
from bench import Bench
from cases import kind_of, run

FIRST, COUNT = int(os.environ.get("FIRST", 0)), int(os.environ.get("FUZZ", 300))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("number", range(FIRST, FIRST + COUNT), ids=lambda number: f"{number} {kind_of(number)}")
def test_right_or_refused(bench, number, record_property):
    record_property("end", run(bench, number))
