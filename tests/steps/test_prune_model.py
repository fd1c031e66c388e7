"""`prune_model` and the six public steps give the weights of the command, for all kinds of options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import bytes_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import secateur
from models import MIXTURES, ROWS, logits_of, relative, token_rows
from outputs import assert_error, error_of, record_of
from secateur import Options, RunOptions, prune, prune_model
from secateur.base.options import option_specs
from secateur.base.quiet import quiet

OPTIONS: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "sparsity": 0.4, "device": "cpu"}
OPTIONS |= {"effort": "quick"}


def opened(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
@pytest.mark.parametrize("name", [*list(ROWS)[:8], "mixtral"])
def test_the_weights_are_those_of_the_command(name, widths, checkpoint_folder, tmp_path):
    folder, options = checkpoint_folder(name), OPTIONS | {"widths": widths, "modules": ("channels",)}
    if name in MIXTURES:
        options["modules"] = ("experts",)
    prune(folder, tmp_path / "out", **options)
    found = prune_model(opened(folder), AutoTokenizer.from_pretrained(folder), **options)
    with quiet():
        found.save_pretrained(tmp_path / "saved")
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, trust_remote_code=True)
    states = [model.state_dict() for model in (written, found, saved)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert all(torch.equal(tensor, other[key]) for other in states[1:] for key, tensor in states[0].items())
    ids = token_rows()
    assert torch.equal(logits_of(found, ids), logits_of(saved.eval(), ids))


def test_the_given_model_is_unchanged_and_the_result_generates(checkpoint_folder, tmp_path, monkeypatch):
    model, ids = opened(checkpoint_folder("llama")), token_rows()
    before = logits_of(model, ids)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = prune_model(model, None, **OPTIONS)
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits_of(model, ids), before)
    assert found.num_parameters() < model.num_parameters()
    assert found.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert relative(logits_of(found, ids), before) > 1e-3


@pytest.mark.parametrize(("name", "kinds"), [("llama", "channels"), ("mixtral", "experts")])
@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_the_result_is_set_up_as_the_given_model(name, kinds, widths, checkpoint_folder, tmp_path):
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(checkpoint_folder(name), attn_implementation="eager")
    model.generation_config.update(eos_token_id=[1, 5], do_sample=True, temperature=0.6, top_p=0.9)
    model.config.use_cache = False
    if name in MIXTURES:
        model.set_experts_implementation("batched_mm")
    found = prune_model(model, None, **OPTIONS, widths=widths, modules=kinds)
    assert found.generation_config.to_dict() == model.generation_config.to_dict()
    assert found.generation_config is not model.generation_config
    for key in ("_attn_implementation", "_experts_implementation", "use_cache"):
        assert getattr(found.config, key, None) == getattr(model.config, key, None), key
    assert found.name_or_path == found.config.name_or_path == ""


def test_a_file_is_only_for_prune(checkpoint_folder):
    model = opened(checkpoint_folder("llama"))
    assert_error("format gguf is a file", prune_model, model, None, **OPTIONS, format="gguf", widths="uniform")
    assert_error("vocabulary changes the tokenizer too", prune_model, model, None, **OPTIONS, vocabulary="latin")
    assert_error(
        "calibration 'self' reads the model from a", prune_model, model, None, **OPTIONS | {"calibration": "self"}
    )
    for name in ("dry_run", "overwrite"):
        assert_error(f"{name} is for prune", prune_model, model, None, **OPTIONS, **{name: True})
    assert_error("needs a tokenizer", prune_model, model, None, **OPTIONS | {"calibration": "general"})


def test_models_that_cannot_be_read_are_refused(checkpoint_folder):
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint_folder("llama"))
    for wrong in (3, classifier):
        message = f"{type(wrong).__name__} is not a language model that writes text; pass what AutoModelForCausalLM"
        assert_error(message, prune_model, wrong, None, **OPTIONS)
    adapted = get_peft_model(opened(checkpoint_folder("llama")), LoraConfig(target_modules=["q_proj"]))
    assert_error("adapters; call merge_and_unload", prune_model, adapted, None, **OPTIONS)
    compiled = torch.compile(opened(checkpoint_folder("llama")))
    assert_error("is a compiled model; pass the model that torch", prune_model, compiled, None, **OPTIONS)
    untied = AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama tied"))
    untied.lm_head.weight = torch.nn.Parameter(2 * untied.lm_head.weight)
    assert_error(
        "lm_head.weight is another tensor than model.embed_tokens.weight", prune_model, untied, None, **OPTIONS
    )
    assert_error("is not in memory", prune_model, opened(checkpoint_folder("llama")).to("meta"), None, **OPTIONS)


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
    message = error_of(secateur.write_model, opened, rows, plan, blocks, tmp_path / "again")
    assert message == "blocks were taken from this iterator before; call fit_blocks again"
    words = [f"--{key.replace('_', '-')}={value}" for key, value in asked.items()]
    done = run("prune", str(model), str(tmp_path / "command"), *words, "--json", "-", "--quiet")
    assert list(json.loads(done.out)["widths"].values()) == [dict(width) for width in summary.widths.values()]
    assert bytes_of(tmp_path / "steps") == bytes_of(tmp_path / "command")
    # What was asked for stands in the record by the names of the declaration.
    assert record_of(tmp_path / "steps")["options"].keys() == option_specs(Options).keys()


def test_an_unknown_option_is_refused(tmp_path, checkpoint_folder):
    with pytest.raises(TypeError, match="no option 'fits'; the options are sparsity, target"):
        secateur.prune(checkpoint_folder("llama"), tmp_path / "out", fits=2)


def test_arguments_of_another_type_are_refused(tmp_path, checkpoint_folder):
    with pytest.raises(TypeError, match=r"model is of .*Linear'>; name a folder, .* or use secateur.prune_model"):
        secateur.prune(torch.nn.Linear(2, 2), tmp_path / "out")
    for given in (0.25, {"sparsity": 0.25}, RunOptions()):
        with pytest.raises(
            TypeError, match=r"is not an object of Options; give options by name, such as sparsity=0.25"
        ):
            secateur.prune(checkpoint_folder("llama"), tmp_path / "out", given)
    assert Options(modules=["heads"]) == Options(modules="heads") == Options(modules=("heads",))


def test_public_names_are_classes_and_functions():
    assert all(callable(getattr(secateur, name)) for name in secateur.__all__)


def test_a_proposal_is_written_to_a_path_in_text(tmp_path, checkpoint_folder):
    own = {name: value for name, value in OPTIONS.items() if name != "device"}
    proposal = secateur.propose(checkpoint_folder("llama"), Options(**own), out=str(tmp_path / "plan.json"))
    assert (tmp_path / "plan.json").exists()
    # What a notebook asks a figure for.
    assert proposal.plot()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "beside"), [((Options(),), {"sparsity": 0.3}), ((None, RunOptions()), {"device": "cpu"})]
)
def test_settings_together_with_their_object_are_refused(given, beside, tmp_path, checkpoint_folder):
    with pytest.raises(TypeError, match=f"{next(iter(beside))} is given together with (Options|RunOptions); set it in"):
        secateur.prune(checkpoint_folder("llama"), tmp_path / "out", *given, **beside)
