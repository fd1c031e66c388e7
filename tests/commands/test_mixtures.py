"""Every command on a mixture of experts, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CheckpointFolder
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent
from secateur.commands.options import Options, Running
from secateur.commands.plan import propose
from secateur.commands.prune import prune
from secateur.commands.survey import survey_page
from secateur.model.checkpoint import open_checkpoint
from secateur.model.stream import BlockStream
from secateur.plan.meters import active_meter, parameter_meter

ROWS: dict[str, Any] = {"calibration": "random", "samples": 12, "length": 16}
SMALL: dict[str, Any] = ROWS | {"device": "cpu"}
NAME = "qwen2_moe some"
"""Its first block has channels, the others experts."""


def test_a_plan_is_carried_out_and_read_again(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    model, file = checkpoint_folder(NAME), tmp_path / "plan.json"
    propose(model, Options(sparsity=0.3, **ROWS), Running(device="cpu"), out=file)
    for out, given in (("first", file), ("second", tmp_path / "first" / "secateur.json")):
        prune(model, tmp_path / out, plan=str(given), **SMALL)
    first, second = (tmp_path / out / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    blocks = json.loads((tmp_path / "first" / "secateur.json").read_text())["blocks"]
    assert ["experts" in block for block in blocks] == [False, True, True]
    assert all(len(block["experts"]) == block["width"]["experts"] < 8 for block in blocks[1:])


def test_ratios_are_of_each_kind(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    file = tmp_path / "ratios.json"
    file.write_text('{"0:2": {"experts": 0.25, "channels": 0.5}, "2:3": {"heads": 0.34}}')
    found = prune(checkpoint_folder(NAME), tmp_path / "out", widths=str(file), **SMALL)
    widths = [found.widths[index] for index in range(3)]
    assert [width.channels for width in widths] == [36, 0, 0]
    assert [width.experts for width in widths] == [0, 6, 8]
    assert [width.heads for width in widths] == [6, 6, 4]


WRONG = {
    "too few": ({"block": 1, "experts": [0, 1]}, "a token meets 3 experts, and 2 are listed; keep more"),
    "not there": ({"block": 1, "experts": [0, 1, 2, 9]}, "9 does not exist; the module has 0 to 7"),
    "of another block": ({"block": 0, "experts": [0, 1, 2]}, "block 0 has no experts; list its heads and channels"),
    "a width too narrow": (
        {"block": 1, "width": {"groups": 3, "per_group": 2, "experts": 2}},
        "2 experts cannot be had; possible are 3 to 8",
    ),
    "a width of channels": (
        {"block": 1, "width": {"groups": 3, "per_group": 2, "channels": 2}},
        "list the heads and experts to keep, or give a width of groups, per_group, experts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan(tmp_path: Path, checkpoint_folder: CheckpointFolder, case: str) -> None:
    entry, message = WRONG[case]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"blocks": [entry]}))
    with pytest.raises(SecateurError, match=message):
        prune(checkpoint_folder(NAME), tmp_path / "out", plan=str(file), **SMALL)


def test_groups_must_stay_alike(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"blocks": [{"block": 1, "experts": [0, 1, 2, 4]}]}))
    with pytest.raises(SecateurError, match=r"experts: each group must keep as many as the others \(group 0 keeps 3"):
        prune(checkpoint_folder("glm4_moe groups"), tmp_path / "out", plan=str(file), **SMALL)


REFUSED = {
    "more than a token meets leaves": ({"sparsity": 0.9, "modules": ("experts",)}, "only experts were asked for"),
    "no channels": ({"sparsity": 0.2, "modules": ("channels",)}, "the model has experts and heads alone"),
    "speed": ({"target": "decode=1.1x"}, "how long experts take depends on where tokens go"),
    "gguf": ({"sparsity": 0.2, "format": "gguf"}, "qwen3moe has one width for all blocks, so prune all of them"),
    "some blocks": ({"sparsity": 0.2, "widths": "uniform", "blocks": "1:3"}, "only 1:3 are to be pruned"),
    "an order": ({"sparsity": 0.2, "criterion": "experts=l1"}, "that of experts must be one of reroute, reap"),
}


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("num_kv_shared_layers", "blocks that reuse the keys and values of earlier ones"),
        ("hidden_size_per_layer_input", "blocks that read inputs of their own"),
        ("enable_moe_block", "experts beside the feed-forward"),
    ],
)
def test_a_kind_without_code_is_named(tmp_path: Path, checkpoint_folder: CheckpointFolder, key: str, what: str) -> None:
    model = tmp_path / "dense"
    shutil.copytree(checkpoint_folder("gemma4_text"), model)
    config = json.loads((model / "config.json").read_text())
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    (model / "config.json").write_text(json.dumps(config | {key: True if key == "enable_moe_block" else 1} | experts))
    with pytest.raises(SecateurError, match=rf"this gemma4_text has {what}.*, for which there is no code yet"):
        prune(model, tmp_path / "out", sparsity=0.2, **SMALL)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_folder: CheckpointFolder, case: str
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(BlockStream, "embed", work)
    wishes, message = REFUSED[case]
    out = tmp_path / ("out.gguf" if case == "gguf" else "out")
    with pytest.raises(SecateurError, match=message) as caught:
        prune(checkpoint_folder("qwen3_moe"), out, **SMALL, **wishes)
    assert "\n" not in str(caught.value)


def test_the_survey_has_a_page_and_serves_every_size(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    model = checkpoint_folder(NAME)
    survey_page(model, tmp_path / "survey", Options(**ROWS), Running(device="cpu"))
    page = (tmp_path / "survey" / "survey.html").read_text()
    assert "Experts kept, by block" in page
    assert "{{" not in page
    running = Running(device="cpu", survey=tmp_path / "survey" / "survey.json")
    found = prune(model, tmp_path / "out", Options(sparsity=0.3, **ROWS), running)
    assert found.sparsity == pytest.approx(0.3, abs=0.02)


def test_active_parameters_are_those_that_a_token_meets(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    model = checkpoint_folder("qwen3_moe")
    stream = BlockStream(open_checkpoint(model))
    active, stored = active_meter(stream), parameter_meter(stream)
    # Of eight experts of 3 x 20 x 48 in each of three blocks, a token meets three.
    assert stored.dense - active.dense == 3 * 5 * 3 * 20 * 48
    found = prune(model, tmp_path / "out", target="active=90%", **SMALL)
    assert active.total(found.widths) <= 0.9 * active.dense


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("alike", [True, False])
def test_experts_that_are_little_alike_are_said_beforehand(
    tmp_path: Path, checkpoint_folder: CheckpointFolder, alike: bool
) -> None:
    """Of copies, the ones that stay do the work of those that go."""
    model, notes = tmp_path / "dense", Notes()
    shutil.copytree(checkpoint_folder("qwen3_moe"), model)
    tensors = load_file(model / "model.safetensors")
    if alike:
        for name in tensors:
            tensors[name] = tensors[re.sub(r"experts\.\d+", "experts.0", name)].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    how = {"sparsity": 0.35, "modules": ("experts",), "effort": "quick"}
    prune(model, tmp_path / "out", watcher=notes, **SMALL | how)
    said = [note for note in notes.said if note.startswith("The experts are little alike: without those that go, ")]
    assert len(said) == (0 if alike else 1)


@pytest.mark.parametrize(
    ("samples", "length", "more"), [(1, 3, ", more than half; take more rows, or a text of more kinds"), (2, 7, "")]
)
def test_experts_that_hardly_meet_a_token_are_listed(
    tmp_path: Path, checkpoint_folder: CheckpointFolder, samples: int, length: int, more: str
) -> None:
    """And keep their weights: a text of two rows sends most of them nothing."""
    model, notes = checkpoint_folder("qwen3_moe"), Notes()
    how = {"calibration": "random", "sparsity": 0.1, "modules": ("experts",), "effort": "quick"}
    prune(model, tmp_path / "out", samples=samples, length=length, watcher=notes, **how)
    blocks = json.loads((tmp_path / "out" / "secateur.json").read_text())["blocks"]
    kept = sum(len(block["experts"]) for block in blocks)
    few = [(block["block"], expert) for block in blocks for expert in block["modules"][1]["unfitted"]]
    assert 0 < len(few) <= kept
    assert f"{len(few)} of {kept} experts met fewer than 8 tokens and keep their weights{more}" in notes.said
    dense = open_checkpoint(model)
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    written = load_file(tmp_path / "out" / "model.safetensors")
    for block in blocks:
        for place, expert in enumerate(block["experts"]):
            same = torch.equal(
                written[name.format(block["block"], place)], dense.read(name.format(block["block"], expert))
            )
            assert same == ((block["block"], expert) in few)
