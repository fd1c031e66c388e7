"""Calibration rows of a run: each fit has resampled rows of its own, and mistakes are errors before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from outputs import record_of, weights_of
from secateur import SecateurError, draw_rows, open_model, prune
from secateur.commands import fit_blocks
from secateur.commands.draw_rows import resample_rows
from secateur.commands.open_model import OpenRun
from secateur.text import draw, self_calibration
from secateur.text.resample import resample_tokens

SIZE: dict[str, Any] = {"samples": 4, "length": 16, "sparsity": 0.3, "calibration": "random"}


def opened(folder: Path, **options: Any) -> OpenRun:
    return open_model(folder, device="cpu", **SIZE | options)


@pytest.mark.parametrize("name", ["llama", "llama biased", "gpt2"])
def test_each_fit_gets_its_own_resampled_rows(checkpoint_folder, name):
    run = opened(checkpoint_folder(name), effort="best", samples=3, length=12, seed=2)
    rows = draw_rows(run)
    assert rows.resampled.shape == (2, 3, 12)
    assert torch.equal(rows.resampled, resample_tokens(run.stream, rows.fit, count=2, seed=2))
    every = torch.cat([rows.fit, *rows.resampled])
    assert len(every.unique(dim=0)) == 9, "no fit takes what another one does"
    # Only where a fit follows, and the same ones whenever they are asked for.
    alone = draw_rows(run, resample=False)
    assert alone.resampled is None
    assert torch.equal(alone.selection, rows.selection)
    assert torch.equal(resample_rows(run, alone).resampled, rows.resampled)


def test_each_fit_uses_its_own_rows(checkpoint_folder, tmp_path, calls_of):
    model, calls = checkpoint_folder("llama"), calls_of(fit_blocks, "refit")
    prune(model, tmp_path / "a", effort="best", **SIZE)
    rows = calls[0][2]
    expected = resample_tokens(opened(model).stream, rows.groups[0], count=2)
    for fit, own in zip(rows.fits(), expected, strict=True):
        assert torch.equal(fit.groups[0], rows.groups[0])
        (found,) = [fit.groups[number] for number in rows.resampled if len(fit.groups[number])]
        assert torch.equal(found, own)
    prune(model, tmp_path / "b", **SIZE)
    assert record_of(tmp_path / "b")["options"]["effort"] == "normal"
    prune(model, tmp_path / "c", effort="normal", **SIZE)
    weights = [weights_of(tmp_path / name) for name in "abc"]
    assert weights[0] != weights[1] == weights[2]


@pytest.mark.parametrize("effort", ["quick", "normal", "best"])
def test_placeholders_have_the_shapes_of_resampled_rows(checkpoint_folder, effort):
    """A dry run draws no resampled rows."""
    run = opened(checkpoint_folder("llama"), effort=effort)
    blank = draw_rows(run, dry=True)
    assert blank.resampled is None
    found, wanted = (
        ([group.shape for group in rows.groups], rows.weights, rows.choice_weights, rows.resampled)
        for rows in (blank.with_placeholders().grouped, draw_rows(run).grouped)
    )
    assert found == wanted


def test_a_model_that_does_not_fit(checkpoint_folder, tmp_path, monkeypatch):
    """The error comes before any text is read; a run without generated rows checks no memory."""
    monkeypatch.setattr(self_calibration, "free_memory", lambda _: 100_000)
    monkeypatch.setattr(draw, "calibration_rows", lambda *_, **__: pytest.fail("the text was read"))
    for source in ("calibration", "refit_calibration"):
        with pytest.raises(SecateurError, match=r"whole model must be in memory, .* GB are free; calibrate on a text"):
            prune(checkpoint_folder("llama"), tmp_path / "out", **SIZE | {source: "self"})
    monkeypatch.undo()
    monkeypatch.setattr(self_calibration, "free_memory", lambda _: 100_000)
    prune(checkpoint_folder("llama"), tmp_path / "out", **SIZE)
