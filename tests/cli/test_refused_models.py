"""Models that cannot be pruned are refused in one line, before any work."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL, listing, refused, remove_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from outputs import edit_json, edited_weights
from secateur.base.quiet import quiet

UP = "model.layers.1.mlp.up_proj.weight"


def config(folder: Path, **keys: Any) -> None:
    edit_json(folder / "config.json", **keys)


def other_family(model_type: str, **keys: Any) -> Callable[[Path], None]:
    """Return a change that puts a model of a family in its place that transformers knows and secateur does not."""

    def apply(folder: Path) -> None:
        sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "n_layer": 1, "n_head": 2} | keys
        with quiet():
            AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)

    return apply


def whole_numbers(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors[UP] = tensors[UP].to(torch.int8)


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other shape": (lambda f: config(f, intermediate_size=80), "[72, 48], but config.json makes it [80, 48] (and 8"),
    "fewer tensors": (lambda f: config(f, num_hidden_layers=4), "tensors missing from the weights: model.layers.3."),
    "no blocks": (lambda f: config(f, num_hidden_layers=0), "the model has no blocks; find the config.json"),
    "no such activation": (lambda f: config(f, hidden_act="nope"), "a model of config.json (KeyError: 'nope')"),
    "no key/value heads": (
        lambda f: config(f, num_key_value_heads=0),
        "cannot make a model of config.json (ZeroDivisi",
    ),
    "architectures that are none": (
        lambda f: config(f, architectures=[1]),
        "architectures is [1], not a list of class",
    ),
    "a text config too many": (lambda f: config(f, text_config={"model_type": "llama"}), "llama has no text_config"),
    "a text config that is none": (lambda f: config(f, text_config=5), "text_config is 5, not the config of a model"),
    "too many layers": (
        lambda f: config(f, num_hidden_layers=10**6),
        "is 1,000,000, but only 30 tensors are stored",
    ),
    "nested config": (lambda f: (f / "config.json").write_text("[" * 10**6), "nested too deeply for a config"),
    "whole numbers": (whole_numbers, "up_proj.weight holds torch.int8: integers instead of weights; use an unq"),
    "no tokenizer": (lambda f: remove_tokenizer(f), "model: no tokenizer files; copy the model's into the folder"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "model: the tokenizer does not load"),
    "mamba": (other_family("mamba"), "model type 'mamba' cannot be pruned: none of its modules has units that can be"),
    "an encoder": (
        other_family("bert", num_attention_heads=2),
        "model type 'bert' cannot be pruned: its logits depend on later tokens",
    ),
    "experts": (other_family("jetmoe"), "model type 'jetmoe' cannot be pruned: none of its modules has units that can"),
}


@pytest.mark.parametrize("case", MODELS)
def test_an_unusable_model_is_refused_before_any_work(case, place, run, no_work):
    change, message = MODELS[case]
    change(place / "model")
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL), message)
    assert listing(place) == before


@pytest.mark.parametrize(
    ("tensor", "module"), [("self_attn.v_proj", "attention"), ("mlp.gate_proj", "feed-forward"), ("embed", "")]
)
def test_nan_weights_are_reported_with_block_and_module(tensor, module, place, run):
    with edited_weights(place / "model") as weights:
        weights[f"model.layers.1.{tensor}.weight" if module else "model.embed_tokens.weight"][:, 3] = torch.nan
    before = listing(place)
    for options in ([], ["--modules", "channels"]):  # found by the survey, and by the first block that is pruned
        result = run("prune", "model", "out", *SMALL, *options)
        assert (result.code, result.err.count("error: ")) == (2, 1)
        last = result.err.splitlines()[-1]
        words = ("error: ", "NaN or infinite activations", f"block {1 if module else 0}", module)
        assert all(word in last for word in words)
    assert listing(place) == before


def test_an_unreadable_file_is_named(place, run, monkeypatch, no_work):
    from secateur.checkpoints import checkpoint

    def forbidden(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr(checkpoint, "list_tensors", forbidden)
    refused(run("prune", "model", "out", *SMALL), "model/model.safetensors: Permission denied; check the path")


def test_a_hub_without_a_network_is_reported_at_once(place, run, no_work, monkeypatch):
    import datasets

    from secateur.checkpoints import hub_source

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    monkeypatch.setattr(hub_source, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub_source.constants, "ENDPOINT", "http://127.0.0.1:9")
    before, start = listing(place), time.perf_counter()
    away = "and http://127.0.0.1:9 does not answer"
    refused(run("prune", "owner/name", "out", *SMALL), f"owner/name: no such folder, not in the cache, {away}; name a")
    result = run("prune", "model", "out", "--length", "64", "--calibration", "wikitext2")
    refused(result, f"data set wikitext2 is not in the local cache, {away}: give a")
    assert time.perf_counter() - start < 15
    assert listing(place) == before
