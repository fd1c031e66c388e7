"""Damaged inputs end in a right result or in a one-line error; `make fuzz` runs many more cases."""

import pytest
from bench import Bench
from cases import KINDS, kind_of, run

CASES = 300


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_right_or_refused(bench: Bench, kind: str) -> None:
    ends = [run(bench, number) for number in range(CASES) if kind_of(number) == kind]
    assert len(ends) == 3 * KINDS[kind][0]
    # Most random configs make a model.
    assert ends.count("skipped") < len(ends) / 2
