"""The six public steps and the command line, which calls `prune`, write the same bytes for all kinds of options."""

import inspect
import json
from typing import Any

import pytest
from lives import bytes_of

import secateur
from models import token_rows
from outputs import record_of
from secateur import Options, RunOptions
from secateur.base.options import option_specs
from secateur.commands import options
from secateur.paper.options import PAPER

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("llama", {}),
    "one width": ("qwen3", {"widths": "uniform", "sparsity": 0.3}),
    "similar heads": ("llama every head", {"criterion": "similarity", "tau": 0.16}),
    "similar heads and channels": ("llama every head", {"criterion": "similarity+wanda", "tau": 0.16, "sparsity": 0.3}),
    "a loss": ("llama", {"target": "ppl=1.2x", "effort": "quick"}),
    "the paper": ("gpt2", {"criterion": "second-moment", "recovery": "paper", "refit_samples": 9}),
}


@pytest.mark.parametrize("case", ASKED)
def test_steps_and_command_write_the_same_bytes(case, tmp_path, checkpoint_folder, run):
    name, asked = ASKED[case]
    model, text = checkpoint_folder(name), tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token - 4}" for token in token_rows(1, 2000)[0].tolist()))
    asked = {"calibration": str(text), "samples": 8, "length": 16} | asked
    opened = secateur.open_model(model, **asked)
    rows = secateur.draw_rows(opened)
    findings = secateur.survey_model(opened, rows)
    plan = secateur.plan_widths(opened, rows, findings)
    blocks = secateur.fit_blocks(opened, rows, plan)
    summary = secateur.write_model(opened, rows, plan, blocks, tmp_path / "steps")
    words = [f"--{key.replace('_', '-')}={value}" for key, value in asked.items()]
    done = run("prune", str(model), str(tmp_path / "command"), *words, "--json", "-", "--quiet")
    assert list(json.loads(done.out)["widths"].values()) == [dict(width) for width in summary.widths.values()]
    assert bytes_of(tmp_path / "steps") == bytes_of(tmp_path / "command")
    # What was asked for stands in the record by the names of the declaration.
    assert record_of(tmp_path / "steps")["options"].keys() == option_specs(Options).keys()


def test_every_option_is_declared_once():
    assert not option_specs(Options).keys() & option_specs(RunOptions).keys()
    assert {one.name for one in inspect.signature(Options).parameters.values()} == option_specs(Options).keys()
    for name, one in (option_specs(Options) | option_specs(RunOptions)).items():
        assert one.help[0].isupper(), name
        assert one.help.endswith("."), name
        assert one.panel in (
            options.TARGET,
            options.METHOD,
            options.CALIBRATION,
            options.OUTPUT,
            options.COMPUTING,
            PAPER,
        )


def test_an_unknown_option_is_refused(tmp_path, checkpoint_folder):
    with pytest.raises(TypeError, match="no option 'fits'; the options are sparsity, target"):
        secateur.prune(checkpoint_folder("llama"), tmp_path / "out", fits=2)


@pytest.mark.parametrize(
    ("given", "beside"), [((Options(),), {"sparsity": 0.3}), ((None, RunOptions()), {"device": "cpu"})]
)
def test_settings_together_with_their_object_are_refused(given, beside, tmp_path, checkpoint_folder):
    with pytest.raises(TypeError, match=f"{next(iter(beside))} is given together with (Options|RunOptions); set it in"):
        secateur.prune(checkpoint_folder("llama"), tmp_path / "out", *given, **beside)
