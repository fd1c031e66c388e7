"""Plan files and ratio files: their contents, every possible error, and the models that they give."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from models import blocks_of, build, wide
from outputs import edited_weights, error_of, record_of
from secateur import open_checkpoint, prune
from secateur.checkpoints.weights import InMemory
from secateur.model.structure import Block
from secateur.model.units.heads import HEADS
from secateur.plan.plan_file import read_plan
from secateur.plan.ratio_file import read_ratios

SMALL: dict[str, Any] = {"samples": 8, "length": 16, "calibration": "random"}
FINGERPRINT = "0123"
NAMES = "or give a width with whole numbers for kv_groups, heads_per_group, channels"


@cache
def blocks(name: str = "llama") -> list[Block]:
    """Return the blocks of a model; those of the Llama have three KV groups of two heads, and 72 channels."""
    return blocks_of(build(name))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """Return a function that writes a file with given contents."""

    def write(contents: Any) -> Path:
        path = tmp_path / "plan.json"
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return path

    return write


def test_a_plan_file_lists_units(file):
    path = file(
        {
            "blocks": [
                {"block": 2, "heads": [5, 0], "channels": [7, 3, 71], "modules": "whatever"},
                {"block": 0, "heads": [], "channels": []},
                {"block": 1, "channels": [1]},
            ]
        }
    )
    widths, units = read_plan(path, blocks(), FINGERPRINT)
    assert widths == {0: wide(0, 0, 0), 1: wide(3, 2, 1), 2: wide(2, 1, 3)}
    assert list(widths) == [0, 1, 2]
    assert units == {
        0: {"heads": (), "channels": ()},
        1: {"heads": tuple(range(6)), "channels": (1,)},
        2: {"heads": (0, 5), "channels": (3, 7, 71)},
    }


def test_a_plan_file_gives_widths(file):
    said = [numbers(2, 2, 9), numbers(0, 0, 0)]
    path = file({"fingerprint": FINGERPRINT, "blocks": [{"block": i, "width": width} for i, width in enumerate(said)]})
    assert read_plan(path, blocks(), FINGERPRINT) == ({0: wide(2, 2, 9), 1: wide(0, 0, 0)}, {})


def numbers(groups: Any, heads: Any, channels: Any) -> dict[str, Any]:
    return {"kv_groups": groups, "heads_per_group": heads, "channels": channels}


def one(**entry: Any) -> dict[str, Any]:
    return {"blocks": [{"block": 0, **entry}]}


REFUSED: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not readable as JSON"),
    "a list": ([], "must be a JSON object, as secateur.json is"),
    "no blocks": ({"fingerprint": FINGERPRINT}, "not a plan: 'blocks' must be a list of entries, each with block,"),
    "a survey": ({"blocks": "0:2", "curves": []}, "not a plan: 'blocks' must be a list of entries"),
    "another model": ({"fingerprint": "4567", **one(heads=[0])}, "made for another model; remove 'fingerprint' to use"),
    "no such block": ({"blocks": [{"block": 3, "heads": []}]}, "block 3 does not exist; the model has blocks 0 to 2"),
    "true for a block": ({"blocks": [{"block": True, "heads": []}]}, "'block' is true; it must be a number"),
    "two entries for a block": ({"blocks": [{"block": 1, "heads": []}] * 2}, "block 1 has two entries"),
    "a head twice": (one(heads=[0, 1, 1]), "block 0, heads: 1 is listed twice"),
    "too large a head": (one(heads=[6]), "block 0, heads: 6 does not exist; use indices from 0 to 5"),
    "negative": (one(channels=[-1]), "block 0, channels: -1 does not exist"),
    "no list": (one(heads=3), "block 0, heads: must be a list of the indices to keep"),
    "booleans": (one(heads=[True, False]), "block 0, heads: must be a list of the indices to keep"),
    "groups of different sizes": (one(heads=[0, 1, 2]), "(group 0 keeps 2, group 1 keeps 1)"),
    "lists in some blocks only": (
        {"blocks": [{"block": 0, "heads": [0]}, {"block": 1, "width": numbers(3, 2, 9)}]},
        "block 1 has no heads and channels; list them in every block, or in no block",
    ),
    "an empty entry": (one(), f"list the heads and channels to keep, {NAMES}"),
    "part of a width": (one(width={"kv_groups": 2, "channels": 9}), NAMES),
    "more than a width": (one(width={"kv_groups": 2, "heads_per_group": 2, "channels": 9, "depth": 1}), NAMES),
    "too wide": (one(width=numbers(3, 2, 73)), "73 channels are not possible; use 1 to 72"),
    "both fewer": (one(width=numbers(2, 1, 72)), "the width is narrower along kv_groups and heads_per_group"),
}


def refused(read: Callable[..., Any], path: Path, *given: Any, message: str) -> None:
    error = error_of(read, path, *given)
    assert error.startswith(f"{path}: ")
    assert message in error


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_names_what_is_wrong_with_a_plan_file(file, case):
    contents, message = REFUSED[case]
    path = file(contents)
    refused(read_plan, path, blocks(), FINGERPRINT, message=message)


def test_single_locked_heads_cannot_be_removed(file):
    path = file(one(heads=[0, 1, 2, 3]))
    refused(read_plan, path, blocks("olmo2"), FINGERPRINT, message="block 0, heads: single heads cannot be removed")
    path = file(one(width=numbers(2, 2, 72)))
    refused(read_plan, path, blocks("olmo2"), FINGERPRINT, message="2 KV groups are not possible; use 3")
    for heads in ([], list(range(6))):
        assert read_plan(file(one(heads=heads)), blocks("olmo2"), FINGERPRINT)[0][0].product(HEADS) == len(heads)


# Ratios.


def test_a_ratio_file_gives_ratios_for_ranges_of_blocks(file):
    path = file({"0:1": 0.5, "1:3": {"channels": 0.25}})
    assert read_ratios(path, blocks(), 1) == {0: wide(3, 1, 36), 1: wide(3, 2, 54), 2: wide(3, 2, 54)}
    # The nearest multiple; the attention has its own steps.
    path = file({"1:2": {"heads": 0.3, "channels": 0.3}, "2:3": 1})
    assert read_ratios(path, blocks(), 16) == {1: wide(2, 2, 48), 2: wide(0, 0, 0)}
    # Neither a large multiple nor a large ratio below 1 removes a module.
    assert read_ratios(file({"0:3": {"channels": 0.5}}), blocks(), 64)[0] == wide(3, 2, 64)
    assert read_ratios(file({"0:3": {"heads": 0.95}}), blocks(), 1)[0] == wide(1, 2, 72)
    large = file({"0:3": {"channels": 0.9}})
    refused(read_ratios, large, blocks(), 200, message="no unit is removed")
    assert read_ratios(file({"0:3": {"heads": 0.4, "channels": 0.5}}), blocks("olmo2"), 16)[0] == wide(3, 2, 32)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("nonsense", "not readable as JSON"),
        ("[0.5]", "must be a JSON object"),
        ({"0": 0.5}, "'0' is not a range of blocks; write first:end within 0:3"),
        ({"0:4": 0.5}, "'0:4' is not a range of blocks"),
        ({"1:1": 0.5}, "'1:1' is not a range of blocks"),
        ({"-1:2": 0.5}, "'-1:2' is not a range of blocks"),
        ({"0:2": 0.5, "1:3": 0.5}, "block 1 is in two ranges"),
        ('{"0:2": 0.5, "0:2": 0.1}', "not readable as JSON ('0:2' is there twice)"),
        ({"0:2": 1.5}, "0:2: write the share to remove, from 0 to 1, or one share each for heads, channels, experts"),
        ({"0:2": -0.1}, "write the share to remove"),
        ({"0:2": True}, "write the share to remove"),
        ({"0:2": {"heads": 0.5, "layers": 0.5}}, "write the share to remove"),
        ({"0:2": float("nan")}, "write the share to remove"),
        ({}, "no unit is removed; add a range, or increase the ratios"),
        ({"0:3": 0.001}, "no unit is removed"),
    ],
)
def test_an_error_names_what_is_wrong_with_a_ratio_file(file, contents, message):
    refused(read_ratios, file(contents), blocks(), 1, message=message)


def kept_units(folder: Path) -> list[Any]:
    return [(block["width"], block["heads"], block["channels"]) for block in record_of(folder)["blocks"]]


def test_secateur_json_is_a_plan_file(tmp_path, checkpoint_folder):
    """The same units and text give the same weights, up to the rounding of sums; another text refits the same units."""
    model, plan = checkpoint_folder("llama"), str(tmp_path / "first" / "secateur.json")
    prune(model, tmp_path / "first", sparsity=0.4, **SMALL)
    again = prune(model, tmp_path / "again", **SMALL, plan=plan)
    prune(model, tmp_path / "other", **SMALL | {"seed": 1}, plan=plan)
    folders = [tmp_path / name for name in ("first", "again", "other")]
    first, same, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert_close(same, first, rtol=1e-4, atol=1e-5)
    assert max(float((other[name] - first[name]).abs().max()) for name in first) > 1e-3
    assert (folders[0] / "config.json").read_bytes() == (folders[1] / "config.json").read_bytes()
    assert again.sparsity == record_of(folders[0])["sparsity"]["reached"] >= 0.4
    assert kept_units(folders[0]) == kept_units(folders[1]) == kept_units(folders[2])


def test_units_may_have_a_width_that_secateur_plan_never_chooses(tmp_path, checkpoint_folder):
    """Such a width is one of two heads of one KV group; the secateur.json of that run is a plan file, too."""
    asked = {"blocks": [{"block": 0, "heads": [3], "channels": [0]}]}
    (tmp_path / "plan.json").write_text(json.dumps(asked))
    prune(checkpoint_folder("llama"), tmp_path / "out", **SMALL, plan=str(tmp_path / "plan.json"))
    record = tmp_path / "out" / "secateur.json"
    widths, units = read_plan(record, blocks(), json.loads(record.read_text())["fingerprint"])
    assert widths == {0: wide(1, 1, 1)}
    assert units == {0: {"heads": (3,), "channels": (0,)}}


def test_models_with_different_weights_have_different_fingerprints(tmp_path, checkpoint_folder):
    shutil.copytree(checkpoint_folder("llama"), tmp_path / "copy")
    found = {open_checkpoint(checkpoint_folder("llama")).fingerprint}
    assert {open_checkpoint(tmp_path / "copy").fingerprint} == found
    # The first or the last row of the embeddings alone is much less than all of them.
    for name, row in (("model.norm.weight", 0), ("model.embed_tokens.weight", 0), ("model.embed_tokens.weight", -1)):
        with edited_weights(tmp_path / "copy") as tensors:
            tensors[name][row] += 1e-3
        assert open_checkpoint(tmp_path / "copy").fingerprint not in found
        found.add(open_checkpoint(tmp_path / "copy").fingerprint)
    samples = InMemory((5,), torch.uint8, values=torch.arange(5, dtype=torch.uint8)).samples(2)
    assert list(samples) == [b"\x00\x01", b"\x01\x02", b"\x03\x04"], "start, middle and end"
