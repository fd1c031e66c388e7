"""Rows of the recovery's own: some rows choose units, and weights are fitted to others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import least_squares, matrix, seen, some_recovery
from torch import Tensor

from conftest import CheckpointFolder
from models import WORDS, blocks_of, build, layers_of, make_tokenizer, relative, token_rows, wide
from secateur import prune
from secateur.base.errors import SecateurError
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import open_model
from secateur.fit.fitted_block import FittedBlock
from secateur.fit.loop import refit
from secateur.fit.method import Method
from secateur.model.checkpoint import open_checkpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.surgery import kept_inputs
from secateur.plan.problem import Plan
from secateur.text.calibration import calibration_rows
from secateur.text.draw import CalibrationRows

NAMES = ["llama", "llama biased", "gpt2", "opt"]
WIDTHS = {"llama": wide(2, 2, 50), "llama biased": wide(2, 2, 50), "gpt2": wide(4, 1, 60), "opt": wide(4, 1, 60)}
FEW, MANY = token_rows(3, 20, seed=5), token_rows(14, 20, seed=9)


def run(folder: Path, name: str, rows: Tensor | Rows, criterion: str = "wanda", **recovery: Any) -> list[FittedBlock]:
    plan = Plan(dict.fromkeys(range(3), WIDTHS[name]), 0.3, 0.3)
    method = Method(criterion, some_recovery(**recovery))
    return list(refit(BlockStream(open_checkpoint(folder)), plan, rows, method=method))


@pytest.mark.parametrize(
    ("name", "method", "when", "criterion"),
    [
        *((name, "refit", "after", "surgeon") for name in NAMES),
        *((name, "paper", "before", "wanda") for name in NAMES),
        *(("llama", "refit", "after", criterion) for criterion in ("second-moment", "wanda", "flap-wifv", "l2")),
        *(("gpt2", "refit", when, "surgeon") for when in ("before", "both")),
        *(("llama biased", "paper", when, "wanda") for when in ("after", "both")),
    ],
)
def test_equal_rows_for_choice_and_fit_change_nothing(
    checkpoint_folder: CheckpointFolder, name: str, method: str, when: str, criterion: str
) -> None:
    folder, how = checkpoint_folder(name), {"method": method, "when": when, "criterion": criterion}
    single = run(folder, name, MANY, **how)
    separate = run(folder, name, Rows.of(MANY).with_choice_rows(Rows.of(MANY)), **how)
    for one, other in zip(single, separate, strict=True):
        assert one.keep == other.keep
        assert one.changed.keys() == other.changed.keys()
        for tensor in one.changed:
            assert relative(other.changed[tensor], one.changed[tensor]) < 1e-4
        for mine, theirs in zip(one.reports, other.reports, strict=True):
            assert theirs.relative == pytest.approx(mine.relative, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("criterion", ["surgeon", "wanda", "flap-wifv"])
@pytest.mark.parametrize("name", NAMES)
def test_units_are_chosen_by_some_rows_and_weights_fitted_to_others(
    checkpoint_folder: CheckpointFolder, name: str, criterion: str
) -> None:
    """The first attention, before which nothing differs; level 2 against least squares in float64."""
    folder = checkpoint_folder(name)
    few = FEW[:1, :6]
    chosen = run(folder, name, few, criterion)[0]
    both = run(folder, name, Rows.of(MANY).with_choice_rows(Rows.of(few)), criterion)[0]
    assert both.keep["heads"] == chosen.keep["heads"]
    model = build(name).double()
    module = blocks_of(model)[0].attention
    x, z = seen(model, 0, module.output_layer, MANY)
    kept = kept_inputs(module, both.keep["heads"])
    old = matrix(layers_of(model)[0], module.output_layer)[kept]
    wanted, shift = least_squares(x[:, kept], z, old, intercept=module.bias is not None)
    found = both.changed[module.output_projection.name]
    found = found if module.output_projection.axis == 0 else found.T
    assert relative(found[kept].double(), wanted) < 1e-4
    if module.bias:
        assert relative(both.changed[module.bias].double(), shift) < 1e-4


# The command's rows.


def write_text(folder: Path, words: int) -> str:
    (folder / "text.txt").write_text(" ".join(f"w{i * i % (WORDS - 4)}" for i in range(words)))
    return str(folder / "text.txt")


def drawn(folder: Path, **options: Any) -> CalibrationRows:
    run = open_model(folder, device="cpu", **({"samples": 4, "length": 16} | options))
    return draw_rows(run, resample=False)


def test_by_default_the_same_rows_choose_and_fit(checkpoint_folder: CheckpointFolder) -> None:
    rows = drawn(checkpoint_folder("llama"), calibration="random")
    assert rows.selection.shape == (4, 16)
    assert rows.held_out is rows.random is None
    assert rows.separate_refit is None


def test_one_source_gives_different_rows_to_the_refit(checkpoint_folder: CheckpointFolder, tmp_path: Path) -> None:
    """All rows come from one draw; the text has one place for each, so that no row can occur twice."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % (WORDS - 4)}" for i in range(9 * 12)))
    options = {"calibration": str(text), "length": 12, "refit_samples": 5}
    rows = drawn(checkpoint_folder("llama"), **options)
    assert rows.separate_refit is not None
    together = torch.cat([rows.selection, rows.separate_refit])
    assert together.shape == (9, 12)
    assert len({tuple(row) for row in together.tolist()}) == 9
    same = drawn(checkpoint_folder("llama"), **options, refit_calibration=str(text))
    assert same.separate_refit is not None
    assert torch.equal(same.separate_refit, rows.separate_refit)


@pytest.mark.parametrize("source", ["random", "self"])
def test_data_free_rows_for_the_refit(checkpoint_folder: CheckpointFolder, tmp_path: Path, source: str) -> None:
    folder, text = checkpoint_folder("gpt2"), write_text(tmp_path, 500)
    rows = drawn(folder, calibration=text, refit_calibration=source, refit_samples=6)
    assert torch.equal(rows.selection, drawn(folder, calibration=text).selection)
    assert rows.separate_refit is not None
    assert torch.equal(rows.separate_refit, drawn(folder, calibration=source, samples=6).selection)
    # As many as of the calibration where no number is given.
    other = drawn(folder, calibration=text, refit_calibration=source)
    assert other.separate_refit is not None
    assert len(other.separate_refit) == 4


def test_a_text_too_short_for_the_refit_rows_is_an_error(checkpoint_folder: CheckpointFolder, tmp_path: Path) -> None:
    text, folder = write_text(tmp_path, 200), checkpoint_folder("llama")
    with pytest.raises(
        SecateurError, match="has 200 tokens, but 13 rows of 16 tokens need 208; use refit-samples 8 or"
    ) as error:
        drawn(folder, calibration=text, refit_samples=9)
    assert "\n" not in str(error.value)
    rows = drawn(folder, calibration=text, refit_samples=8)
    assert rows.separate_refit is not None
    with pytest.raises(SecateurError, match="but 16 rows of 16 tokens need 256; use refit-samples 4 or"):
        drawn(folder, calibration=text, samples=8, refit_calibration=text)
    with pytest.raises(SecateurError, match="but 13 rows of 16 tokens need 208; use refit-samples 12 or"):
        drawn(folder, calibration="random", refit_calibration=text, refit_samples=13)
    with pytest.raises(SecateurError, match="but 40 rows of 16 tokens need 640; use samples 12 or"):
        drawn(folder, calibration="random", refit_calibration=text, samples=40)


@pytest.mark.parametrize("name", ["llama biased", "gpt2"])
def test_prune_uses_both_sets_of_rows(checkpoint_folder: CheckpointFolder, tmp_path: Path, name: str) -> None:
    text = write_text(tmp_path, 3000)
    settings = {
        "samples": 4,
        "length": 16,
        "calibration": text,
        "refit_samples": 64,
        "sparsity": 0.3,
        "effort": "normal",
    }
    summary = prune(checkpoint_folder(name), tmp_path / "out", **settings)
    assert summary.tokens == 62 * 16
    calibration = json.loads((tmp_path / "out" / "secateur.json").read_text())["calibration"]
    shapes, weights, scores = calibration["groups"], calibration["weights"], calibration["choice_weights"]
    openings = [] if " " in name else [0.01]
    # Rows to fit and their copy, two of them held out for the final-norm scale, and those that decide.
    assert shapes[0] == [62, 16]
    assert shapes[len(openings) + 1] == [62, 16]
    assert shapes[len(openings) + 2] == [2, 16]
    assert shapes[len(openings) + 3] == [4, 16]
    assert calibration["resampled"] == [len(openings) + 1]
    assert weights == [1.0, *openings, 1.0, 0.0, 0.0, *[0.0 for _ in openings]]
    assert scores == [0.0, *[0.0 for _ in openings], 0.0, 0.0, 1.0, *openings]


def test_held_out_rows_come_last(checkpoint_folder: CheckpointFolder, tmp_path: Path) -> None:
    text = write_text(tmp_path, 3000)
    options: dict[str, Any] = {"target": "ppl=2x", "calibration": text, "refit_samples": 32, "seed": 1}
    rows = drawn(checkpoint_folder("llama"), **options)
    assert rows.held_out is not None
    assert rows.separate_refit is not None
    assert torch.equal(rows.grouped.groups[-1], rows.held_out)
    assert torch.equal(rows.norm_scale, rows.separate_refit[-1:])
    assert torch.equal(rows.grouped.groups[rows.grouped.weights.index(0.0)], rows.norm_scale)
    used = torch.cat([rows.selection, rows.held_out, rows.separate_refit])
    whole = calibration_rows(make_tokenizer(), text, samples=len(used), length=16, seed=1, vocab_size=128)
    assert torch.equal(used, whole)
