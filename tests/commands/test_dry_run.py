"""Dry runs: operations as real runs carry them out, bytes as counted by hand, and no output."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import CheckpointFolder
from models import VOCAB, save
from secateur import BlockStream, Rows, open_checkpoint, prune
from secateur.base.device import fast_dtype
from secateur.commands import draw_rows, dry_run, machine_speed
from secateur.commands.costs import fit_work, gradient_work
from secateur.commands.machine_speed import Speeds
from secateur.commands.work import Work
from secateur.model import stream as stream_module
from secateur.report.summary import Summary
from secateur.survey.probes import POSITION_STRIDE
from secateur.text import draw
from secateur.text.self_calibration import BATCH_ROWS

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


def test_the_survey_takes_the_counted_operations(checkpoint_folder, tmp_path, expected):
    from secateur.commands.survey_file import split_survey_rows
    from secateur.survey.survey import survey

    how = {"samples": 60, "length": 30, "survey": tmp_path / "survey.json"}
    first = expected(speeds=PRODUCTS, **how)
    prune(checkpoint_folder("llama"), tmp_path / "out", **SIZE | how | {"dry_run": False, "effort": "quick"})
    seconds = first.seconds - expected(speeds=PRODUCTS, **how).seconds
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    few, probed = split_survey_rows(torch.zeros(60, 30, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        found = survey(stream, few, probe_rows=probed)
    # The output layer is left out of what is expected.
    head = 2 * stream.width * VOCAB * (len(found.probes) + 1) * probed.numel() / POSITION_STRIDE
    assert 0.7 < seconds / dry_run.SLACK / (counter.get_total_flops() - head) < 1.4


def test_a_dry_run_neither_generates_nor_resamples(expected, monkeypatch):
    for module, name in ((draw, "self_rows"), (draw_rows, "resample_tokens")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the model was run"))
    assert expected(effort="best", calibration="self").is_dry_run


def test_the_work_of_generating_text(checkpoint_folder, expected, monkeypatch):
    stored = open_checkpoint(checkpoint_folder("llama"))
    parameters = sum(info.entries for info in stored.tensors.values())
    row = SIZE["length"]
    only: dict[str, Any] = {"speeds": {"generated": 1.0}, "effort": "quick"}
    for options, rows in (
        ({}, 0),
        ({"refit_samples": 3}, 0),
        ({"calibration": "self"}, 4),
        ({"calibration": "self", "refit_samples": 3}, 7),
        ({"refit_calibration": "self"}, 4),
    ):
        assert expected(**only, **options).seconds == dry_run.SLACK * 2 * parameters * rows * row
    # Three blocks of three groups, keys and values of eight float32 each.
    cache = min(BATCH_ROWS, 4096 // row) * (row + 1) * 3 * 3 * 2 * 8 * 4
    for name in ("survey_work", "resampling_work", "fit_work"):
        monkeypatch.setattr(dry_run, name, lambda *_: Work())
    assert expected(calibration="self").peak_bytes == round(1.1 * (stored.bytes + cache))
    assert expected().peak_bytes == 0


def test_the_memory_of_fits(checkpoint_folder, expected):
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    rows = Rows((torch.zeros(4, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)), (1.0, 0.0))
    widths = {0: stream.blocks[0].width | {"channels": 40}}

    def held(fits: int, steps: int = 0) -> int:
        resampled = rows.with_resampled(*[rows.groups[0]] * fits) if fits else rows
        return fit_work(stream, resampled, widths, steps).activation_bytes

    # Two streams of each further fit, to the text and its own rows.
    assert held(2) - held(1) == held(3) - held(2) == 4 * 2 * stream.width * 2 * 64
    assert held(0, 2) - held(0) == 64 * (stream.width + 2 * 40) * fast_dtype(stream.device).itemsize
    # Rows of their own to choose by: a channel's Gram matrix and cross moment more.
    how: dict[str, Any] = {"criterion": "second-moment", "recovery": "paper", "widths": "uniform"}
    how |= {"modules": ("channels",), "name": "llama biased"}
    one = expected(samples=64, **how)
    for other in (expected(samples=32, refit_samples=32, **how), expected(samples=32, sigma="random", **how)):
        assert other.peak_bytes - one.peak_bytes == pytest.approx(4.2 * (1.2 * 72 * 72 + 2 * 72 * 48), abs=1)
    assert list(one.effort_seconds) == ["normal"], "only the refit has efforts"


def test_speeds_are_measured_in_the_dtypes_of_the_run(tmp_path, monkeypatch):
    """Products that may be rounded are measured in bfloat16, the others in float32."""
    asked: list[str] = []
    precision = torch.backends.mkldnn.matmul
    monkeypatch.setattr(machine_speed, "product_rate", lambda *_, **__: asked.append(precision.fp32_precision) or 1.0)
    monkeypatch.setattr(stream_module, "fast_dtype", lambda _: torch.bfloat16)
    save("llama", tmp_path / "model", torch.bfloat16)
    before = precision.fp32_precision
    summary = prune(tmp_path / "model", tmp_path / "out", **SIZE)
    assert asked == ["bf16", before]
    assert summary.seconds > 0


def test_work_adds_operations_and_takes_the_largest_memory():
    assert Work.total([Work(1, 2, 3, 4, 5, 6, 7), Work(10, 20, 30, 40, 50, 4, 8)]) == Work(11, 22, 33, 44, 55, 6, 8)
    assert Work.total([]) == Work()
    assert Speeds(1.0, 2.0, 4.0, NEVER, 8.0).seconds(Work(1, 2, 4, 8, 16, 32)) == 5


def test_the_work_of_a_backward_pass(checkpoint_folder, expected):
    """The inputs of all blocks are kept, so memory grows with the number of tokens and blocks."""
    plain, costly = (expected(criterion=name, speeds=PRODUCTS) for name in ("l1", "llm-pruner-vector"))
    assert costly.seconds > plain.seconds
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    less, more = (gradient_work(stream, tokens) for tokens in (1000, 2000))
    assert more.activation_bytes - less.activation_bytes == 4 * 1000 * stream.width * (len(stream) + 1)
    assert (more.resident_bytes, more.float32) == (less.resident_bytes, 2 * less.float32)
