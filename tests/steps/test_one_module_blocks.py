"""A decoder is pruned whose blocks have one module each: a token mixer, an attention or a feed-forward."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models import SIMILAR, SIZES, build, load_written, logits_of, masked, relative, save, token_rows
from outputs import assert_error, record_of
from secateur import prune, prune_model
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES

pytestmark = pytest.mark.skipif("nemotron_h" not in CONFIG_MAPPING, reason="this transformers has no such family")

FAMILY: dict[str, Any] = {
    "model_type": "nemotron_h",
    "attention": "mixer",
    "feed_forward": "mixer",
    "gate": None,
    "derived": False,
    "token_mixer": {"path": "mixer", "output": "out_proj"},
    "final_norm": "model.norm_f",
    "stock": {"theta_key": None},
}
KEYS: dict[str, Any] = {
    **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", *["mlp", "full_attention"] * 2],
    "num_key_value_heads": 3,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 24,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
}
KINDS = [["token_mixers"], *[["channels"], ["heads"]] * 2]
SMALL: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "device": "cpu", "sparsity": 0.3}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The model's folder, beside the family's file."""
    monkeypatch.setattr("secateur.steps.family_file._READ", set())
    monkeypatch.setitem(SIMILAR, "nemotron_h", lambda: AutoConfig.for_model("nemotron_h", **KEYS))
    folder = save("nemotron_h", tmp_path / "dense")
    # transformers would write the names that the first checkpoints of this family have.
    save_file(build("nemotron_h").state_dict(), folder / "model.safetensors", {"format": "pt"})
    yield folder
    FAMILIES.pop("nemotron_h", None)


def family(folder: Path, **keys: Any) -> Path:
    """Write the family's file with some other values."""
    file = folder.parent / "family.yaml"
    file.write_text(json.dumps(FAMILY | keys))
    return file


@pytest.mark.parametrize(("widths", "format"), [("adaptive", "hf"), ("uniform", "hf"), ("uniform", "stock")])
def test_the_folder_computes_what_is_left(tmp_path, dense, widths, format):
    how = {"widths": widths, "format": format, "recovery": "none"}
    prune(dense, tmp_path / "out", **SMALL, **how, family=family(dense))
    blocks = record_of(tmp_path / "out")["blocks"]
    assert [[module["kind"] for module in block["modules"]] for block in blocks] == KINDS
    model, ids = build("nemotron_h"), token_rows()
    with masked(model, {block["block"]: block for block in blocks}):
        wanted = logits_of(model, ids)
    assert relative(logits_of(model, ids), wanted) > 1e-3
    assert relative(logits_of(load_written(tmp_path / "out"), ids), wanted) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"recovery": "bias"}, {"criterion": "similarity", "tau": 0.12, "sparsity": None}]
)
def test_a_refitted_folder_is_the_model_in_memory(tmp_path, dense, options):
    asked = SMALL | options | {"family": family(dense)}
    prune(dense, tmp_path / "out", **asked)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    found, ids = prune_model(model, AutoTokenizer.from_pretrained(dense), **asked), token_rows()
    assert relative(logits_of(found, ids), logits_of(build("nemotron_h"), ids)) > 1e-3
    assert torch.equal(logits_of(load_written(tmp_path / "out"), ids), logits_of(found, ids))


def test_whole_modules_leave_and_the_result_is_pruned_again(tmp_path, dense):
    entries = [{"block": 1, "width": {"channels": 0}}, {"block": 2, "width": {"kv_groups": 0, "heads_per_group": 0}}]
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": entries}))
    how = SMALL | {"family": family(dense)}
    prune(dense, tmp_path / "one", **how | {"sparsity": None}, plan=tmp_path / "plan.json")
    model = load_written(tmp_path / "one")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model(token_rows(), output_attentions=True).attentions
    assert [weights.shape[1] for weights in seen] == [0, 6]
    assert model.generate(token_rows(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    prune(tmp_path / "one", tmp_path / "two", **how | {"sparsity": 0.2})
    assert record_of(tmp_path / "two")["sparsity"]["reached"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("keys", [{"attention": "mixr"}, {"feed_forward": "mixr"}, {"values": "v"}, {"down": "dwn"}])
def test_a_name_that_no_block_has_is_refused(tmp_path, dense, keys):
    said = f"the entry for nemotron_h names a layer that does not exist .*{next(iter(keys.values()))}"
    assert_error(said, prune, dense, tmp_path / "out", **SMALL, family=family(dense, **keys))


def test_gguf_needs_both_modules(tmp_path, dense):
    how = SMALL | {"family": family(dense, gguf={"architectures": ["llama"], "activation": "mlp_hidden_act"})}
    said = "needs an attention and a feed-forward in every block"
    assert_error(said, prune, dense, tmp_path / "out.gguf", **how, format="gguf", widths="uniform")
