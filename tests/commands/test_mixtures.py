"""Every command on a mixture of experts, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import blocks_of, build, config_of
from outputs import Notes, error_of, record_of
from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.commands.options import Options, RunOptions
from secateur.commands.plan import propose
from secateur.commands.prune import prune
from secateur.commands.survey import survey_page
from secateur.model.checkpoint import open_checkpoint
from secateur.model.stream import BlockStream
from secateur.plan.meters import active_meter, parameter_meter

ROWS: dict[str, Any] = {"calibration": "random", "samples": 12, "length": 16}
SMALL: dict[str, Any] = ROWS | {"device": "cpu"}
NAME = "qwen2_moe some"
"""Model whose first block has a dense feed-forward, and whose other blocks have experts."""


def numbers(experts: int, channels: int) -> dict[str, int]:
    return {"kv_groups": 3, "heads_per_group": 2, "experts": experts, "expert_channels": channels}


def test_a_record_with_experts_is_a_plan(tmp_path, checkpoint_folder):
    model, file = checkpoint_folder(NAME), tmp_path / "plan.json"
    propose(model, Options(sparsity=0.3, modules=("heads", "experts"), **ROWS), RunOptions(device="cpu"), out=file)
    for out, given in (("first", file), ("second", tmp_path / "first" / "secateur.json")):
        prune(model, tmp_path / out, plan=str(given), **SMALL)
    first, second = (tmp_path / out / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    blocks = record_of(tmp_path / "first")["blocks"]
    assert ["experts" in block for block in blocks] == [False, True, True]
    assert all(len(block["experts"]) == block["width"]["experts"] < 8 for block in blocks[1:])
    assert all("channels" not in block and block["width"]["expert_channels"] == 20 for block in blocks[1:])


def test_a_record_with_expert_channels_is_a_plan(tmp_path, checkpoint_folder):
    """All remaining experts keep equally many channels."""
    model, file = checkpoint_folder(NAME), tmp_path / "plan.json"
    entries = [{"block": 1, "width": numbers(6, 8)}]
    entries.append({"block": 2, "width": numbers(8, 16)})
    file.write_text(json.dumps({"blocks": entries}))
    for out, given in (("first", file), ("second", tmp_path / "first" / "secateur.json")):
        found = prune(model, tmp_path / out, plan=str(given), **SMALL)
        assert [(width.experts, width.channels) for width in found.pruned_widths()] == [(0, 72), (6, 8), (8, 16)]
    first, second = (tmp_path / out / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    blocks = record_of(tmp_path / "first")["blocks"]
    for block, each in zip(blocks, (8, 16), strict=True):
        owners = [unit // 20 for unit in block["channels"]]
        assert {expert: owners.count(expert) for expert in block["experts"]} == dict.fromkeys(block["experts"], each)
    shapes = {name: value.shape for name, value in load_file(first).items()}
    assert shapes["model.layers.1.mlp.experts.5.down_proj.weight"] == (48, 8)
    assert shapes["model.layers.2.mlp.experts.7.up_proj.weight"] == (16, 48)
    assert shapes["model.layers.1.mlp.shared_expert.up_proj.weight"] == (28, 48)


def test_channels_of_experts_alone_are_removed(tmp_path, checkpoint_folder):
    model, file = checkpoint_folder(NAME), tmp_path / "survey.json"
    found = prune(model, tmp_path / "out", sparsity=0.2, modules=("channels",), survey=file, **SMALL)
    assert {width.experts for width in found.pruned_widths()[1:]} == {8}
    assert min(width.channels for width in found.pruned_widths()[1:]) < 20
    curves = json.loads(file.read_text())["curves"]
    assert {(one["kind"], one["axis"], len(one["errors"])) for one in curves if one["block"]} == {
        ("experts", "experts", 1),
        ("experts", "expert_channels", 20),
    }
    again = prune(model, tmp_path / "again", sparsity=0.2, modules=("channels",), survey=file, **SMALL)
    assert again.widths == found.widths


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_stock_format_holds_one_number_of_expert_channels(tmp_path, checkpoint_folder, name):
    """The config has one key for the channels of experts, and in some families the shared expert follows it."""
    how: dict[str, Any] = {"sparsity": 0.2, "modules": ("channels",), "widths": "uniform", "recovery": "none"}
    prune(checkpoint_folder(name), tmp_path / "out", **SMALL, **how)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe_intermediate_size"] == 16
    shapes = {key: value.shape for key, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    shared = [shape for key, shape in shapes.items() if "shared_experts.up_proj" in key]
    assert shared == ([] if name == "qwen3_moe" else [(16 * config["n_shared_experts"], 48)] * 2)


def test_the_stock_format_narrows_dense_blocks_on_their_own(tmp_path, checkpoint_folder):
    entries = [{"block": 0, "channels": list(range(48))}]
    entries += [{"block": index, "experts": list(range(6))} for index in (1, 2)]
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": entries}))
    prune(checkpoint_folder(NAME), tmp_path / "out", plan=str(tmp_path / "plan.json"), format="stock", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 48
    assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 48)
    assert model.model.layers[1].mlp.experts.down_proj.shape == (6, 48, 20)


def test_a_record_with_channels_of_a_shared_expert_is_a_plan(tmp_path, checkpoint_folder):
    """Channels of the shared expert are numbered after those of the last routed expert."""
    model, file = checkpoint_folder("hunyuan_v1_moe"), tmp_path / "plan.json"
    each = [expert * 72 + channel for expert in range(4) for channel in range(8)]
    beside = [8 * 72 + channel for channel in range(60, 68)]
    entry = {"block": 1, "experts": [0, 1, 2, 3], "channels": each + beside}
    file.write_text(json.dumps({"blocks": [entry]}))
    prune(model, tmp_path / "out", plan=str(file), recovery="none", **SMALL)
    blocks = record_of(tmp_path / "out")["blocks"]
    assert blocks[0]["channels"] == each + beside
    dense, found = (load_file(folder / "model.safetensors") for folder in (Path(model), tmp_path / "out"))
    name = "model.layers.1.mlp.shared_mlp.up_proj.weight"
    assert torch.equal(found[name], dense[name][60:68])
    file.write_text(json.dumps({"blocks": [entry | {"channels": each + beside[1:]}]}))
    with pytest.raises(SecateurError, match=r"7 channels of the shared expert are listed, which begin at 576; list 8"):
        prune(model, tmp_path / "wrong", plan=str(file), **SMALL)


def test_a_widths_file_has_a_share_for_each_kind(tmp_path, checkpoint_folder):
    file = tmp_path / "ratios.json"
    file.write_text('{"0:2": {"experts": 0.25, "channels": 0.5}, "2:3": {"heads": 0.34}}')
    found = prune(checkpoint_folder(NAME), tmp_path / "out", widths=str(file), **SMALL)
    widths = [found.widths[index] for index in range(3)]
    assert [width.channels for width in widths] == [36, 8, 20]
    assert [width.experts for width in widths] == [0, 6, 8]
    assert [width.heads for width in widths] == [6, 6, 4]
    file.write_text('{"0:3": 0.25}')
    found = prune(checkpoint_folder(NAME), tmp_path / "all", widths=str(file), **SMALL)
    assert [(width.experts, width.channels) for width in found.pruned_widths()] == [(0, 54), (6, 20), (6, 20)]


WRONG = {
    "too few": ({"block": 1, "experts": [0, 1]}, "2 are listed, but at least 3 must stay; list more"),
    "not there": ({"block": 1, "experts": [0, 1, 2, 9]}, "9 does not exist; use indices from 0 to 7"),
    "of another block": ({"block": 0, "experts": [0, 1, 2]}, "block 0 has no experts; list its heads and channels"),
    "a width too narrow": ({"block": 1, "width": numbers(2, 20)}, "2 experts are not possible; use 3 to 8"),
    "no channels": ({"block": 1, "width": numbers(8, 0)}, "0 channels in each expert are not possible; use 1 to 20"),
    "channels of which no kernel is": ({"block": 1, "width": numbers(8, 13)}, "a multiple of 8, not 13"),
    "channels of an expert that goes": (
        {"block": 1, "experts": [0, 1, 2], "channels": [*range(8), *range(20, 28), *range(60, 68)]},
        "channels: 60 belongs to expert 3, which is not kept; remove it",
    ),
    "channels not of all": (
        {"block": 1, "experts": [0, 1, 2], "channels": list(range(8))},
        "all experts must keep the same number of channels, and at least one",
    ),
    "a width of channels": (
        {"block": 1, "width": {"kv_groups": 3, "heads_per_group": 2, "channels": 2}},
        "list the heads and experts to keep, or give a width with whole numbers for kv_groups, heads_per_group, "
        "experts, expert_channels",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused(tmp_path, checkpoint_folder, case):
    entry, message = WRONG[case]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"blocks": [entry]}))
    with pytest.raises(SecateurError, match=message):
        prune(checkpoint_folder(NAME), tmp_path / "out", plan=str(file), **SMALL)


def test_groups_of_experts_stay_equally_large(tmp_path, checkpoint_folder):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"blocks": [{"block": 1, "experts": [0, 1, 2, 4]}]}))
    with pytest.raises(SecateurError, match=r"must keep the same number of experts \(group 0 keeps 3"):
        prune(checkpoint_folder("glm4_moe groups"), tmp_path / "out", plan=str(file), **SMALL)


REFUSED = {
    "more than a token meets leaves": ({"sparsity": 0.9, "modules": ("experts",)}, "only experts may be removed"),
    "more than the channels are": ({"sparsity": 0.9, "modules": ("channels",)}, "only channels may be removed"),
    "speed": ({"target": "decode=1.1x"}, "the time of experts depends on the tokens that are routed to them"),
    "gguf": ({"sparsity": 0.2, "format": "gguf"}, "qwen3moe has one width for all blocks, so prune all of them"),
    "some blocks": ({"sparsity": 0.2, "widths": "uniform", "blocks": "1:3"}, "only 1:3 are to be pruned"),
    "an order": ({"sparsity": 0.2, "criterion": "experts=l1"}, "the criterion of experts must be one of reroute, reap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(tmp_path, monkeypatch, checkpoint_folder, case):
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(BlockStream, "embed", work)
    wishes, message = REFUSED[case]
    out = tmp_path / ("out.gguf" if case == "gguf" else "out")
    assert re.search(message, error_of(prune, checkpoint_folder("qwen3_moe"), out, **SMALL, **wishes))


def test_one_survey_serves_the_page_and_prune(tmp_path, checkpoint_folder):
    model = checkpoint_folder(NAME)
    survey_page(model, tmp_path / "survey", Options(**ROWS), RunOptions(device="cpu"))
    page = (tmp_path / "survey" / "survey.html").read_text()
    assert '"experts"' in page
    assert '"expert_channels"' in page
    assert "{{" not in page
    run_options = RunOptions(device="cpu", survey=tmp_path / "survey" / "survey.json")
    found = prune(model, tmp_path / "out", Options(sparsity=0.3, **ROWS), run_options)
    assert found.sparsity == pytest.approx(0.3, abs=0.02)


def test_active_parameters_leave_out_other_experts(tmp_path, checkpoint_folder):
    model = checkpoint_folder("qwen3_moe")
    stream = BlockStream(open_checkpoint(model))
    active, stored = active_meter(stream), parameter_meter(stream)
    # Of eight experts of 3 x 20 x 48 in each of three blocks, a token meets three.
    assert stored.dense - active.dense == 3 * 5 * 3 * 20 * 48
    found = prune(model, tmp_path / "out", target="active=90%", **SMALL)
    assert active.total(found.widths) <= 0.9 * active.dense


@pytest.mark.parametrize("alike", [True, False])
def test_dissimilar_experts_give_a_warning(tmp_path, checkpoint_folder, alike):
    """Without a warning if all experts are copies of one."""
    model, notes = tmp_path / "dense", Notes()
    shutil.copytree(checkpoint_folder("qwen3_moe"), model)
    tensors = load_file(model / "model.safetensors")
    if alike:
        for name in tensors:
            tensors[name] = tensors[re.sub(r"experts\.\d+", "experts.0", name)].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    how = {"sparsity": 0.35, "modules": ("experts",), "effort": "quick"}
    prune(model, tmp_path / "out", watcher=notes, **SMALL | how)
    said = [note for note in notes.said if note.startswith("The experts of this model are dissimilar: ")]
    assert len(said) == (0 if alike else 1)


@pytest.mark.parametrize(
    ("samples", "length", "more"), [(1, 3, "; use more rows (--samples), or a more varied text"), (2, 7, "")]
)
def test_experts_with_few_tokens_are_not_refitted(tmp_path, checkpoint_folder, samples, length, more):
    """A text of one or two rows routes no token to most experts, which keep their weights."""
    model, notes = checkpoint_folder("qwen3_moe"), Notes()
    how = {"calibration": "random", "sparsity": 0.1, "modules": ("experts",), "effort": "quick"}
    prune(model, tmp_path / "out", samples=samples, length=length, watcher=notes, **how)
    blocks = record_of(tmp_path / "out")["blocks"]
    kept = sum(len(block["experts"]) for block in blocks)
    few = [(block["block"], expert) for block in blocks for expert in block["modules"][1]["unfitted"]]
    assert 0 < len(few) <= kept
    note = f"{len(few)} of {kept} experts were not refitted, because fewer than 8 tokens were routed to each{more}"
    assert note in notes.said
    dense = open_checkpoint(model)
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    written = load_file(tmp_path / "out" / "model.safetensors")
    for block in blocks:
        for place, expert in enumerate(block["experts"]):
            same = torch.equal(
                written[name.format(block["block"], place)], dense.read(name.format(block["block"], expert))
            )
            assert same == ((block["block"], expert) in few)


@pytest.mark.parametrize(
    ("name", "key"), [("ernie4_5_moe", "moe_num_shared_experts"), ("deepseek_v3", "n_shared_experts")]
)
def test_a_config_without_a_shared_expert_is_pruned(tmp_path, name, key):
    config = copy.deepcopy(config_of(name))
    setattr(config, key, 0)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    how: dict[str, Any] = {"modules": ("channels",), "widths": "uniform", "sparsity": 0.15}
    found = prune(tmp_path / "dense", tmp_path / "out", **SMALL, **how)
    assert {width.channels for width in found.pruned_widths() if width.experts} == {16}


def test_a_config_with_experts_in_no_block_is_pruned(tmp_path):
    config = copy.deepcopy(config_of("deepseek_v2"))
    config.first_k_dense_replace = config.num_hidden_layers
    config.mlp_layer_types = ["dense"] * config.num_hidden_layers
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    how: dict[str, Any] = {"modules": ("channels",), "widths": "uniform", "sparsity": 0.15}
    found = prune(tmp_path / "dense", tmp_path / "out", **SMALL, **how)
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {found.pruned_widths()[0].channels}


def test_norms_after_a_mixture():
    """A second norm follows only if the mixture is added to a feed-forward."""
    mixture = blocks_of(build("gemma4_text mixture"))[-1].feed_forward
    norms = ("post_feedforward_layernorm_2", "post_feedforward_layernorm")
    assert (mixture.post_norm, mixture.outer_norm) == norms
    assert blocks_of(build("qwen2_moe"))[-1].feed_forward.outer_norm is None


def test_a_config_without_groups_of_experts():
    model = build("deepseek_v3 plain")
    model.config.n_group = model.config.topk_group = None
    mixture = blocks_of(model)[-1].feed_forward
    assert (mixture.groups, mixture.min_units) == (1, model.config.num_experts_per_tok)
