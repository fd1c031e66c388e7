"""Wrong options are refused when they are set, in Python and on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from outputs import error_of
from secateur import Options, RunOptions
from secateur.fit.recovery import recovery_of


@pytest.mark.parametrize(
    ("owner", "given", "message"),
    [
        (Options, {"calibration": 5}, "calibration is 5; it must be text"),
        (Options, {"samples": "8"}, "samples is '8'; it must be a whole number"),
        (Options, {"samples": 8.5}, "samples is 8.5; it must be a whole number"),
        (Options, {"samples": True}, "samples is True; it must be a whole number"),
        (Options, {"samples": None}, "samples is None; it must be a whole number"),
        (Options, {"sparsity": "25%"}, "sparsity is '25%'; it must be a number"),
        (Options, {"modules": 1}, "modules is 1; it must be a list of names, or names separated by commas"),
        (Options, {"modules": ["heads", 1]}, "modules is ['heads', 1]; it must be a list of names, or names separated"),
        (Options, {"modules": "heads,"}, "modules is 'heads,'; give one or more of heads, channels, experts"),
        (Options, {"samples": 10**5000}, "samples is a number of more than 18 digits; choose a smaller one"),
        (RunOptions, {"survey": 1}, "survey is 1; it must be a path"),
        (RunOptions, {"overwrite": "yes"}, "overwrite is 'yes'; it must be True or False"),
    ],
)
def test_a_wrong_type_is_refused(owner, given, message):
    assert error_of(owner, **given).startswith(message)


def test_equivalent_types_are_converted():
    file = Path(__file__)
    given = Options(sparsity=np.float32(0.25), samples=np.int64(8), modules=["heads"], calibration=file)  # type: ignore[arg-type]
    assert (given.samples, given.calibration) == (8, str(file))
    # As the record keeps them.
    assert json.dumps([given.sparsity, given.samples]) == "[0.25, 8]"
    assert Options(modules="heads, channels").modules == ("heads", "channels")  # type: ignore[arg-type]
    assert RunOptions(survey="a.json").survey == Path("a.json")  # type: ignore[arg-type]


def test_the_default_recovery_is_that_of_the_library():
    assert Options().recovery_settings == recovery_of()
