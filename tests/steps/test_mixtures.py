"""Mixtures of experts, and hybrids, in some of whose blocks another kind of layer stands in the attention's place."""

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import blocks_of, build, config_of, load_written, save
from outputs import Notes, assert_error, edit_json, record_of, weights_of
from secateur import BlockStream, open_checkpoint, prune
from secateur.base.quiet import quiet
from secateur.plan.meters import active_meter, parameter_meter

ROWS: dict[str, Any] = {"calibration": "random", "samples": 12, "length": 16}
SMALL: dict[str, Any] = ROWS | {"device": "cpu"}
NAME = "qwen2_moe some"
"""Model whose first block has a dense feed-forward, and whose other blocks have experts."""


def numbers(experts: int, channels: int) -> dict[str, int]:
    return {"kv_groups": 3, "heads_per_group": 2, "experts": experts, "expert_channels": channels}


def test_a_record_with_expert_channels_is_a_plan(tmp_path, checkpoint_folder):
    """All remaining experts keep equally many channels."""
    model, widths = checkpoint_folder(NAME), [(0, 72), (6, 8), (8, 16)]
    file = plan_file(tmp_path, *({"block": index, "width": numbers(*widths[index])} for index in (1, 2)))
    for out, given in (("first", file), ("second", tmp_path / "first" / "secateur.json")):
        found = prune(model, tmp_path / out, plan=str(given), **SMALL)
        assert [(width.experts, width.channels) for width in found.pruned_widths()] == widths
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second")
    for block, each in zip(record_of(tmp_path / "first")["blocks"], (8, 16), strict=True):
        owners = Counter(unit // 20 for unit in block["channels"])
        assert owners == dict.fromkeys(block["experts"], each)
    shapes = {name: value.shape for name, value in load_file(tmp_path / "first" / "model.safetensors").items()}
    assert shapes["model.layers.1.mlp.experts.5.down_proj.weight"] == (48, 8)
    assert shapes["model.layers.2.mlp.experts.7.up_proj.weight"] == (16, 48)
    assert shapes["model.layers.1.mlp.shared_expert.up_proj.weight"] == (28, 48)


def test_channels_of_experts_alone_are_removed(tmp_path, checkpoint_folder):
    model, file = checkpoint_folder(NAME), tmp_path / "survey.json"
    how: dict[str, Any] = SMALL | {"sparsity": 0.2, "modules": ("channels",), "survey": file}
    found = prune(model, tmp_path / "out", **how)
    widths = found.pruned_widths()[1:]
    assert {width.experts for width in widths} == {8}
    assert min(width.channels for width in widths) < 20
    curves = json.loads(file.read_text())["curves"]
    assert {(one["kind"], one["axis"], len(one["errors"])) for one in curves if one["block"]} == {
        ("experts", "experts", 1),
        ("experts", "expert_channels", 20),
    }
    assert prune(model, tmp_path / "again", **how).widths == found.widths


def plan_file(folder: Path, *entries: dict[str, Any]) -> Path:
    file = folder / "plan.json"
    file.write_text(json.dumps({"blocks": entries}))
    return file


def test_a_record_with_channels_of_a_shared_expert_is_a_plan(tmp_path, checkpoint_folder):
    """Channels of the shared expert are numbered after those of the last routed expert."""
    model = checkpoint_folder("hunyuan_v1_moe")
    each = [expert * 72 + channel for expert in range(4) for channel in range(8)]
    shared = [8 * 72 + channel for channel in range(60, 68)]
    entry = {"block": 1, "experts": [0, 1, 2, 3], "channels": each + shared}
    prune(model, tmp_path / "out", plan=plan_file(tmp_path, entry), recovery="none", **SMALL)
    assert record_of(tmp_path / "out")["blocks"][0]["channels"] == each + shared
    dense, found = (load_file(folder / "model.safetensors") for folder in (Path(model), tmp_path / "out"))
    name = "model.layers.1.mlp.shared_mlp.up_proj.weight"
    assert torch.equal(found[name], dense[name][60:68])
    fewer = plan_file(tmp_path, entry | {"channels": each + shared[1:]})
    said = r"7 channels of the shared expert are listed, which begin at 576; list 8"
    assert_error(said, prune, model, tmp_path / "wrong", plan=fewer, **SMALL)


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


THREE = {"block": 1, "experts": [0, 1, 2]}
WRONG = {
    "too few": ({"block": 1, "experts": [0, 1]}, "2 are listed, but at least 3 must stay; list more"),
    "not there": ({"block": 1, "experts": [0, 1, 2, 9]}, "9 does not exist; use indices from 0 to 7"),
    "of another block": (THREE | {"block": 0}, "block 0 has no experts; list its heads and channels"),
    "a width too narrow": ({"block": 1, "width": numbers(2, 20)}, "2 experts are not possible; use 3 to 8"),
    "no channels": ({"block": 1, "width": numbers(8, 0)}, "0 channels in each expert are not possible; use 1 to 20"),
    "channels of which no kernel is": ({"block": 1, "width": numbers(8, 13)}, "a multiple of 8, not 13"),
    "another expert's channels": (
        THREE | {"channels": [*range(8), *range(20, 28), *range(60, 68)]},
        "to expert 3, which",
    ),
    "channels not of all": (
        THREE | {"channels": list(range(8))},
        "must keep the same number of channels, and at least",
    ),
    "a width of channels": ({"block": 1, "width": {"channels": 2}}, "heads_per_group, experts, expert_channels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused(tmp_path, checkpoint_folder, case):
    entry, message = WRONG[case]
    plan = plan_file(tmp_path, entry)
    assert_error(message, prune, checkpoint_folder(NAME), tmp_path / "out", plan=plan, **SMALL)


def test_groups_of_experts_stay_equally_large(tmp_path, checkpoint_folder):
    plan = plan_file(tmp_path, {"block": 1, "experts": [0, 1, 2, 4]})
    said = r"must keep the same number of experts \(group 0 keeps 3"
    assert_error(said, prune, checkpoint_folder("glm4_moe groups"), tmp_path / "out", plan=plan, **SMALL)


REFUSED = {
    "more than a token meets leaves": ({"sparsity": 0.9, "modules": ("experts",)}, "only experts may be removed"),
    "speed": ({"target": "decode=1.1x"}, "the time of experts depends on the tokens that are routed to them"),
    "gguf": ({"sparsity": 0.2, "format": "gguf"}, "qwen3moe has one width for all blocks, so prune all of them"),
    "some blocks": ({"sparsity": 0.2, "widths": "uniform", "blocks": "1:3"}, "only 1:3 are to be pruned"),
    "an order": ({"sparsity": 0.2, "criterion": "experts=l1"}, "the criterion of experts must be one of reroute, reap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(tmp_path, monkeypatch, checkpoint_folder, case):
    monkeypatch.setattr(BlockStream, "embed", lambda *_, **__: pytest.fail("work has begun"))
    wishes, message = REFUSED[case]
    out = tmp_path / ("out.gguf" if case == "gguf" else "out")
    assert_error(message, prune, checkpoint_folder("qwen3_moe"), out, **SMALL, **wishes)


def test_active_parameters_leave_out_other_experts(tmp_path, checkpoint_folder):
    model = checkpoint_folder("qwen3_moe")
    stream = BlockStream(open_checkpoint(model))
    active, stored = active_meter(stream), parameter_meter(stream)
    # Of eight experts of 3 x 20 x 48 in each of three blocks, a token meets three.
    assert stored.dense - active.dense == 3 * 5 * 3 * 20 * 48
    assert active.total(prune(model, tmp_path / "out", target="active=90%", **SMALL).widths) <= 0.9 * active.dense


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
    dense, written = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    for block in blocks:
        for place, expert in enumerate(block["experts"]):
            now, before = written[name.format(block["block"], place)], dense[name.format(block["block"], expert)]
            assert torch.equal(now, before) == ((block["block"], expert) in few)


def saved(config: Any, folder: Path) -> Path:
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


NARROWED: dict[str, Any] = SMALL | {"modules": ("channels",), "widths": "uniform", "sparsity": 0.15}


@pytest.mark.parametrize(
    ("name", "key"), [("ernie4_5_moe", "moe_num_shared_experts"), ("deepseek_v3", "n_shared_experts")]
)
def test_a_config_without_a_shared_expert_is_pruned(tmp_path, name, key):
    config = copy.deepcopy(config_of(name))
    setattr(config, key, 0)
    found = prune(saved(config, tmp_path / "dense"), tmp_path / "out", **NARROWED)
    assert {width.channels for width in found.pruned_widths() if width.experts} == {16}


def test_a_config_with_experts_in_no_block_is_pruned(tmp_path):
    config = copy.deepcopy(config_of("deepseek_v2"))
    config.first_k_dense_replace = config.num_hidden_layers
    config.mlp_layer_types = ["dense"] * config.num_hidden_layers
    found = prune(saved(config, tmp_path / "dense"), tmp_path / "out", **NARROWED)
    layers = load_written(tmp_path / "out").model.layers
    assert {layer.mlp.down_proj.in_features for layer in layers} == {found.pruned_widths()[0].channels}


HYBRIDS = ("qwen3_5_text", "lfm2")
QUICK: dict[str, Any] = {"samples": 8, "length": 16, "calibration": "random", "device": "cpu", "effort": "quick"}


@pytest.mark.parametrize("name", HYBRIDS)
def test_similarity_prunes_only_blocks_with_attention(tmp_path, checkpoint_folder, name):
    found = prune(checkpoint_folder(name), tmp_path / "out", **QUICK, criterion="similarity", tau=0.17)
    full = blocks_of(build(name))[1].width
    assert set(found.widths) == {1, 2}
    assert any(width.heads < full.heads for width in found.widths.values())


@pytest.mark.parametrize("name", HYBRIDS)
def test_token_mixers_have_no_keys_and_values(tmp_path, checkpoint_folder, name):
    found, block = (
        prune(checkpoint_folder(name), tmp_path / "out", **QUICK, target="kv=70%"),
        blocks_of(build(name))[1],
    )
    each = 2 * 4 * block.modules[0].size
    assert found.cache_bytes[0] == 2 * each * block.width.kv_groups
    # An attention without heads keeps two numbers, of which transformers reads the length of the text.
    assert found.cache_bytes[1] == sum(each * found.widths[index].kv_groups or 2 * 4 for index in (1, 2))
    assert found.cache_bytes[1] <= 0.7 * found.cache_bytes[0]


@pytest.mark.parametrize("kept", [[], [0, 1, 2, 3]])
def test_a_plan_keeps_token_mixers_whole(tmp_path, checkpoint_folder, kept):
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": [{"block": 0, "heads": kept}]}))
    model, how = checkpoint_folder("lfm2"), QUICK | {"plan": str(tmp_path / "plan.json")}
    assert_error("block 0 has no heads; list its channels", prune, model, tmp_path / "out", **how)
    none = {"token_mixers": 0, "channels": 72}
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": [{"block": 0, "width": none}]}))
    assert_error("0 token mixers are not possible; use 1", prune, model, tmp_path / "out", **how)


def test_requests_that_token_mixers_rule_out_are_refused(tmp_path, checkpoint_folder):
    folder, out = checkpoint_folder("lfm2"), tmp_path / "out"
    assert_error("the time of token mixers", prune, folder, out, **QUICK, target="decode=1.05x")
    for said, asked in (
        ("heads cannot be removed exactly, because a token mixer stands", {"modules": ("heads",), "blocks": "0:1"}),
        ("no biases of output projections, which --recovery bias adds", {"widths": "uniform", "recovery": "bias"}),
    ):
        assert_error(said, prune, folder, out, **QUICK | asked, sparsity=0.1)


@pytest.mark.parametrize("modules", ["channels", "experts"])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_routers_keep_their_dtype_in_every_block(family, modules, tmp_path):
    """transformers keeps routers in float32 although all other weights are bfloat16."""
    model = save(family, tmp_path / "model", torch.bfloat16)
    stored = load_file(model / "model.safetensors")
    parts = ("correction_bias", "mlp.gate.weight")
    routers = {name: torch.randn(value.shape) for name, value in stored.items() if name.endswith(parts)}
    save_file(stored | routers, model / "model.safetensors", {"format": "pt"})
    summary = prune(model, tmp_path / "out", **SMALL, blocks="1:2", modules=modules, sparsity=0.2)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(routers) > 3
    # Rows of removed experts are gone.
    assert all(torch.isin(written[name], value).all() for name, value in routers.items())
    assert summary.bytes[1] == sum(value.nbytes for value in written.values())


def test_a_model_that_returns_router_logits(tmp_path, checkpoint_folder):
    """The loss that transformers computes from them needs the same number of experts in all blocks."""
    model = shutil.copytree(checkpoint_folder("mixtral"), tmp_path / "model")
    edit_json(model / "config.json", output_router_logits=True)
    widths = tmp_path / "ratios.json"
    widths.write_text('{"0:1": {"experts": 0.25}}')
    prune(model, tmp_path / "out", widths=str(widths), **SMALL)
    assert load_written(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
