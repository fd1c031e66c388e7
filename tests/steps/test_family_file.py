"""A family that a person describes in a file is pruned as ours are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models import SIMILAR, SIZES, build, logits_of, masked, relative, save, selected, token_rows
from outputs import assert_error, error_of
from secateur import prune
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES, family_of
from secateur.model.per_layer import model_class
from secateur.steps.family_file import read_family

EXTEND = Path(__file__).parents[2] / "docs" / "extend.md"
BIOGPT = EXTEND.read_text().partition('title="biogpt.yaml"\n')[2].partition("```")[0]
"""The file of docs/extend.md, as it stands there."""
SMALL: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "device": "cpu"}


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file; what it makes known is forgotten again."""
    monkeypatch.setattr("secateur.steps.family_file._READ", set())
    config = AutoConfig.for_model("biogpt", **SIZES)
    monkeypatch.setitem(SIMILAR, "biogpt", lambda: config)
    file = tmp_path / "biogpt.yaml"
    file.write_text(BIOGPT)
    yield file
    FAMILIES.pop("biogpt", None)


@pytest.mark.parametrize("widths", ["uniform", "adaptive"])
def test_pruned_from_a_file(tmp_path, family, widths):
    folder = save("biogpt", tmp_path / "dense")
    prune(folder, tmp_path / "out", **SMALL, family=family, sparsity=0.3, widths=widths, recovery="none")
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    keeps = {block["block"]: selected(tuple(block["heads"]), tuple(block["channels"])) for block in record["blocks"]}
    dense, ids = build("biogpt"), token_rows()
    with masked(dense, keeps):
        wanted = logits_of(dense, ids)
    assert relative(logits_of(dense, ids), wanted) > 1e-3
    with quiet():
        config = AutoConfig.from_pretrained(tmp_path / "out")
        auto = AutoModelForCausalLM if widths == "uniform" else model_class(config)
        found = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert relative(logits_of(found, ids), wanted) < 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b", "a family is a mapping with model_type"),
        ("up: fc1", "a family is a mapping with model_type"),
        ("model_type: [", "line 1: not valid YAML"),
        ("model_type: llama", "secateur knows llama; leave --family out"),
        (BIOGPT.replace("up:", "upp:"), "upp: no such field; there are blocks, attention"),
        (BIOGPT.replace("fc1", "3"), "up: 3: Input should be a valid string"),
        (BIOGPT.replace(": dense", ": some"), "head_counts: 'some': Input should be 'any', 'divisors' or"),
        (BIOGPT.replace("theta", "thetas"), "stock.thetas_key: no such field"),
        (BIOGPT.partition("stock")[0] + "stock: any", "stock is 'any'; write a mapping"),
        (f"{BIOGPT}token_mixer: {{}}\n", "token_mixer.path is missing"),
        (f"{BIOGPT}gguf: {{architectures: [nosuch]}}\n", "gguf.architectures: secateur does not write nosuch; it"),
    ],
)
def test_a_file_with_mistakes(family, text, said):
    family.write_text(text)
    error = error_of(read_family, family)
    assert said in error
    assert error.startswith(str(family))
    assert "biogpt" not in FAMILIES


def test_a_layer_or_a_file_that_is_not_there(tmp_path, family):
    family.write_text(BIOGPT.replace("fc2", "fc3"))
    folder, out = save("biogpt", tmp_path / "dense"), tmp_path / "out"
    said = r"the entry for biogpt names a layer that does not exist .*fc3"
    assert_error(said, prune, folder, out, **SMALL, family=family)
    said = r"none\.yaml: cannot be read .* name a YAML file"
    assert_error(said, prune, folder, out, **SMALL, family=tmp_path / "none.yaml")


def test_a_file_corrects_what_the_class_tells(tmp_path, family):
    family.write_text("model_type: biogpt\nheads_locked: two of them belong together\n")
    assert read_family(family) == "biogpt"
    described = family_of(AutoConfig.for_model("biogpt", **SIZES))
    assert (described.blocks, described.up) == ("biogpt.layers", "fc1")
    assert described.heads_locked == "two of them belong together"
