"""A pruned folder whose blocks differ in width is pruned again: it is described, cut and written like a dense one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from models import layers_of, load_written, logits_of, relative, silenced, token_rows
from outputs import error_of, record_of, weights_of
from secateur.base.progress import Silent
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.model.per_layer import widths_of
from secateur.model.stream import BlockStream
from secateur.model.structure import Block
from secateur.retraining.teacher import open_teacher
from secateur.steps.prune import prune
from secateur.steps.prune_model import prune_model

SMALL: dict[str, Any] = {"samples": 8, "length": 16, "calibration": "random", "effort": "quick", "round": 1}
ROWS = ("llama", "gemma2", "gemma4_text", "phi3", "opt", "gpt2", "falcon new")
"""Rows that differ in how layers are stored, and in what config.json says of them."""
OTHERS = ("deepseek_v3", "gpt_oss", "lfm2", "mixtral")
"""Latent attention with shared experts; other experts; a hybrid."""
STOCK = ("llama", "phi3", "deepseek_v3", "gpt_oss", "qwen3_5_text")
"""Rows of which the stock class holds a pruned model."""

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Any) -> Folder:
    """Return a function from a row to a folder that was pruned, or pruned several times to given sparsities."""
    place = tmp_path_factory.mktemp("again")

    @cache
    def made(name: str, *shares: float, **options: Any) -> Path:
        if not shares:
            return checkpoint_folder(name)
        out = place / "-".join(map(str, (name, *shares, *options.values()))).replace(" ", "-")
        prune(made(name, *shares[:-1], **options), out, **SMALL | {"sparsity": shares[-1]} | options)
        return out

    return made


def blocks_in(folder: Path) -> list[Block]:
    return BlockStream(open_checkpoint(folder)).blocks


@pytest.mark.parametrize(("name", "widths"), [*((name, "adaptive") for name in ROWS + OTHERS), ("llama", "uniform")])
def test_cut_again_equals_masked(folder, name, widths):
    """The second pruning removes whole modules of some rows, and the first one of others."""
    how = {"recovery": "none", "widths": widths, "format": "hf" if widths == "adaptive" else "stock"}
    first, second = folder(name, 0.3, **how), folder(name, 0.3, 0.4, **how)
    model, ids, record = load_written(first), token_rows(), record_of(second)
    with silenced(layers_of(model), blocks_in(first), {block["block"]: block for block in record["blocks"]}):
        expected = logits_of(model, ids)
    assert relative(logits_of(model, ids), expected) > 1e-3
    small = load_written(second)
    assert relative(logits_of(small, ids), expected) < 1e-5
    assert record["sizes"]["parameters"] == [sum(p.numel() for p in one.parameters()) for one in (model, small)]
    assert record["sparsity"]["reached"] == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("name", STOCK)
def test_a_block_is_described_as_in_a_stock_folder(folder, tmp_path, name):
    uneven = folder(name, 0.3, recovery="none", widths="uniform", format="hf")
    options = SMALL | {"plan": str(uneven / "secateur.json"), "recovery": "none", "format": "stock", "round": None}
    prune(folder(name), tmp_path / "stock", **options)
    ours, theirs = ([*map(without_rounding, blocks_in(one))] for one in (uneven, tmp_path / "stock"))
    assert ours == theirs


def without_rounding(block: Block) -> Block:
    """Return a description without the limits below which widths are not rounded, which hold for dense blocks."""
    bare = (replace(one, axes=tuple(replace(axis, rounds_from=0) for axis in one.axes)) for one in block.modules)
    return replace(block, modules=tuple(bare))


def test_a_model_in_memory_and_a_saved_one_are_pruned_again(folder, tmp_path):
    """transformers' save_pretrained writes another config.json, as after training or merging of adapters."""
    first, asked = folder("llama", 0.3), SMALL | {"sparsity": 0.4}
    model = load_written(first)
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(first / "tokenizer.json", tmp_path / "saved")
    prune(tmp_path / "saved", tmp_path / "out", **asked)
    assert weights_of(tmp_path / "out") == weights_of(folder("llama", 0.3, 0.4))
    assert record_of(tmp_path / "out").get("earlier") is None
    tokenizer = open_checkpoint(first).tokenizer()
    memory = prune_model(model, tokenizer, **asked)
    assert torch.equal(logits_of(memory, token_rows()), logits_of(load_written(tmp_path / "out"), token_rows()))


def test_one_width_for_blocks_that_differ(folder, tmp_path):
    first, asked = folder("llama", 0.3), SMALL | {"widths": "uniform", "format": "stock"}
    assert len(set(widths_of(open_checkpoint(first).config))) > 1
    prune(first, tmp_path / "out", **asked, sparsity=0.5)
    assert not (tmp_path / "out" / "modeling_secateur.py").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not config.keys() & {"auto_map", "per_layer_config", "layer_sizes", "num_key_value_groups"}
    widest = [max(number) for number in zip(*(width.values() for width in widths_of(config)), strict=True)]
    narrowest = [min(number) for number in zip(*(block.width.values() for block in blocks_in(first)), strict=True)]
    assert all(now <= before for now, before in zip(widest, narrowest, strict=True))
    gone = folder("llama", 0.8)
    assert "left block 1 without heads or without channels" in error_of(prune, gone, tmp_path / "o", **asked)


def test_the_chain_is_recorded(folder):
    first, second = folder("llama", 0.3), folder("llama", 0.3, 0.4)
    (step,) = record_of(second)["earlier"]
    assert step["sparsity"]["reached"] == record_of(first)["sparsity"]["reached"]
    lines = [
        f"{number}. {model.name}: {record_of(out)['sparsity']['reached']:.1%} of the blocks' parameters removed"
        for number, (model, out) in enumerate(((folder("llama"), first), (first, second)), 1)
    ]
    card = (second / "README.md").read_text()
    assert all(line in card for line in lines)
    assert "after structured pruning: in the last of 2 steps, " in card
    assert ">before the last step</th>" in (second / "report.html").read_text()
    # The card of the first result is not the card of the base model.
    assert not (second / "README.base.md").exists()
    dense = json.loads((folder("llama") / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert json.loads((second / "config.json").read_text())[key] == dense[key]
    teacher = open_teacher(open_checkpoint(second), None, Silent())
    assert teacher is not None
    assert teacher.path == first


TAMPERED = {
    "word": (("per_layer_config", "1", "intermediate_size"), "many", "many"),
    "narrower": (("per_layer_config", "1", "intermediate_size"), 5, "but config.json makes it [5"),
    "wider": (("per_layer_config", "1", "intermediate_size"), 500, "transformers cannot make a model of config.json"),
    "negative": (("per_layer_config", "1", "intermediate_size"), -1, "has -1 for intermediate_size, which is not a nu"),
    "heads": (("per_layer_config", "1", "num_key_value_groups"), 7, "transformers rejects it"),
    "no list": (("per_layer_config",), [3], "config.json"),
    "no sizes": (("layer_sizes",), {}, "cannot make a model of config.json"),
    "other sizes": (("layer_sizes", "shapes"), {}, "but config.json makes it"),
    "other class": (("architectures",), ["SecateurNothing"], "names the class SecateurNothing, which does not exist"),
    "stock class": (("architectures",), ["LlamaForCausalLM"], "but config.json makes it"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_config_is_refused(folder, tmp_path, case):
    keys, value, message = TAMPERED[case]
    copied = shutil.copytree(folder("llama", 0.3), tmp_path / "first")
    config = part = json.loads((copied / "config.json").read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (copied / "config.json").write_text(json.dumps(config))
    assert message in error_of(prune, copied, tmp_path / "out", **SMALL)


def test_the_code_of_a_folder_does_not_run(folder, tmp_path):
    copied, marker = shutil.copytree(folder("llama", 0.3), tmp_path / "first"), tmp_path / "ran"
    (copied / "modeling_secateur.py").write_text(f"open({str(marker)!r}, 'w')\nraise RuntimeError\n")
    prune(copied, tmp_path / "out", **SMALL)
    assert not marker.exists()
    assert weights_of(tmp_path / "out") == weights_of(folder("llama", 0.3, 0.25))
    ours = (folder("llama", 0.3) / "modeling_secateur.py").read_bytes()
    assert (tmp_path / "out" / "modeling_secateur.py").read_bytes() == ours
