"""Configs that other tools have left odd keys in: a right result, or a line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import logits_of, token_rows
from outputs import weights_of
from secateur import SecateurError, prune
from secateur.measure.evaluation import evaluate
from secateur.model.checkpoint import open_checkpoint
from secateur.model.per_layer import model_class

SMALL: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "device": "cpu", "effort": "quick"}


def edited(dense: Path, folder: Path, **keys: Any) -> Path:
    shutil.copytree(dense, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@pytest.mark.parametrize(("name", "widths"), [("gpt2", "uniform"), ("opt", "adaptive"), ("gptj", "uniform")])
def test_unused_keys_of_a_config_do_not_matter(tmp_path, checkpoint_folder, name, widths):
    stray = edited(checkpoint_folder(name), tmp_path / "dense", num_key_value_heads=2, head_dim=5)
    outs = []
    for source, out in ((checkpoint_folder(name), tmp_path / "plain"), (stray, tmp_path / "stray")):
        prune(source, out, **SMALL, widths=widths)
        auto = AutoModelForCausalLM if widths == "uniform" else model_class(open_checkpoint(out).config)
        outs.append(logits_of(auto.from_pretrained(out, dtype=torch.float32).eval(), token_rows()))
    assert torch.equal(*outs)


def test_runtime_keys_of_a_config_do_not_matter(tmp_path, checkpoint_folder):
    keys = {"attn_implementation": "flash_attention_2", "return_dict": False}
    for source, out in (
        (checkpoint_folder("llama"), tmp_path / "plain"),
        (edited(checkpoint_folder("llama"), tmp_path / "dense", **keys), tmp_path / "odd"),
    ):
        prune(source, out, **SMALL)
    plain, odd = (weights_of(tmp_path / out) for out in ("plain", "odd"))
    assert plain == odd


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
def test_caps_of_attention_are_computed(name, checkpoint_folder):
    """Attention runs eagerly, which applies the caps in every version of transformers."""
    config = open_checkpoint(checkpoint_folder(name)).config
    assert config.attn_logit_softcapping
    assert config._attn_implementation == "eager"


def test_an_evaluation_ignores_runtime_keys_of_a_config(tmp_path, checkpoint_folder):
    keys = {"_attn_implementation": "flash_attention_2", "return_dict": False}
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 16)
    odd = edited(checkpoint_folder("llama"), tmp_path / "dense", **keys)
    found = evaluate(str(odd), against=str(checkpoint_folder("llama")), texts=[str(tmp_path / "text.txt")], length=8)
    first, second = (score.texts for score in found.models)
    assert first == second


@pytest.mark.parametrize("widths", ["uniform", "adaptive"])
def test_a_padding_token_outside_the_vocabulary_is_dropped(tmp_path, checkpoint_folder, widths):
    """transformers builds no model from such a config, but it does from the pruned one."""
    source = edited(checkpoint_folder("llama"), tmp_path / "dense", pad_token_id=9999)
    prune(source, tmp_path / "out", **SMALL, widths=widths)
    prune(checkpoint_folder("llama"), tmp_path / "plain", **SMALL, widths=widths)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None
    outs = []
    for out in (tmp_path / "out", tmp_path / "plain"):
        auto = AutoModelForCausalLM if widths == "uniform" else model_class(open_checkpoint(out).config)
        outs.append(logits_of(auto.from_pretrained(out, dtype=torch.float32).eval(), token_rows()))
    assert torch.equal(*outs)
    evaluate(str(source), texts=[])


WRONG = {
    "no key/value heads": ({"num_key_value_heads": 0}, r"cannot make a model of config.json \(ZeroDivisionError"),
    "architectures that are none": (
        {"architectures": [1]},
        r"config.json: architectures is \[1\], not a list of class",
    ),
    "a text config that is none": ({"text_config": 5}, "config.json: text_config is 5, not the config of a model"),
    "more layers than tensors": ({"num_hidden_layers": 10**9}, "is 1,000,000,000, but only 30 tensors are stored"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_config_is_refused(tmp_path, checkpoint_folder, case):
    keys, said = WRONG[case]
    with pytest.raises(SecateurError, match=said):
        prune(edited(checkpoint_folder("llama"), tmp_path / "dense", **keys), tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
