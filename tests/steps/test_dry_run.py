"""Dry runs: the operations of real runs, and no output."""

from pathlib import Path
from typing import Any

import pytest

from conftest import CheckpointFolder
from products import Counter
from secateur import prune
from secateur.steps import dry_run
from secateur.steps.draw_rows import draw_rows
from secateur.steps.dry_run import usage_by_effort
from secateur.steps.open_model import open_model

SIZE: dict[str, Any] = {"samples": 96, "length": 32, "sparsity": 0.3, "calibration": "random"}


@pytest.fixture
def operations(checkpoint_folder: CheckpointFolder, tmp_path: Path) -> Any:
    """Return a function that returns the number of operations of a run, as a dry run expects it and as it is."""

    def counted(name: str, **options: Any) -> tuple[float, float]:
        options, model = SIZE | options, checkpoint_folder(name)
        with Counter() as real:
            widths = prune(model, tmp_path / "out", **options).widths
        run = open_model(model, **options)
        rows, effort, found = draw_rows(run, dry=True), run.options.effort, run.request.problem.plan(widths)
        with Counter() as counter:
            usage = usage_by_effort(run, rows, found, [effort], counter.total)[effort]
        return usage.seconds, real.total()

    return counted


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"effort": "quick"}),
        ("llama", {"effort": "best", "widths": "uniform"}),
        ("llama", {"blocks": "1:2", "sparsity": 0.1}),
        ("llama", {"effort": "quick", "criterion": "llm-pruner-vector"}),
        ("mixtral", {}),
        ("gemma4_text small", {}),
        ("lfm2", {}),
    ],
)
def test_a_dry_run_expects_the_operations_of_the_run(operations, name, options):
    expected, real = operations(name, **options)
    assert 0.85 < expected / real < 1.2


@pytest.mark.parametrize(
    "options",
    [
        {"calibration": "self", "length": 8},
        {"calibration": "self"},
        {"criterion": "llm-pruner-vector"},
        {"widths": "uniform", "format": "gguf"},
    ],
)
def test_a_dry_run_writes_nothing(letters_folder, tmp_path, options):
    name = "out.gguf" if "format" in options else "out"
    summary = prune(letters_folder("llama"), tmp_path / name, dry_run=True, **SIZE | {"samples": 4} | options)
    assert summary.is_dry_run
    assert list(summary.effort_seconds) == ["quick", "normal", "best"]
    assert summary.seconds == summary.effort_seconds["normal"] > 0
    assert summary.peak_bytes > 0
    assert not [*tmp_path.iterdir()]


def test_a_survey_that_has_a_file_takes_no_time(checkpoint_folder, tmp_path, calls_of):
    asked, surveys = SIZE | {"samples": 4, "survey": tmp_path / "survey.json"}, calls_of(dry_run, "survey_rows")
    prune(checkpoint_folder("llama"), tmp_path / "dry", dry_run=True, **asked)
    assert len(surveys) == 1
    prune(checkpoint_folder("llama"), tmp_path / "out", **asked)
    prune(checkpoint_folder("llama"), tmp_path / "dry", dry_run=True, **asked)
    assert len(surveys) == 1
