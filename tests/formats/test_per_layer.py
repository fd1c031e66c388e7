"""Widths that differ between blocks: what is written computes what the dense model does with removed units silenced."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import (
    _EXPERTS,
    GEMMA,
    GROUPED,
    ROWS,
    SHARED,
    WIDE4,
    _config,
    blocks_of,
    build,
    config_of,
    dense,
    layers_of,
    load_written,
    logits_of,
    masked,
    narrowed,
    own_axes,
    parameters_in,
    relative,
    save,
    token_rows,
    wide,
    write_pruned,
)
from outputs import assert_error
from secateur import BlockStream, open_checkpoint, prune
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES, family_of
from secateur.formats.format import PrunedModel
from secateur.formats.per_layer import MODELING_FILE, HfFolder, per_layer_unsupported
from secateur.formats.stock import StockFolder
from secateur.measure.evaluation import evaluate
from secateur.model.axes import Width
from secateur.model.layer_sizes import IN_MEMORY
from secateur.model.per_layer import is_per_layer, widths_of
from secateur.model.structure import Block
from secateur.model.surgery import assign, first_units
from secateur.plan.meters import cache_meter
from secateur.plan.problem import Plan

TOLERANCE = 1e-5
"""Largest deviation of a logit over the largest logit."""
FIRST = 9
"""Tokens read at once before the others come one at a time or together."""

FACTORS = {"short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.1, 2.2, 2.3, 2.4]}
LONG = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 32, "rope_theta": 500.0}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
}
# Rotary settings whose checks and tables read head counts.
MORE_ROWS = {
    "phi3 longrope": _config("phi3", **GROUPED, **LONG),
    "gemma3 linear": _config("gemma3_text", **GEMMA, rope_parameters=LINEAR),
}
BY_PLAN = {
    # The last two blocks have twice as many channels as the config says.
    "gemma4_text twice": (_config("gemma4_text", "num_hidden_layers", **WIDE4), {3: {"channels": 72}}),
    # A block without experts behind one that has some.
    "qwen2_moe later": (
        _config("qwen2_moe", **GROUPED, **_EXPERTS, **SHARED, mlp_only_layers=[1]),
        {0: {"experts": 5}, 1: {"channels": 20}},
    ),
}
"""Rows whose blocks differ before any is pruned, and how many of the first units stay."""

HYBRID = ("qwen3_5_text", "lfm2")
"""The first block has another kind of layer in the attention's place, the others have heads that can go."""
FALCON = ("falcon", "falcon new", "falcon biased")
"""Rows of Falcon with one key and value for all heads, for each of several groups, and for each head."""


@cache
def every_block(name: str) -> list[Block]:
    return blocks_of(dense(name))


def block_of(name: str) -> Block:
    """Return the first block whose heads can be removed, or the first block if there is none."""
    return next((block for block in every_block(name) if not block.heads_locked), every_block(name)[0])


def plan_of(name: str, case: str) -> dict[int, Width]:
    """Widths by block; blocks that are left out stay dense."""
    block, full = block_of(name), block_of(name).width
    channels = full.channels
    widths = {
        "uneven": {
            0: wide(max(1, full.kv_groups - 1), full.heads_per_group, channels // 2),
            1: wide(full.kv_groups, max(1, full.heads_per_group - 1), channels - 5),
            2: wide(1, 1, 7),
        },
        "gone": {
            0: wide(0, 0, channels // 3),
            1: wide(full.kv_groups, full.heads_per_group, 0),
            2: wide(1, 1, channels),
        },
        "one block": {1: wide(0, 0, 0)},
        "no channels": dict.fromkeys(range(3), wide(full.kv_groups, full.heads_per_group, 0)),
        "no heads": dict.fromkeys(range(3), wide(0, 0, channels)),
        "nothing": dict.fromkeys(range(3), wide(0, 0, 0)),
        "one bias": {1: full},
    }[case]
    if block.heads_locked:
        return {i: wide(full.kv_groups, full.heads_per_group, w.channels) if w.heads else w for i, w in widths.items()}
    return {i: own_axes(every_block(name)[i], width) for i, width in widths.items()}


class Written:
    """A folder of the format, with the units that it keeps and the biases that it adds."""

    def __init__(self, name: str, case: str, intercept: bool, source: Path, folder: Path):
        self.widths = plan_of(name, case)
        self.keeps = {i: first_units(every_block(name)[i], width) for i, width in self.widths.items()}
        self.changed: dict[int, dict[str, Tensor]] = {i: {} for i in self.keeps}
        for index, tensors in self.changed.items() if intercept else ():
            for module in without_bias(every_block(name)[index]):
                noise = torch.randn(dense(name).config.hidden_size, generator=torch.Generator().manual_seed(index))
                tensors[f"{module.output_layer}.bias"] = 0.3 * noise
        self.folder, self.source = folder, source
        self.bytes = write_pruned(source, folder, self.keeps, self.changed, "hf")


def without_bias(block: Block) -> list[Any]:
    """Modules that may get an intercept; behind a norm there is none."""
    return [module for module in block.modules if module.bias is None and module.may_gain_bias]


def silenced_logits(name: str, written: Written, ids: Tensor) -> Tensor:
    """Logits of the dense model with the removed units silenced and the same new biases."""
    model = copy.deepcopy(dense(name))
    for index, tensors in written.changed.items():
        for path, tensor in tensors.items():
            assign(layers_of(model)[index], path, tensor)
    with masked(model, written.keeps):
        return logits_of(model, ids)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("written")

    @cache
    def source(name: str) -> Path:
        return save(name, place / name.replace(" ", "-"))

    @cache
    def make(name: str, case: str, intercept: bool = False) -> Written:
        return Written(name, case, intercept, source(name), place / f"{name} {case} {intercept}".replace(" ", "-"))

    return make


WITHOUT_ONE_BLOCK = ("llama", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", *HYBRID, *FALCON)
"""Rows of which a block is also left without any unit."""
EMPTIED = ("no channels", "no heads", "nothing")
"""Cases in which no tensor that is left has another shape."""


def cases() -> Iterator[Any]:
    for name in (*ROWS, *MORE_ROWS, *HYBRID, *FALCON):
        for case in ("uneven", "gone", *(["one block"] if name in WITHOUT_ONE_BLOCK else [])):
            yield pytest.param(name, case, False, id=f"{name}-{case}")
    for name in ("llama", "gpt2", "opt", "lfm2", "falcon"):
        for case in EMPTIED:
            yield pytest.param(name, case, False, id=f"{name}-{case}")
    for name in ("llama", "mistral window", "qwen2", "qwen3", "phi3", "llama tied", *HYBRID):
        for case in ("gone", "one bias"):
            yield pytest.param(name, case, True, id=f"{name}-{case}-intercept")


@pytest.mark.parametrize(("name", "case", "intercept"), list(cases()))
def test_what_is_written_is_what_was_meant(written, name, case, intercept):
    made, ids = written(name, case, intercept), token_rows(2, 20)
    expected = silenced_logits(name, made, ids)
    assert relative(expected, logits_of(dense(name), ids)) > 100 * TOLERANCE
    assert relative(logits_of(narrowed(dense(name), made.keeps, made.changed), ids), expected) < TOLERANCE
    model = load_written(made.folder)
    assert relative(logits_of(model, ids), expected) < TOLERANCE
    with torch.no_grad():
        seen = model(ids[:, :FIRST], use_cache=True)
        # Its name before transformers 5.24.
        key = "cache" if "cache" in seen else "past_key_values"
        parts, store = [seen.logits], seen[key]
        for step in (ids[:, FIRST : FIRST + 1], ids[:, FIRST + 1 :]):
            parts.append(model(step, **{key: store}, use_cache=True).logits)
    assert relative(torch.cat(parts, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize(("name", "case", "intercept"), list(cases()))
def test_the_folder_says_what_it_holds(written, name, case, intercept):
    made, block = written(name, case, intercept), block_of(name)
    stored = json.loads((made.folder / "config.json").read_text())
    config, source = (open_checkpoint(folder).config for folder in (made.folder, made.source))
    assert is_per_layer(config)
    assert not is_per_layer(source)
    dense_widths = [one.width for one in every_block(name)]
    assert widths_of(source) == dense_widths
    expected = [made.widths.get(index, width) for index, width in enumerate(dense_widths)]
    assert widths_of(stored) == widths_of(config) == expected
    assert stored["model_type"] == source.model_type
    # Falcon's class derives it, and takes none.
    assert stored.get("head_dim") == (None if name in FALCON else block.modules[0].size)
    assert set(stored["auto_map"]) >= {"AutoModel", "AutoModelForCausalLM"}
    assert (made.folder / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    cut = ((every_block(name)[index], width) for index, width in made.widths.items())
    removed = sum(block.parameters - block.parameters_at(width) for block, width in cut)
    added = sum(tensor.numel() for tensors in made.changed.values() for tensor in tensors.values())
    assert made.bytes == open_checkpoint(made.source).bytes - 4 * removed + 4 * added


ALONE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification
from transformers.utils import logging

sys.modules["secateur"] = None  # its import fails
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
ids, out, logits = torch.tensor(json.loads(sys.argv[1])), Path(sys.argv[2]), {}
how = {"trust_remote_code": True, "output_loading_info": True}
for folder in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits[folder] = model.eval()(ids, use_cache=False).logits
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        states = [part(ids, use_cache=False).last_hidden_state for part in (base, model.base_model)]
    assert type(base).__name__.startswith("Secateur") and torch.equal(*states)
save_file(logits, out / "logits.safetensors")
# Other heads on the trunk of the last folder.
trunk = model.base_model.state_dict()
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    model, info = auto.from_pretrained(folder, **how)
    assert type(model).__name__.startswith("Secateur")
    assert all(name.startswith(("score", "classifier")) for name in info["missing_keys"]), info
    same = model.base_model.state_dict()
    assert same.keys() == trunk.keys() and all(torch.equal(same[name], trunk[name]) for name in trunk)
model.save_pretrained(out / "again")
assert type(auto.from_pretrained(out / "again", trust_remote_code=True)).__name__ == type(model).__name__
"""


def run_alone(script: str, place: Path, *arguments: str) -> None:
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_transformers_alone(written, tmp_path, checkpoint_folder):
    """The last folder holds a mixture, whose experts checkpoints store one by one, under names of their own."""
    rows = [("llama", "gone", True), ("gpt_neox", "uneven", False), ("opt", "one block", False)]
    ids, made = token_rows(2, 20), {row: written(*row) for row in rows}
    given = {"calibration": "random", "samples": 4, "length": 8, "effort": "quick"}
    prune(checkpoint_folder("mixtral"), tmp_path / "mixture", **given)
    folders = [*(str(found.folder) for found in made.values()), str(tmp_path / "mixture")]
    run_alone(ALONE, tmp_path, json.dumps(ids.tolist()), str(tmp_path), *folders)
    logits = load_file(tmp_path / "logits.safetensors")
    for (name, *_), found in made.items():
        assert relative(logits[str(found.folder)], silenced_logits(name, found, ids)) < TOLERANCE, name


REGISTERED = """
import sys
import secateur
assert "torch" not in sys.modules
import transformers

secateur.register()
secateur.register()
place, *folders = sys.argv[1:]
for name in ("Model", "ModelForCausalLM", "ModelForSequenceClassification", "ModelForTokenClassification"):
    auto = getattr(transformers, f"Auto{name}")
    ours, dense = (auto.from_pretrained(folder) for folder in folders)
    assert type(ours).__name__ == f"SecateurLlama{name.removeprefix('Model') or 'Model'}", type(ours)
    assert type(ours).__module__ == "secateur.checkpoints.modeling_secateur", type(ours)
    assert type(dense).__module__.startswith("transformers."), type(dense)
    # As transformers itself makes the decoder inside a multimodal model: the config names no architecture.
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bare = transformers.LlamaConfig(**sizes, pad_token_id=0)
    assert type(auto.from_config(bare)) is type(dense)
ours.save_pretrained(place)
assert type(auto.from_pretrained(place)) is type(ours)
from secateur import BlockStream, open_checkpoint
assert len(BlockStream(open_checkpoint(folders[1]))) == 3
# A config.json that names the stock class does not fit these weights, whatever was registered.
import json, pathlib, shutil
config = pathlib.Path(shutil.copytree(folders[0], f"{place}/other"), "config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
try:
    BlockStream(open_checkpoint(config.parent))
except secateur.SecateurError as error:
    assert "tensors missing from the weights" in str(error)
else:
    raise AssertionError
"""


def poisoned(made: Written, place: Path) -> Path:
    """A copy whose own code must not run."""
    shutil.copytree(made.folder, place)
    (place / MODELING_FILE.name).write_text("raise SystemExit('this code was run')\n")
    return place


def test_registered_classes_open_without_code_of_the_folder(written, tmp_path):
    made = written("llama", "gone")
    run_alone(REGISTERED, tmp_path, str(tmp_path / "again"), str(poisoned(made, tmp_path / "model")), str(made.source))


def test_evaluate_runs_no_code_of_the_folder(written, tmp_path):
    made, text = written("qwen3", "gone"), tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(400)))
    found = evaluate(str(poisoned(made, tmp_path / "model")), against=str(made.source), texts=[str(text)], length=16)
    small, full = found.models
    assert small.parameters == made.bytes // 4
    assert small.parameters < full.parameters
    assert next(iter(small.texts.values())).perplexity != next(iter(full.texts.values())).perplexity


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, "gone") for name in ("llama", "mistral window", "gemma3_text", "gpt2", "gpt_neox", *FALCON)]
    + [(name, case) for name in HYBRID for case in ("uneven", "one block")],
)
def test_generation_with_and_without_a_cache_agrees(written, name, case):
    """Lengths and masks are right also where the first attention has no heads left, and where a row is padded."""
    model = load_written(written(name, case).folder)
    ids, mask = token_rows(2, 8), torch.ones(2, 8, dtype=torch.long)
    how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 2}

    def check(cache: dict[str, Any], **more: Any) -> None:
        assert torch.equal(
            model.generate(ids, **cache, **how, **more), model.generate(ids, use_cache=False, **how, **more)
        )

    check({"use_cache": True})
    if name not in HYBRID:
        mask[0, :3] = 0
        check({"use_cache": True})
        check({"use_cache": True}, num_beams=3)
        check({"cache_implementation": "static", "disable_compile": True})


@pytest.mark.parametrize(
    ("name", "case"), [("llama", "gone"), ("gpt2", "one block"), ("lfm2", "gone"), ("youtu", "gone")]
)
def test_the_cache_has_as_many_bytes_as_the_table_says(written, name, case):
    made, ids = written(name, case), token_rows(1, 20)
    with torch.no_grad():
        output = load_written(made.folder)(ids, use_cache=True)
    layers = output["cache" if "cache" in output else "past_key_values"].layers
    stored = [
        t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None
    ]
    meter = cache_meter(BlockStream(open_checkpoint(made.source)), torch.float32)
    assert sum(tensor.nbytes for tensor in stored) == 20 * meter.total(made.widths)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt after"])
def test_saved_and_loaded_again(written, tmp_path, name):
    made, ids = written(name, "gone", name == "llama"), token_rows(2, 20)
    model = load_written(made.folder)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    assert stored["auto_map"] == json.loads((made.folder / "config.json").read_text())["auto_map"]
    again = load_written(tmp_path / "again", device_map="cpu")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert torch.equal(logits_of(copy.deepcopy(again), ids), logits_of(model, ids))


@pytest.mark.parametrize(
    ("name", "case", "intercept"),
    [("llama", "uneven", False), ("qwen3", "one block", False), ("llama", "one bias", True), ("gpt2", "gone", False)]
    + [(name, case, False) for name in ("llama", "gpt2", "opt", "jais2", "lfm2", *FALCON, "mpt") for case in EMPTIED]
    + [("bloom", "no channels", False), ("qwen3_moe", "no heads", False), ("mpt", "one block", False)],
)
def test_a_stock_class_fails_instead_of_guessing(written, name, case, intercept):
    """Tensors that are missing or too many only make it warn, so that some shape or number must be wrong."""
    with quiet(), pytest.raises(RuntimeError, match=r"mismatched|negative dimension|std >= 0\.0"):
        type(dense(name)).from_pretrained(written(name, case, intercept).folder)


@pytest.mark.parametrize("name", BY_PLAN)
def test_dense_blocks_that_differ(tmp_path, monkeypatch, name):
    """Also where a block is cut to the width that the config has for the others."""
    row, counts = BY_PLAN[name]
    monkeypatch.setitem(ROWS, name, row)
    blocks = [{"block": i, **{kind: list(range(n)) for kind, n in own.items()}} for i, own in counts.items()]
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": blocks}))
    how = {"calibration": "random", "samples": 4, "length": 8, "effort": "quick", "format": "hf"}
    prune(save(name, tmp_path / "dense"), tmp_path / "out", plan=tmp_path / "plan.json", **how)
    before, after = blocks_of(build(name)), [layer.state_dict() for layer in layers_of(load_written(tmp_path / "out"))]
    for index, (block, tensors) in enumerate(zip(before, after, strict=True)):
        width = block.width | counts.get(index, {})
        assert parameters_in(tensors, [block]) == block.parameters_at(width)


def test_the_modeling_file_names_no_family_and_no_layer():
    tree = ast.parse(MODELING_FILE.read_text(encoding="utf-8"))
    written = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {str(value) for name in ROWS for value in vars(family_of(config_of(name))).values()}
    known = {*FAMILIES, *IN_MEMORY.values()} | names
    assert not written & (known | {part for name in known for part in name.split(".")}) - {"None", "True", "False"}


def test_unsupported_reasons(written, tmp_path):
    fewer, none = wide(2, 2, 72), wide(0, 0, 72)
    stream = BlockStream(open_checkpoint(written("olmo2", "gone").source))
    assert HfFolder(stream).unsupported_reason(none) is None
    assert per_layer_unsupported(dense("llama").config, block_of("llama"), wide(0, 0, 0)) is None
    pruned = PrunedModel(Plan({0: none, 2: fewer}, 0, 0), ())
    empty = PrunedModel(Plan(dict.fromkeys(range(3), none), 0, 0), ())
    for kind, plan, said in (
        (HfFolder, pruned, "olmo2 keeps all 6 heads of a block or none, as its query"),
        (StockFolder, pruned, "one width for all blocks; use --format hf"),
        (StockFolder, empty, "a stock class needs at least one head and one channel"),
    ):
        assert_error(said, kind(stream).write, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()
