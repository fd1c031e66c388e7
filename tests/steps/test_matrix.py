"""Every family and variant × heads, channels, both: cutting units out is the same as silencing them, and what is
written is what was computed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import bytes_of
from safetensors.torch import load_file
from torch import Tensor

from models import (
    MIXTURES,
    ROWS,
    SIMILAR,
    VOCAB,
    begins,
    blocks_of,
    build,
    config_of,
    dense,
    layers_of,
    logits_of,
    make_tokenizer,
    masked,
    narrowed,
    parameters_in,
    relative,
    save,
    some_keep,
    token_rows,
)
from outputs import record_of
from secateur import BlockStream, Options, Rows, SecateurError, calibration_rows, open_checkpoint, prune
from secateur.checkpoints.expert_matrices import whole
from secateur.families.registry import FAMILIES, family_of
from secateur.fit.final_norm import scaled_final_norm
from secateur.fit.loop import refit
from secateur.fit.recovery import Method, recovery_of
from secateur.model.axes import Width
from secateur.model.kinds import KINDS
from secateur.model.structure import PrunableModule
from secateur.model.surgery import assign, width_of
from secateur.plan.problem import Plan
from secateur.text.resample import resample_tokens
from secateur.write.slice import slice_fitted

MATRIX = ROWS | SIMILAR | MIXTURES
TOLERANCE = 1e-5
"""Largest deviation of a logit over the largest logit."""
SAMPLES, ROW = 12, 16
HEADS_ALONE = ("llama", "gemma2", "phi3")
"""Rows that are also written with fewer heads alone: one for each way to store heads."""
PLAIN = [name for name in ROWS if " " not in name]
"""Rows that also lose units of one kind alone."""
ADAPTIVE = ("llama", "gemma2", "olmo2", "phi3", "opt", "gpt2", "gpt_neox")
"""Rows that are also surveyed, refitted and written with a width for each block: one for each kind of block."""

FED: tuple[str, ...] = ("channels", "experts")


@cache
def free_block(name: str) -> int:
    """Return the first block whose heads can be removed, or the first block if there is none."""
    blocks = blocks_of(dense(name))
    return next((index for index, block in enumerate(blocks) if not block.heads_locked), 0)


def attention_of(name: str) -> PrunableModule:
    return blocks_of(dense(name))[free_block(name)].modules[0]


def axes_of_heads(name: str) -> list[str]:
    attention = attention_of(name)
    return [] if attention.locked else [one.name for one in attention.cut_axes]


def all_kinds(names: Iterable[str]) -> list[Any]:
    """Return cases that remove units of all kinds, heads along one axis each."""
    rows = [(name, KINDS if axis else FED, axis) for name in names for axis in axes_of_heads(name) or [""]]
    return [pytest.param(*row, id=f"{row[0]}-{row[2]}") for row in rows]


def one_kind(names: Iterable[str]) -> list[Any]:
    rows = [(name, ("heads",), axis) for name in names for axis in axes_of_heads(name)]
    rows += [(name, FED, "channels") for name in names if axes_of_heads(name)]
    return [pytest.param(*row, id=f"{row[0]}-{row[2]} alone") for row in rows]


def test_every_family_has_a_row():
    assert {config_of(name).model_type for name in MATRIX} == set(FAMILIES)
    attentions = {
        name: next(block.modules[0] for block in blocks_of(dense(name)) if block.modules[0].kind == "heads")
        for name in MATRIX
    }
    grouped = {config_of(name).model_type for name, one in attentions.items() if 1 < one.groups < one.units}
    assert grouped >= {"llama", "falcon", "phi3", "qwen3_5_text", "gemma4_text", "mixtral"}


# In the other rows, units of one kind would show nothing that units of all kinds do not.
@pytest.mark.parametrize(("name", "kinds", "axis"), all_kinds(MATRIX) + one_kind(PLAIN))
def test_masked_equals_sliced(name, kinds, axis):
    model, ids = dense(name), token_rows()
    keeps = {i: some_keep(block, i, kinds, axis) for i, block in enumerate(blocks_of(model))}
    with masked(model, keeps):
        expected = logits_of(model, ids)
    assert relative(logits_of(model, ids), expected) > 100 * TOLERANCE
    small = narrowed(model, keeps)
    assert relative(logits_of(small, ids), expected) < TOLERANCE
    for block, layer, keep in zip(blocks_of(model), layers_of(small), keeps.values(), strict=True):
        kept = parameters_in(layer.state_dict(), [block])
        assert kept == block.parameters_at(width_of(block, keep))
        assert kept < block.parameters or (kinds == ("heads",) and block.modules[0].fixed)


@pytest.mark.parametrize("name", [name for name in MATRIX if attention_of(name).locked])
def test_locked_heads_stay(tmp_path, checkpoint_folder, name):
    block = blocks_of(dense(name))[0]
    assert block.heads_locked
    asked = settings(recovery="none", format="stock" if writable_channels(name) else "hf")
    with pytest.raises(SecateurError, match=re.escape(block.heads_locked)):
        prune(checkpoint_folder(name), tmp_path / "out", **asked | {"modules": ("heads",)})
    if not writable_channels(name):
        with pytest.raises(SecateurError, match=r"(derives its feed-forward width|twice as wide) .*; use --format hf"):
            prune(checkpoint_folder(name), tmp_path / "out", **settings())
    found, blocks = prune(checkpoint_folder(name), tmp_path / "out", **asked), blocks_of(dense(name))
    for index, width in found.widths.items():
        assert (width.kv_groups, width.heads_per_group) == (block.modules[0].groups, block.modules[0].per_group)
        # Where others have experts, a block without them keeps its channels.
        assert (width.experts or width.channels) < blocks[index].modules[-1].units or (
            name in MIXTURES and not width.experts
        )


def settings(**more: Any) -> dict[str, Any]:
    """Return options for one width in all blocks, in the stock format; test_per_layer.py has other widths."""
    small = {"samples": SAMPLES, "length": ROW, "calibration": "random", "device": "cpu"}
    return small | {"sparsity": 0.25, "widths": "uniform"} | more


# What is written, loads.


@dataclass(frozen=True)
class Job:
    """Run of `prune` on the model of a row."""

    name: str
    modules: tuple[str, ...]
    sparsity: float
    calibration: str
    dtype: torch.dtype = torch.float32
    widths: str = "uniform"
    recovery: str = "refit"
    effort: str = "quick"

    def __str__(self) -> str:
        half = "" if self.dtype == torch.float32 else "-half"
        return f"{self.name}-{'+'.join(self.modules)}" + half + "-adaptive" * (self.widths == "adaptive")


def writable_heads(name: str) -> bool:
    return family_of(config_of(name)).head_counts != "dense" and not attention_of(name).locked


def writable_channels(name: str) -> bool:
    """Whether the stock format can hold fewer channels in every block."""
    return not (family_of(config_of(name)).derives_channels or getattr(config_of(name), "use_double_wide_mlp", False))


def jobs() -> Iterator[Job]:
    """Yield a job for each row, in the stock format if that can hold fewer channels; test_per_layer.py writes all."""
    for position, name in enumerate(MATRIX):
        # transformers reads Qwen3.5's tokenizer by a class of Qwen's own, which knows none of these words.
        source = "text" if position % 2 and "qwen3_5" not in name else "random"
        if writable_channels(name):
            # Heads alone need no file for each family: this job writes heads as well.
            if name in HEADS_ALONE:
                yield Job(name, ("heads",), 0.1, source)
            recovery = "refit" if name in HEADS_ALONE else "none"
            yield Job(name, KINDS if writable_heads(name) else FED, 0.3, source, recovery=recovery)
        # Adaptive widths and fits of the input projections, also of every third mixture.
        if not writable_channels(name) or name in ADAPTIVE or (name in MIXTURES and position % 3 == 0):
            # Enough that some modules go as a whole.
            less = 0.2 if attention_of(name).fixed else 0.35 if name in MIXTURES else 0.6
            yield Job(name, KINDS, less, source, widths="adaptive", effort="normal")
    yield Job("llama", KINDS, 0.3, "text", torch.bfloat16)
    yield Job("mistral", KINDS, 0.6, "text", torch.bfloat16, widths="adaptive")
    yield Job("gpt2", ("channels",), 0.2, "random", torch.bfloat16)


JOBS = {str(job): job for job in jobs()}

RELOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
ids, out = torch.tensor(json.loads(sys.argv[1])), Path(sys.argv[2])
logits, infos = {}, {}
for folder in json.loads(sys.argv[3]):
    settings = {"output_loading_info": True, "trust_remote_code": True}
    config = json.loads((Path(folder) / "config.json").read_text())
    # transformers lists its class among those for images.
    images = config["model_type"] == "mistral4" and "auto_map" not in config
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, **settings)
    with torch.no_grad():
        logits[folder] = model.eval()(ids, use_cache=False).logits
    infos[folder] = {key: sorted(map(str, value)) for key, value in info.items()}
    infos[folder]["class"] = type(model).__name__
save_file(logits, out / "logits.safetensors")
(out / "infos.json").write_text(json.dumps(infos))
assert "secateur" not in sys.modules
"""


class Pruned:
    """Results of all jobs: pruned, and then loaded again in one process that does not import this library."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(f"w{int(token) - 4}" for token in token_rows(1, 600, seed=3)[0]))
        self.ids = token_rows()

    def model(self, job: Job) -> Path:
        path = self.folder / f"{job}.dense".replace(" ", "-")
        return path if path.exists() else save(job.name, path, job.dtype)

    def source(self, job: Job) -> str:
        return str(self.text) if job.calibration == "text" else "random"

    @cache  # noqa: B019
    def out(self, job: Job) -> Path:
        path = self.folder / str(job).replace(" ", "-")
        wishes = {"modules": job.modules, "sparsity": job.sparsity, "widths": job.widths, "recovery": job.recovery}
        prune(self.model(job), path, **settings(**wishes, effort=job.effort, calibration=self.source(job)))
        return path

    @cached_property
    def reloaded(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Logits and loading reports by job."""
        folders = {str(self.out(job)): name for name, job in JOBS.items()}
        arguments = [json.dumps(self.ids.tolist()), str(self.folder), json.dumps(list(folders))]
        # Code that comes with a folder is copied to a cache before it runs.
        places = os.environ | {"HF_MODULES_CACHE": str(self.folder / "modules")}
        command = [sys.executable, "-c", RELOAD, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=places)
        assert ended.returncode == 0, ended.stderr
        logits = load_file(self.folder / "logits.safetensors")
        infos = json.loads((self.folder / "infos.json").read_text())
        return {folders[path]: value for path, value in logits.items()}, {folders[p]: i for p, i in infos.items()}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return Pruned(tmp_path_factory.mktemp("pruned"))


def recorded_plan(record: dict[str, Any]) -> Plan:
    widths = {block["block"]: Width(block["width"]) for block in record["blocks"]}
    return Plan(widths, record["sparsity"]["reached"], record["sparsity"]["wanted"])


def recorded_rows(record: dict[str, Any], stream: BlockStream, text: Tensor) -> Rows:
    """Return the calibration rows in the groups of the run."""
    said = record["calibration"]
    rows = Rows.of(text)
    if record["options"]["recovery"] == "refit":
        rows = rows if said["begins_with_bos"] else rows.with_openings()
        if fits := Options(effort=record["options"]["effort"]).resampled_fits:
            rows = rows.with_resampled(*resample_tokens(stream, text, count=fits))
    assert [list(group.shape) for group in rows.groups] == said["groups"]
    assert list(rows.weights) == said["weights"]
    assert list(rows.resampled) == said["resampled"]
    return rows


def stream_of(folder: Path) -> BlockStream:
    return BlockStream(open_checkpoint(folder))


def rounded_model(name: str, dtype: torch.dtype) -> Any:
    """Return the dense model with weights rounded to a dtype; rotary tables stay exact."""
    model = build(name)
    for value in model.parameters():
        value.copy_(value.to(dtype))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_reloaded_equals_memory(pruned, job):
    record = record_of(pruned.out(job))
    stream = stream_of(pruned.model(job))
    bos = begins(job.name)
    draw = {"samples": SAMPLES, "length": ROW, "seed": 0, "vocab_size": VOCAB}
    text = calibration_rows(make_tokenizer(bos), pruned.source(job), **draw)
    assert record["calibration"]["begins_with_bos"] == bos
    full = rounded_model(job.name, job.dtype)
    method = Method(recovery=Options(recovery=job.recovery, effort=job.effort).recovery_settings)
    found = list(refit(stream, recorded_plan(record), recorded_rows(record, stream, text), method=method))
    for block, said in zip(found, record["blocks"], strict=True):
        for kind in stream.blocks[block.index].kinds:
            assert list(block.keep[kind]) == said[kind]
    model = narrowed(full, {b.index: b.keep for b in found}, {b.index: b.changed for b in found})
    for block in found:
        tensors, wanted = slice_fitted(stream, block), layers_of(model)[block.index].state_dict()
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(whole(tensor).float(), wanted[name]) for name, tensor in tensors.items())
    for path, tensor in scaled_final_norm(stream, record["final_norm_scale"]).items():
        assign(model, path, tensor.float())
    logits, infos = pruned.reloaded
    assert relative(logits[str(job)], logits_of(model, pruned.ids)) < TOLERANCE
    assert relative(logits[str(job)], logits_of(full, pruned.ids)) > 100 * TOLERANCE
    info = infos[str(job)]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert info[kind] == [], kind
    dense_class = type(model).__name__
    if job.widths == "adaptive":
        assert info["class"] == f"Secateur{dense_class}"
        return
    heads = Width(record["blocks"][0]["width"]).heads
    assert info["class"] == ("MistralForCausalLM" if dense_class.startswith("Llama") and 48 % heads else dense_class)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_the_plan_counts_what_the_file_holds(pruned, job):
    record, blocks = record_of(pruned.out(job)), blocks_of(dense(job.name))
    written = load_file(pruned.out(job) / "model.safetensors")
    stored = load_file(pruned.model(job) / "model.safetensors")
    whole = job.widths == "uniform" and job.name not in MIXTURES
    assert written.keys() == stored.keys() if whole else written.keys() <= stored.keys()
    assert {tensor.dtype for tensor in written.values()} == {job.dtype}
    removed = sum(b.parameters - b.parameters_at(recorded_plan(record).widths[i]) for i, b in enumerate(blocks))
    assert removed > 0
    assert parameters_in(written, blocks) == parameters_in(stored, blocks) - removed
    assert record["sparsity"]["reached"] == pytest.approx(removed / sum(block.parameters for block in blocks))
    if record["sparsity"]["note"] is None:
        assert abs(record["sparsity"]["reached"] - job.sparsity) <= 0.005
    if job.widths == "adaptive":
        # Where widths are coarse, as in mixtures, the result may be on either side.
        assert record["sparsity"]["reached"] >= job.sparsity - 0.005 * (job.name in MIXTURES)
    if job.modules == ("heads",):
        assert record["blocks"][0]["width"][blocks[0].kinds[1]] == blocks[0].modules[-1].units
        assert len(record["blocks"][0]["heads"]) < blocks[0].width.heads
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (pruned.out(job) / name).read_bytes() == (pruned.model(job) / name).read_bytes()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_runs_agree_byte_for_byte(tmp_path, checkpoint_folder, name):
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        prune(checkpoint_folder(name), out, **settings(modules=("channels",) if name == "gpt2" else KINDS))
    first, second = map(bytes_of, outs)
    assert first == second
    assert {"model.safetensors", "config.json", "secateur.json"} <= set(first)
    assert all((out / "timings.json").exists() for out in outs)


# The others have their parts from these, and are fitted where they are written.
@pytest.mark.parametrize("name", ROWS | MIXTURES)
def test_refit_of_all_units_is_the_identity(checkpoint_folder, name):
    whole = {index: block.width for index, block in enumerate(blocks_of(dense(name)))}
    rows, method = token_rows(SAMPLES, ROW, seed=5), Method(recovery=recovery_of(ridge=0.3))
    found = list(refit(stream_of(checkpoint_folder(name)), Plan(whole, 0.2, 0.2), rows, method=method))
    model, ids = dense(name), token_rows()
    for block in found:
        modules = blocks_of(model)[block.index].modules
        assert all(len(block.keep[module.kind]) == module.units for module in modules)
        assert len(block.changed) >= 2
        assert all(abs(report.relative) < 1e-6 for report in block.reports)
    small = narrowed(model, {b.index: b.keep for b in found}, {b.index: b.changed for b in found})
    assert relative(logits_of(small, ids), logits_of(model, ids)) < 1e-4
