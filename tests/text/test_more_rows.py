"""Rows that each fit takes beside the samples: the right ones in the right fit, and mistakes before any work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from secateur.text.more_rows import more_rows

from conftest import CheckpointFolder
from models import token_rows
from secateur import prune
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent
from secateur.commands import dry_run as expect
from secateur.commands import open as job_step
from secateur.commands.options import Options
from secateur.model.checkpoint import open_checkpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.text import draw, self_calibration
from secateur.text import more_rows as more_step
from secateur.text.rewrite import rewritten
from secateur.text.self_calibration import self_rows

SIZE: dict[str, Any] = {"samples": 4, "length": 16, "sparsity": 0.3, "calibration": "random"}


def rows(stream: BlockStream, text: torch.Tensor, **options: Any) -> torch.Tensor:
    return more_rows(stream, Options(**options), text, watcher=Silent())


@pytest.mark.parametrize("name", ["llama", "llama biased", "gpt2"])
def test_where_they_come_from(checkpoint_folder: CheckpointFolder, name: str) -> None:
    stream, text = BlockStream(open_checkpoint(checkpoint_folder(name))), token_rows(3, 12)
    assert torch.equal(rows(stream, text, seed=2), rewritten(stream, text, copies=2, seed=2))
    own = rows(stream, text, seed=2, more="self", fits=3, temperature=30.0)
    assert own.shape == (3, 3, 12)
    assert len({tuple(row.tolist()) for row in own.flatten(0, 1)}) == 9, "no fit takes what another one does"
    how: dict[str, Any] = {"samples": 9, "length": 12, "temperature": 30.0}
    tokenizer = stream.checkpoint.tokenizer()
    written = [self_rows(stream.checkpoint, tokenizer, seed=seed, **how) for seed in (2 + 0x9E3779B1, 2)]
    assert torch.equal(own.flatten(0, 1), written[0])
    assert not torch.equal(own.flatten(0, 1), written[1]), "not what --calibration self takes"


def test_each_fit_takes_its_own(checkpoint_folder: CheckpointFolder, tmp_path: Path, monkeypatch: Any) -> None:
    given: list[Rows] = []

    def noted(stream: Any, plan: Any, rows: Rows, **how: Any) -> Any:
        given.append(rows)
        return refit(stream, plan, rows, **how)

    refit = job_step.refit
    monkeypatch.setattr(job_step, "refit", noted)
    model = checkpoint_folder("llama")
    prune(model, tmp_path / "a", more="self", **SIZE)
    stream = BlockStream(open_checkpoint(model))
    first, second = given[0].fits()
    expected = rows(stream, first.groups[0], more="self")
    for fit, one in ((first, 0), (second, 1)):
        assert torch.equal(fit.groups[0], given[0].groups[0])
        own = [group for number, group in enumerate(fit.groups) if number in given[0].versions and len(group)]
        assert len(own) == 1
        assert torch.equal(own[0], expected[one])
    record = json.loads((tmp_path / "a" / "secateur.json").read_text())
    assert (record["options"]["more"], record["options"]["fits"]) == ("self", 2)
    prune(model, tmp_path / "b", more="self", **SIZE)
    prune(model, tmp_path / "c", **SIZE)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_dry_run_counts_the_writing(checkpoint_folder: CheckpointFolder, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(more_step, "self_rows", lambda *_, **__: pytest.fail("the model was run"))
    for name in ("stream_flops", "solve_flops", "survey_flops"):
        monkeypatch.setattr(expect, name, lambda *_, **__: 0.0)
    monkeypatch.setattr(expect, "product_rate", lambda *_, **__: 1.0)
    model = checkpoint_folder("llama")

    def seconds(**options: Any) -> float:
        return prune(model, tmp_path / "out", dry_run=True, level1=0, **SIZE | options).seconds

    parameters = sum(info.entries for info in open_checkpoint(model).tensors.values())
    one = 1.5 * 2 * parameters * SIZE["samples"] * SIZE["length"]
    assert seconds() == seconds(more="self", fits=0) == seconds(more="self", recovery="paper") == 0
    assert seconds(more="self", fits=3) == 3 * one
    assert seconds(more="self", fits=3, calibration="self") == 4 * one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"more": "text"}, "more is 'text'; it must be one of self, rewritten"),
        ({"fits": -1}, "fits is -1; it must be at least 0"),
        ({"temperature": 2.0}, "temperature is for what the model writes"),
        ({"temperature": 2.0, "more": "self", "recovery": "none"}, "temperature is for what the model writes"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Options(**options)


def test_a_model_that_does_not_fit(checkpoint_folder: CheckpointFolder, tmp_path: Path, monkeypatch: Any) -> None:
    """Said before the text is read; no memory is asked for where no row is written."""
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=100_000))
    monkeypatch.setattr(self_calibration, "psutil", memory)
    monkeypatch.setattr(draw, "calibration_rows", lambda *_, **__: pytest.fail("the text was read"))
    with pytest.raises(SecateurError, match=r"whole model must be in memory, .* and take --more rewritten"):
        prune(checkpoint_folder("llama"), tmp_path / "out", more="self", **SIZE)
    monkeypatch.undo()
    monkeypatch.setattr(self_calibration, "psutil", memory)
    prune(checkpoint_folder("llama"), tmp_path / "out", more="self", fits=0, **SIZE)
