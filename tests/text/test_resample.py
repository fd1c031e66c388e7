"""Resampled rows: tokens drawn from the model's own distributions, at the right places and in the right shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import build, token_rows
from outputs import record_of
from secateur import BlockStream, open_checkpoint, prune
from secateur.text import resample
from secateur.text.resample import resample_tokens

SMALL: dict[str, Any] = {"samples": 6, "length": 16, "calibration": "random", "sparsity": 0.3, "widths": "uniform"}


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stream(checkpoint_folder: Callable[[str], Path], name: str) -> BlockStream:
    return BlockStream(open_checkpoint(checkpoint_folder(name)))


def test_draws_follow_the_model(stream, name, monkeypatch):
    monkeypatch.setattr(resample, "RESAMPLED_SHARE", 1.0)
    text, copies = token_rows(1, 6), 4000
    drawn = resample_tokens(stream, text, count=copies)
    with torch.no_grad():
        shares = build(name)(text).logits[0, :-1].softmax(-1)
    assert drawn.shape == (copies, 1, 6)
    assert (drawn[..., 0] == text[0, 0]).all()
    for place in range(5):
        counts = torch.bincount(drawn[:, 0, place + 1], minlength=shares.shape[1]).double()
        expected = copies * shares[place].double()
        likely = expected > 5
        # Chi-squared: its mean is the number of cells, its variance twice that.
        statistic, cells = ((counts - expected).square() / expected)[likely].sum(), int(likely.sum())
        assert statistic < cells + 6 * (2 * cells) ** 0.5


def test_half_of_the_tokens_stay(stream):
    text = token_rows(8, 64)
    drawn = resample_tokens(stream, text, count=2, seed=3)
    same = (drawn == text)[..., 1:].double().mean()
    assert 0.42 < same < 0.62
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, resample_tokens(stream, text, count=2, seed=3))
    assert torch.equal(drawn[:1], resample_tokens(stream, text, seed=3)), "another copy changes nothing about the first"
    assert not torch.equal(drawn, resample_tokens(stream, text, count=2, seed=4))


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"effort": "best"}, 2),
        ({"effort": "normal"}, 1),
        ({"effort": "quick"}, 0),
        ({"recovery": "none"}, 0),
        ({"recovery": "paper"}, 0),
        ({"recovery": "bias", "format": "hf"}, 0),
    ],
)
def test_each_effort_adds_its_resampled_rows(checkpoint_folder, tmp_path, settings, copies):
    prune(checkpoint_folder("llama"), tmp_path / "out", **SMALL, **settings)
    record = record_of(tmp_path / "out")
    found = [count for count, length in record["calibration"]["groups"] if length == 16]
    assert found == [6] * (1 + copies)
    assert record["calibration"]["resampled"] == list(range(2, 2 + copies))
