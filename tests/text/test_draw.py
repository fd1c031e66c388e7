"""Calibration rows of a run: each fit has resampled rows of its own, and mistakes are errors before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from outputs import record_of, weights_of
from secateur import prune
from secateur.base.errors import SecateurError
from secateur.commands import fit_blocks
from secateur.commands.draw_rows import draw_rows, resample_rows
from secateur.commands.open_model import OpenRun, open_model
from secateur.model.rows import Rows
from secateur.text import draw, self_calibration
from secateur.text.resample import resample_tokens

SIZE: dict[str, Any] = {"samples": 4, "length": 16, "sparsity": 0.3, "calibration": "random"}


def opened(folder: Path, **options: Any) -> OpenRun:
    return open_model(folder, device="cpu", **SIZE | options)


@pytest.mark.parametrize("name", ["llama", "llama biased", "gpt2"])
def test_each_fit_gets_its_own_resampled_rows(checkpoint_folder, name):
    run = opened(checkpoint_folder(name), effort="best", samples=3, length=12, seed=2)
    rows = draw_rows(run)
    assert rows.resampled is not None
    assert rows.resampled.shape == (2, 3, 12)
    assert torch.equal(rows.resampled, resample_tokens(run.stream, rows.fit, count=2, seed=2))
    every = torch.cat([rows.fit, *rows.resampled])
    assert len({tuple(row) for row in every.tolist()}) == 9, "no fit takes what another one does"
    # Only where a fit follows, and the same ones whenever they are asked for.
    alone = draw_rows(run, resample=False)
    assert alone.resampled is None
    assert torch.equal(alone.selection, rows.selection)
    again = resample_rows(run, alone).resampled
    assert again is not None
    assert torch.equal(again, rows.resampled)


def test_each_fit_uses_its_own_rows(checkpoint_folder, tmp_path, monkeypatch):
    given: list[Rows] = []

    def noted(stream: Any, plan: Any, rows: Rows, **how: Any) -> Any:
        given.append(rows)
        return refit(stream, plan, rows, **how)

    refit = fit_blocks.refit
    monkeypatch.setattr(fit_blocks, "refit", noted)
    model = checkpoint_folder("llama")
    prune(model, tmp_path / "a", effort="best", **SIZE)
    first, second = given[0].fits()
    expected = resample_tokens(opened(model).stream, first.groups[0], count=2)
    for fit, one in ((first, 0), (second, 1)):
        assert torch.equal(fit.groups[0], given[0].groups[0])
        own = [group for number, group in enumerate(fit.groups) if number in given[0].resampled and len(group)]
        assert len(own) == 1
        assert torch.equal(own[0], expected[one])
    prune(model, tmp_path / "b", **SIZE)
    record = record_of(tmp_path / "b")
    assert record["options"]["effort"] == "normal"
    prune(model, tmp_path / "c", effort="normal", **SIZE)
    weights = [weights_of(tmp_path / name) for name in "abc"]
    assert weights[0] != weights[1] == weights[2]


@pytest.mark.parametrize("effort", ["quick", "normal", "best"])
def test_placeholders_have_the_shapes_of_resampled_rows(checkpoint_folder, effort):
    """A dry run draws no resampled rows."""
    rows = draw_rows(opened(checkpoint_folder("llama"), effort=effort))
    blank = draw_rows(opened(checkpoint_folder("llama"), effort=effort), dry=True)
    assert blank.resampled is None
    found, wanted = blank.with_placeholders().grouped, rows.grouped
    assert [group.shape for group in found.groups] == [group.shape for group in wanted.groups]
    assert (found.weights, found.choice_weights, found.resampled) == (
        wanted.weights,
        wanted.choice_weights,
        wanted.resampled,
    )


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
