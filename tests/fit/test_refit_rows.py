"""Rows of the recovery's own: some rows choose units, and weights are fitted to others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import assert_equal_fits, least_squares, matrix, run

from models import WORDS, blocks_of, build, layers_of, make_tokenizer, relative, seen, token_rows
from outputs import error_of
from secateur.model.rows import Rows
from secateur.model.surgery import kept_inputs
from secateur.steps.draw_rows import draw_rows
from secateur.steps.open_model import open_model
from secateur.text.calibration import calibration_rows
from secateur.text.draw import CalibrationRows

NAMES = ["llama", "llama biased", "gpt2", "opt"]
FEW, MANY = token_rows(3, 20, seed=5), token_rows(14, 20, seed=9)


@pytest.mark.parametrize(
    ("name", "method", "when", "criterion"),
    [
        *((name, "refit", "after", "surgeon") for name in NAMES),
        *((name, "paper", "before", "wanda") for name in NAMES),
        *(("llama", "refit", "after", criterion) for criterion in ("second-moment", "wanda", "flap-wifv", "l2")),
        *(("llama biased", "paper", when, "wanda") for when in ("after", "both")),
    ],
)
def test_equal_rows_for_choice_and_fit_change_nothing(checkpoint_folder, name, method, when, criterion):
    folder, how = checkpoint_folder(name), {"method": method, "when": when, "criterion": criterion}
    single = run(folder, name, MANY, **how)
    assert_equal_fits(run(folder, name, Rows.of(MANY).with_choice_rows(Rows.of(MANY)), **how), single, 1e-4)


@pytest.mark.parametrize("criterion", ["surgeon", "wanda", "flap-wifv"])
@pytest.mark.parametrize("name", NAMES)
def test_units_are_chosen_by_some_rows_and_weights_fitted_to_others(checkpoint_folder, name, criterion):
    """The first attention, before which nothing differs; level 2 against least squares in float64."""
    folder = checkpoint_folder(name)
    few = FEW[:1, :6]
    chosen = run(folder, name, few, criterion=criterion)[0]
    both = run(folder, name, Rows.of(MANY).with_choice_rows(Rows.of(few)), criterion=criterion)[0]
    assert both.keep["heads"] == chosen.keep["heads"]
    model = build(name).double()
    module = blocks_of(model)[0].modules[0]
    x, z = seen(model, 0, module.output_layer, MANY)
    kept = kept_inputs(module, both.keep["heads"])
    old = matrix(layers_of(model)[0], module.output_layer)[kept]
    wanted, shift = least_squares(x[:, kept], z, old, intercept=module.bias is not None)
    found = both.changed[module.output_projection.name].movedim(module.output_projection.axis, 0)
    assert relative(found[kept].double(), wanted) < 1e-4
    if module.bias:
        assert relative(both.changed[module.bias].double(), shift) < 1e-4


TEXT = "text.txt"


def write_text(folder: Path, words: int) -> str:
    (folder / TEXT).write_text(" ".join(f"w{i * i % (WORDS - 4)}" for i in range(words)))
    return str(folder / TEXT)


def drawn(folder: Path, **options: Any) -> CalibrationRows:
    run = open_model(folder, device="cpu", **({"samples": 4, "length": 16} | options))
    return draw_rows(run, resample=False)


def test_one_source_gives_different_rows_to_the_refit(checkpoint_folder, tmp_path):
    """All rows come from one draw; the text has one place for each, so that no row can occur twice."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % (WORDS - 4)}" for i in range(9 * 12)))
    options = {"calibration": str(text), "length": 12, "refit_samples": 5}
    rows = drawn(checkpoint_folder("llama"), **options)
    together = torch.cat([rows.selection, rows.separate_refit])
    assert together.shape == (9, 12)
    assert len({tuple(row) for row in together.tolist()}) == 9
    same = drawn(checkpoint_folder("llama"), **options, refit_calibration=str(text))
    assert torch.equal(same.separate_refit, rows.separate_refit)


@pytest.mark.parametrize("source", ["random", "self"])
def test_data_free_rows_for_the_refit(checkpoint_folder, tmp_path, source):
    folder, text = checkpoint_folder("gpt2"), write_text(tmp_path, 500)
    rows = drawn(folder, calibration=text, refit_calibration=source, refit_samples=6)
    plain = drawn(folder, calibration=text)
    assert torch.equal(rows.selection, plain.selection)
    assert plain.separate_refit is None, "the same rows choose and fit"
    assert torch.equal(rows.separate_refit, drawn(folder, calibration=source, samples=6).selection)
    # As many as of the calibration where no number is given.
    assert len(drawn(folder, calibration=text, refit_calibration=source).separate_refit) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit_samples": 9}, "has 200 tokens, but 13 rows of 16 tokens need 208; use refit-samples 8 or"),
        ({"samples": 8, "refit_calibration": TEXT}, "but 16 rows of 16 tokens need 256; use refit-samples 4 or"),
        ({"calibration": "random", "refit_calibration": TEXT, "refit_samples": 13}, "need 208; use refit-samples 12"),
        ({"calibration": "random", "refit_calibration": TEXT, "samples": 40}, "need 640; use samples 12 or"),
    ],
)
def test_a_text_too_short_for_the_refit_rows_is_an_error(checkpoint_folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path, 200)
    assert message in error_of(drawn, checkpoint_folder("llama"), **{"calibration": TEXT} | options)
    assert len(drawn(checkpoint_folder("llama"), calibration=TEXT, refit_samples=8).separate_refit) == 8


def test_held_out_rows_come_last(checkpoint_folder, tmp_path):
    text = write_text(tmp_path, 3000)
    options: dict[str, Any] = {"target": "ppl=2x", "calibration": text, "refit_samples": 32, "seed": 1}
    rows = drawn(checkpoint_folder("llama"), **options)
    assert torch.equal(rows.grouped.groups[-1], rows.held_out)
    assert torch.equal(rows.norm_scale, rows.separate_refit[-1:])
    assert torch.equal(rows.grouped.groups[rows.grouped.weights.index(0.0)], rows.norm_scale)
    used = torch.cat([rows.selection, rows.held_out, rows.separate_refit])
    whole = calibration_rows(make_tokenizer(), text, samples=len(used), length=16, seed=1, vocab_size=128)
    assert torch.equal(used, whole)
