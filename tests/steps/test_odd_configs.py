"""Configs that other tools have left odd keys in: a right result, or a line that says what is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models import load_written, logits_of, token_rows
from outputs import edit_json
from secateur import open_checkpoint, prune
from secateur.measure.evaluation import evaluate

SMALL: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "device": "cpu", "effort": "quick"}


def edited(dense: Path, folder: Path, **keys: Any) -> Path:
    edit_json(shutil.copytree(dense, folder) / "config.json", **keys)
    return folder


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


def equal_logits(tmp_path, first: Path, second: Path, **how: Any) -> bool:
    """Prune both models, and return whether the results compute the same."""
    outs = []
    for name, source in (("first", first), ("second", second)):
        prune(source, tmp_path / name, **SMALL | how)
        model = load_written(tmp_path / name, return_dict=True, attn_implementation="sdpa")
        outs.append(logits_of(model, token_rows()))
    return torch.equal(*outs)


STRAY: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "uniform", {"num_key_value_heads": 2, "head_dim": 5}),
    ("opt", "adaptive", {"num_key_value_heads": 2, "head_dim": 5}),
    ("gptj", "uniform", {"num_key_value_heads": 2, "head_dim": 5}),
    ("llama", "adaptive", {"attn_implementation": "flash_attention_2", "return_dict": False}),
    # transformers builds no model from such a config, but it does from the pruned one.
    ("llama", "uniform", {"pad_token_id": 9999}),
    ("llama", "adaptive", {"pad_token_id": 9999}),
]


@pytest.mark.parametrize(("name", "widths", "keys"), STRAY)
def test_stray_keys_of_a_config_do_not_matter(tmp_path, checkpoint_folder, name, widths, keys):
    stray = edited(checkpoint_folder(name), tmp_path / "dense", **keys)
    assert equal_logits(tmp_path, checkpoint_folder(name), stray, widths=widths)
    if "pad_token_id" in keys:
        assert json.loads((tmp_path / "second" / "config.json").read_text())["pad_token_id"] is None
        evaluate(str(stray), texts=[])
