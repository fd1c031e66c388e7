"""Calibration rows of a run: each fit has resampled rows of its own, which follow the model's distributions."""

from typing import Any

import pytest
import torch

from models import build, token_rows
from outputs import record_of, weights_of
from secateur import BlockStream, SecateurError, open_checkpoint, prune
from secateur.steps import fit_blocks
from secateur.text import draw, resample, self_calibration
from secateur.text.resample import resample_tokens

SIZE: dict[str, Any] = {"samples": 4, "length": 16, "sparsity": 0.3, "calibration": "random"}


def test_each_fit_uses_its_own_rows(checkpoint_folder, tmp_path, calls_of):
    model, calls = checkpoint_folder("llama"), calls_of(fit_blocks, "refit")
    prune(model, tmp_path / "a", effort="best", **SIZE)
    rows = calls[0][2]
    expected = resample_tokens(BlockStream(open_checkpoint(model)), rows.groups[0], count=2)
    for fit, own in zip(rows.fits(), expected, strict=True):
        assert torch.equal(fit.groups[0], rows.groups[0])
        (found,) = [fit.groups[number] for number in rows.resampled if len(fit.groups[number])]
        assert torch.equal(found, own)
    prune(model, tmp_path / "b", **SIZE)
    assert record_of(tmp_path / "b")["options"]["effort"] == "normal"
    prune(model, tmp_path / "c", effort="normal", **SIZE)
    weights = [weights_of(tmp_path / name) for name in "abc"]
    assert weights[0] != weights[1] == weights[2]


def test_all_tokens_of_the_text_count(checkpoint_folder, tmp_path):
    """Also rows that only choose units, and rows that are held out for the scale of the final norm."""
    given = SIZE | {"samples": 32, "effort": "quick"}
    assert prune(checkpoint_folder("llama"), tmp_path / "a", **given).tokens == 32 * 16
    assert prune(checkpoint_folder("llama"), tmp_path / "b", **given, refit_samples=40).tokens == (32 + 40) * 16


def test_a_model_that_does_not_fit(checkpoint_folder, tmp_path, monkeypatch):
    """The error comes before any text is read; a run without generated rows checks no memory."""
    monkeypatch.setattr(self_calibration, "memory_of", lambda _: (0, 100_000))
    monkeypatch.setattr(draw, "calibration_rows", lambda *_, **__: pytest.fail("the text was read"))
    for source in ("calibration", "refit_calibration"):
        with pytest.raises(SecateurError, match=r"whole model must be in memory, .* GB are free; calibrate on a text"):
            prune(checkpoint_folder("llama"), tmp_path / "out", **SIZE | {source: "self"})
    monkeypatch.undo()
    monkeypatch.setattr(self_calibration, "memory_of", lambda _: (0, 100_000))
    prune(checkpoint_folder("llama"), tmp_path / "out", **SIZE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_draws_follow_the_model(checkpoint_folder, name, monkeypatch):
    monkeypatch.setattr(resample, "RESAMPLED_SHARE", 1.0)
    text, copies = token_rows(1, 6), 4000
    drawn = resample_tokens(BlockStream(open_checkpoint(checkpoint_folder(name))), text, count=copies)
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


def test_half_of_the_tokens_stay(checkpoint_folder):
    stream, text = BlockStream(open_checkpoint(checkpoint_folder("llama"))), token_rows(8, 64)
    drawn = resample_tokens(stream, text, count=2, seed=3)
    same = (drawn == text)[..., 1:].double().mean()
    assert 0.42 < same < 0.62
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, resample_tokens(stream, text, count=2, seed=3))
    assert torch.equal(drawn[:1], resample_tokens(stream, text, seed=3)), "another copy changes nothing about the first"
    assert not torch.equal(drawn, resample_tokens(stream, text, count=2, seed=4))
