"""Dry runs: operations as real runs carry them out, speeds as measured, and no output."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from conftest import CheckpointFolder
from secateur import prune
from secateur.commands import draw_rows, dry_run
from secateur.commands.machine_speed import Speeds
from secateur.report.summary import Summary
from secateur.text import draw

NEVER = float("inf")
SIZE: dict[str, Any] = {"samples": 4, "length": 16, "sparsity": 0.3, "calibration": "random", "dry_run": True}


@pytest.fixture
def expected(checkpoint_folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that does a dry run at given speeds; other operations take no time."""

    def found(name: str = "llama", speeds: dict[str, float] | None = None, **options: Any) -> Summary:
        every = dict.fromkeys(Speeds._fields, NEVER) | (speeds or {})
        monkeypatch.setattr(dry_run, "measure_speeds", lambda *_: Speeds(**every))
        summary = prune(checkpoint_folder(name), tmp_path / "dry", **SIZE | options)
        assert summary.is_dry_run
        assert not (tmp_path / "dry").exists()
        return summary

    return found


PRODUCTS = {"forward": 1.0, "rounded": 1.0, "float32": 1.0}
"""Speeds of one operation per second, except for generating text."""


@pytest.mark.parametrize(("name", "effort"), [("llama", "quick"), ("llama", "best"), ("mixtral", "normal")])
def test_fits_take_the_counted_operations(checkpoint_folder, tmp_path, expected, name, effort):
    """Torch counts products, including those inside the attention, but no factorisations; hence the tolerance."""
    how: dict[str, Any] = SIZE | {"samples": 64, "length": 32, "effort": effort, "survey": tmp_path / "survey.json"}
    model = checkpoint_folder(name)
    prune(model, tmp_path / "first", **how | {"dry_run": False})
    with FlopCounterMode(display=False) as counter:
        prune(model, tmp_path / "out", **how | {"dry_run": False})
    summary = expected(name, speeds=PRODUCTS, **how)
    assert 0.7 < summary.seconds / dry_run.SLACK / counter.get_total_flops() < 1.4
    assert summary.effort_seconds["quick"] < summary.effort_seconds["normal"] < summary.effort_seconds["best"]
    assert summary.seconds == summary.effort_seconds[effort]


def test_a_dry_run_neither_generates_nor_resamples(expected, monkeypatch):
    for module, name in ((draw, "self_rows"), (draw_rows, "resample_tokens")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the model was run"))
    for options in ({"effort": "best", "calibration": "self"}, {"criterion": "llm-pruner-vector"}):
        assert expected(**options).is_dry_run


@pytest.mark.parametrize("blocks", [None, "1:2", "2:"])
def test_a_survey_takes_the_counted_operations(checkpoint_folder, tmp_path, expected, blocks):
    """Only blocks that may be pruned are measured; probes from them run to the end of the model."""
    how: dict[str, Any] = SIZE | {"samples": 64, "length": 32, "blocks": blocks, "effort": "quick", "sparsity": 0.1}
    model, counts = checkpoint_folder("llama"), {}
    for name, options in {"measured": {}, "known": {"survey": tmp_path / "survey.json"}}.items():
        if options:
            prune(model, tmp_path / "first", **how | options | {"dry_run": False})
        with FlopCounterMode(display=False) as counter:
            prune(model, tmp_path / name, **how | options | {"dry_run": False})
        counts[name] = counter.get_total_flops(), expected("llama", speeds=PRODUCTS, **how | options).seconds
    (total, estimate), (fits, estimated_fits) = counts.values()
    ratio = (estimate - estimated_fits) / dry_run.SLACK / (total - fits)
    assert 0.7 < ratio < 1.4
