"""Decoders that transformers does not include are pruned, and their folders open with their own code."""

import json
import shutil
from pathlib import Path
from typing import Any

import own_decoders
import pytest
import torch
from transformers import AutoModelForCausalLM

from models import make_tokenizer
from outputs import assert_error, record_of
from secateur import prune
from secateur.commands.families import describe_model
from secateur.layout.proof import INEXACT
from secateur.measure.evaluation import evaluate
from secateur.retraining.retrain import retrain

HOW: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "effort": "quick", "round": 1}
KINDS = ("Biased", "Chain", "Listed")


def dense(kind: str, folder: Path) -> Any:
    """Write a model with its code, and return it."""
    torch.manual_seed(0)
    config = own_decoders.OwnConfig(has_table=kind == "Biased")
    model = getattr(own_decoders, f"{kind}ForCausalLM")(config).eval()
    for value in model.parameters():
        value.data.add_(torch.randn(value.shape) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    shutil.copyfile(own_decoders.__file__, folder / "modeling_own.py")
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": f"{kind}ForCausalLM"}
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {auto: f"modeling_own.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(raw))
    return model


def own(folder: Path, name: str) -> Path:
    """Return a path whose last name no other test has; transformers keeps classes by the names of folders."""
    return folder / f"{folder.name}-{name}"


def opened(folder: Path) -> Any:
    """Open a folder as a user would, and check that a cache changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, first = model(ids, use_cache=False).logits, model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values, use_cache=True).logits
    assert whole.isfinite().all()
    assert torch.allclose(torch.cat([first.logits, rest], 1), whole, atol=1e-4)
    return model


def parameters(model: Any) -> int:
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_is_pruned_with_its_own_code(tmp_path, kind):
    model = dense(kind, own(tmp_path, "dense"))
    prune(own(tmp_path, "dense"), own(tmp_path, "out"), **HOW, sparsity=0.1, trust_remote_code=True)
    small = opened(own(tmp_path, "out"))
    assert (type(small).__name__, type(small).__mro__[2].__name__) == (
        f"Secateur{kind}ForCausalLM",
        f"{kind}ForCausalLM",
    )
    assert parameters(small) == record_of(own(tmp_path, "out"))["sizes"]["parameters"][1] < 0.95 * parameters(model)
    prune(own(tmp_path, "out"), own(tmp_path, "again"), **HOW, sparsity=0.05, trust_remote_code=True)
    assert parameters(opened(own(tmp_path, "again"))) < parameters(small)
    small.save_pretrained(own(tmp_path, "saved"))
    assert parameters(opened(own(tmp_path, "saved"))) == parameters(small)


def test_a_pruned_folder_is_retrained(tmp_path):
    dense("Chain", own(tmp_path, "dense"))
    prune(own(tmp_path, "dense"), own(tmp_path, "out"), **HOW, sparsity=0.2, trust_remote_code=True)
    (tmp_path / "text.txt").write_text("".join(f"w{3 * (i % 7)} " for i in range(900)))
    how = {"calibration": str(tmp_path / "text.txt"), "tokens": 1024, "length": 16, "learning_rate": 5e-3}
    folders = own(tmp_path, "out"), own(tmp_path, "trained")
    assert_error("pass trust_remote_code", retrain, *folders, **how)
    before, after = retrain(*folders, **how, trust_remote_code=True).perplexity
    assert after < before
    assert parameters(opened(folders[1])) == parameters(opened(folders[0]))


@pytest.mark.parametrize("kind", ["Biased", "Chain"])
def test_its_own_class_opens_one_width(tmp_path, kind):
    model, how = dense(kind, own(tmp_path, "dense")), HOW | {"modules": ("channels",), "trust_remote_code": True}
    prune(own(tmp_path, "dense"), own(tmp_path, "out"), **how, sparsity=0.05, widths="uniform", format="stock")
    small = opened(own(tmp_path, "out"))
    assert type(small).__name__ == f"{kind}ForCausalLM"
    assert small.config.width < model.config.width
    prune(own(tmp_path, "dense"), own(tmp_path, "hf"), **how, sparsity=0.05)
    prune(own(tmp_path, "hf"), own(tmp_path, "one"), **how, sparsity=0.05, widths="uniform", format="stock")
    assert type(opened(own(tmp_path, "one"))).__name__ == f"{kind}ForCausalLM"


def test_units_cut_out_equal_units_set_to_zero(tmp_path):
    model = dense("Chain", own(tmp_path, "dense"))
    prune(own(tmp_path, "dense"), own(tmp_path, "out"), **HOW, sparsity=0.2, recovery="none", trust_remote_code=True)
    size = model.config.hidden_size // model.config.num_attention_heads
    for layer, block in zip(model.body.stack, record_of(own(tmp_path, "out"))["blocks"], strict=True):
        for linear, kept, each in (
            (layer.mixes.joins, block["heads"], size),
            (layer.inner.leaves, block["channels"], 1),
        ):
            gone = [unit for unit in range(linear.in_features // each) if unit not in kept]
            linear.weight.data.unflatten(1, (-1, each))[:, gone] = 0
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.allclose(opened(own(tmp_path, "out"))(ids).logits, model(ids).logits, atol=1e-4)


def test_what_was_found_is_printed(tmp_path):
    found = {}
    for kind in KINDS:
        dense(kind, tmp_path / kind)
        rows = describe_model(str(tmp_path / kind), trust_remote_code=True)
        found[kind] = [(row.module, row.layers, row.locked) for row in rows]
    free = ("mixes", "asks, holds, gives, joins", "")
    assert found["Biased"] == [("mixes", "joins", INEXACT), ("inner", "second, first, last", "")]
    assert found["Chain"] == [free, ("inner", "widens, leaves", "")]
    assert found["Listed"] == [free, ("inner", "", "its experts are a list of layers")]


def test_the_code_runs_only_if_the_user_says_so(tmp_path):
    dense("Chain", own(tmp_path, "dense"))
    mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    code = own(tmp_path, "dense") / "modeling_own.py"
    code.write_text(code.read_text() + mark)
    said = "own needs code that comes with the checkpoint .* pass trust_remote_code"
    assert_error(said, prune, own(tmp_path, "dense"), own(tmp_path, "out"), **HOW)
    assert not (tmp_path / "ran").exists()
    code.write_text(code.read_text() + "raise ValueError('not here')\n")
    model, out, how = own(tmp_path, "dense"), own(tmp_path, "out"), HOW | {"trust_remote_code": True}
    assert_error("transformers rejects it .not here.", prune, model, out, **how)
    raw = json.loads((own(tmp_path, "dense") / "config.json").read_text())
    raw["auto_map"]["AutoModelForCausalLM"] = "owner/other--modeling_own.ChainForCausalLM"
    (own(tmp_path, "dense") / "config.json").write_text(json.dumps(raw))
    code.write_text(code.read_text().partition(mark)[0])
    assert_error("is code of another model", prune, model, out, **how)


def test_a_pruned_folder_is_measured(tmp_path):
    dense("Chain", own(tmp_path, "dense"))
    prune(own(tmp_path, "dense"), own(tmp_path, "out"), **HOW, sparsity=0.2, trust_remote_code=True)
    (tmp_path / "text.txt").write_text("some words to read " * 40)
    how = {"texts": [str(tmp_path / "text.txt")], "tokens": 64, "length": 16, "trust_remote_code": True}
    found = evaluate(str(own(tmp_path, "out")), against=str(own(tmp_path, "dense")), **how)
    assert found.models[0].parameters < found.models[1].parameters
