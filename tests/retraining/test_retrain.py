"""Retraining: the loss falls, and the written folder holds the trained weights in the same format."""

import errno
import importlib.util
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from models import ROWS, build, load_written, logits_of, relative, token_rows
from outputs import Notes, assert_error, edit_json, edited_weights, error_of, record_of, weights_of
from secateur.base.device import memory_of
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.memory import available_bytes, rss_bytes
from secateur.base.processes import Processes
from secateur.base.progress import Silent
from secateur.base.run_folder import RunFolder
from secateur.base.services import Services
from secateur.checkpoints import checkpoint
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.checkpoints.config_file import empty_model
from secateur.gguf.export import export
from secateur.measure import perplexity
from secateur.measure.loading import load
from secateur.model import pass_checkpoint
from secateur.model.per_layer import model_class
from secateur.model.stream import BlockStream
from secateur.retraining import memory, student
from secateur.retraining import retrain as steps
from secateur.retraining.adapters import adapted_layers
from secateur.retraining.halved import HalvedAdamW, can_halve
from secateur.retraining.loss import LOGITS_AT_ONCE
from secateur.retraining.options import ADAPTERS, Training
from secateur.retraining.retrain import retrain
from secateur.retraining.rows import training_rows
from secateur.retraining.student import Student
from secateur.steps.prune import prune
from secateur.write.shards import ShardWriter

SMALL: dict[str, Any] = {
    "tokens": "1536",
    "length": 16,
    "batch": 4,
    "rank": 8,
    "learning_rate": 5e-3,
    "teacher": "none",
    "device": "cpu",
}
"""24 steps of four rows."""
PRUNE: dict[str, Any] = {"calibration": "random", "samples": 12, "length": 16, "sparsity": 0.4, "device": "cpu"}
# transformers splits text its own way for qwen2, and then the tests' tokenizer finds no word.
NAMES = [name for name in list(ROWS)[:11] if name != "qwen2"] + ["lfm2", "bamba"]
CASES = [("llama", "uniform"), *((name, "adaptive") for name in NAMES)]


def pruned(model: Path, out: Path, widths: str = "adaptive", **more: Any) -> Path:
    modules = ("channels",) if widths == "uniform" else ("heads", "channels")
    prune(model, out, widths=widths, modules=modules, **PRUNE, **more)
    return out


def network_of(folder: Path) -> Any:
    return load(open_checkpoint(folder), torch.float32, torch.device("cpu"))


def tensors_of(*folders: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / "model.safetensors") for folder in folders]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Seven words over and over."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{3 * (i % 7)}" for i in range(900)))
    return path


@pytest.fixture(scope="module")
def llama(checkpoint_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned Llama, which tests must not change."""
    return pruned(checkpoint_folder("llama"), tmp_path_factory.mktemp("llama") / "pruned")


@pytest.fixture
def train(llama: Path, tmp_path: Path, text: Path) -> Callable[..., Any]:
    """Function that retrains the pruned Llama, or another folder."""

    def call(out: str, folder: Path = llama, **changes: Any) -> Any:
        return retrain(folder, tmp_path / out, **SMALL | {"calibration": str(text)} | changes)

    return call


class Counting(Silent):
    """Numbers of training steps that were done before, and that were left."""

    def track(self, items: Any, what: str, done: int = 0) -> Iterator[Any]:
        if what == "Retrain":
            self.done, self.left = done, len(items)
        yield from items


class Interrupting(Silent):
    """Ctrl-C in the middle of a training."""

    def track(self, items: Any, what: str, done: int = 0) -> Iterator[Any]:
        for number, item in enumerate(items):
            if what == "Retrain" and number == 13:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_a_folder_saved_by_another_tool_is_retrained(checkpoint_folder, tmp_path, train, widths):
    """A pruned model that another tool loaded and saved has no record; its config holds all widths."""
    folder, saved = pruned(checkpoint_folder("llama"), tmp_path / "pruned", widths), tmp_path / "saved"
    network_of(folder).save_pretrained(saved)
    open_checkpoint(folder).tokenizer().save_pretrained(saved)
    train("out", saved)
    before, after = tensors_of(folder, tmp_path / "out")
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert list(record_of(tmp_path / "out")) == ["retrained", "later"]


@pytest.mark.parametrize(("name", "widths"), CASES, ids=["-".join(case) for case in CASES])
def test_the_loss_falls_and_the_folder_is_complete(checkpoint_folder, tmp_path, train, name, widths):
    folder, out = pruned(checkpoint_folder(name), tmp_path / "pruned", widths), tmp_path / "out"
    done = train("out", folder, watcher=(notes := Notes()))
    assert any("has fewer than the 1,536 tokens to train on, so it is used 1.8 times" in note for note in notes.said)
    assert len(done.losses) == 24
    loss, perplexity_over_dense = (axes.lines[0].get_ydata() for axes in done.plot().axes)
    assert list(loss) == list(done.losses)
    assert [perplexity_over_dense[0], perplexity_over_dense[-1]] == list(done.perplexity)
    assert sum(done.losses[-4:]) < 0.8 * sum(done.losses[:4])
    assert done.perplexity[1] < 0.8 * done.perplexity[0]
    # The same tensors but for the blocks' matrices, and the same files but for the timings of the pruning.
    before, after = tensors_of(folder, out)
    layers = adapted_layers(network_of(folder))
    names = {open_checkpoint(folder).resolve(f"{layer}.weight") for layer in layers}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    files = [{file.name for file in path.iterdir()} for path in (folder, out)]
    assert files[1] == files[0] - {"timings.json"}
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    (entry,) = record_of(out)["retrained"]
    (command,) = record_of(out)["later"]
    assert command.startswith("secateur retrain pruned OUT --calibration text.txt ")
    assert record_of(out) == record_of(folder) | {"retrained": [entry], "later": [command]}
    assert entry["tokens"] == done.tokens == 1536
    assert entry["perplexity"] == {"teacher": None, "before": done.perplexity[0], "after": done.perplexity[1]}
    # Adapters of rank 8 on each matrix.
    shapes = [network_of(folder).get_submodule(layer).weight.shape for layer in layers]
    assert done.adapted == sum(8 * sum(shape) for shape in shapes)


@pytest.mark.parametrize("rank", [8, 0])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phimoe"])
def test_experts_are_trained(checkpoint_folder, tmp_path, text, train, name, rank):
    """Whether they are stored one by one or together; the written weights are those that were measured."""
    folder, out = tmp_path / "pruned", tmp_path / "out"
    prune(checkpoint_folder(name), folder, widths="uniform", modules=("experts",), **PRUNE | {"sparsity": 0.2})
    done = train("out", folder, rank=rank)
    assert done.perplexity[1] < 0.8 * done.perplexity[0]
    before, after = tensors_of(folder, out)
    assert before.keys() == after.keys()
    experts = [key for key in before if ".experts." in key and "bias" not in key]
    assert experts
    assert not any(torch.equal(before[key], after[key]) for key in experts)
    training = Training(calibration=str(text), length=16, batch=4)
    held_out = training_rows(open_checkpoint(out), training, 64, Services()).held_out
    assert perplexity(network_of(out), held_out).perplexity == pytest.approx(done.perplexity[1], rel=2e-2)


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_the_reloaded_model_equals_the_trained_one(checkpoint_folder, tmp_path, train, monkeypatch, widths):
    folder, loaded = pruned(checkpoint_folder("llama"), tmp_path / "pruned", widths, dtype="bfloat16"), list[Any]()
    monkeypatch.setattr(steps, "Student", lambda *given, **named: loaded.append(Student(*given, **named)) or loaded[-1])
    train("out", folder)
    found, trained, before = (
        logits_of(network, token_rows())
        for network in (load_written(tmp_path / "out"), loaded[0].network.float(), network_of(folder))
    )
    assert relative(found, trained) < 1e-5
    assert relative(found, before) > 1e-2


def test_the_seed_alone_decides_the_bytes(tmp_path, train):
    """The caller's random numbers are not disturbed."""
    torch.manual_seed(5)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    for out, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(out, seed=seed, tokens="256")
    assert torch.equal(torch.rand(2), drawn)
    one, two, other = (weights_of(tmp_path / out) for out in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.parametrize(("rank", "halved"), [(8, False), (0, False), (0, True)])
def test_an_interrupted_training_resumes(checkpoint_folder, tmp_path, text, train, monkeypatch, rank, halved):
    """The resumed training writes the same bytes as an uninterrupted one, and leaves no checkpoint.

    Neither requests that are refused in between, nor a checkpoint that is half written, change that.
    """
    how, plan = {"rank": rank, "teacher": str(checkpoint_folder("llama"))}, steps.plan_memory
    monkeypatch.setattr(steps, "plan_memory", lambda *given, **named: plan(*given, **named)._replace(halved=halved))
    train("whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train("out", watcher=Interrupting(), **how)
    (state,) = tmp_path.glob(".out.run/training/checkpoint-*")
    assert not (tmp_path / "out").exists()
    message = error_of(train, "out", **how | {"tokens": "512", "learning_rate": 1e-3})
    assert ".out.run: the unfinished run has tokens 1536, this command has 512; use the same" in message
    assert "needs at least" in error_of(train, "out", memory="1MB", **how)
    assert (state / "state.json").exists()
    (state.parent / "checkpoint-99").mkdir()
    words, damaged = text.read_text(), (state / "model.safetensors").read_bytes()
    text.write_text(words.replace("w3", "w4", 1))
    assert "the rows of this text are not the rows of the run that was stopped" in error_of(train, "out", **how)
    text.write_text(words)
    (state / "model.safetensors").write_bytes(damaged[:-9])
    assert f"{state}: damaged, so the run cannot be resumed; add --restart" in error_of(train, "out", **how)
    (state / "model.safetensors").write_bytes(damaged)
    train("out", watcher=(progress := Counting()), **how)
    assert (progress.done, progress.left) == (int(state.name.split("-")[1]), 24 - progress.done)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "whole", "out"}


def test_the_distribution_approaches_the_teachers(checkpoint_folder, tmp_path, text, train, monkeypatch):
    """On token ids that were not trained on."""
    text.write_text(" ".join(f"w{id - 4}" for id in token_rows(1, 2000)[0].tolist()))
    dense = checkpoint_folder("llama")
    folder = pruned(dense, tmp_path / "pruned", dtype="float32")
    # As if peft were not installed, which only adapters need.
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    train("out", folder, tokens="6144", rank=0, learning_rate=2e-3, text_weight=0.0, teacher=None)
    ids = token_rows(8, 20)
    wanted, before, after = (
        logits_of(network_of(path), ids).log_softmax(-1) for path in (dense, folder, tmp_path / "out")
    )
    far, near = ((wanted.exp() * (wanted - found)).sum(-1).mean() for found in (before, after))
    assert near < 0.7 * far


def test_the_teacher_is_the_model_that_the_record_names(checkpoint_folder, tmp_path, text, train, monkeypatch):
    """If this model is not here, the error says so, and nothing is fetched from the hub."""
    dense = shutil.copytree(checkpoint_folder("llama"), tmp_path / "dense")
    folder = pruned(dense, tmp_path / "pruned")
    named = train("named", folder, tokens="256", teacher=str(dense))
    recorded = train("recorded", folder, tokens="256", teacher=None)
    assert recorded.curve == named.curve
    rows = training_rows(open_checkpoint(dense), Training(calibration=str(text), length=16, batch=4), 64, Services())
    found = perplexity(network_of(dense), rows.held_out).perplexity
    assert recorded.curve.teacher == pytest.approx(found, rel=1e-2)
    with edited_weights(dense) as weights:
        weights["model.norm.weight"] += 1
    said = f"{dense} has other weights than the model that {folder} was pruned from; restore them, or choose a teacher"
    assert said in error_of(train, "out", folder, teacher=None)
    train("changed", folder, tokens="64", teacher=str(dense))
    dense.rename(tmp_path / "moved")
    monkeypatch.setattr(checkpoint, "hub_folder", lambda *_: pytest.fail("the hub was asked"))
    for source in (str(dense), "owner/name"):
        edit_json(folder / "secateur.json", model=source)
        said = f"{folder}/secateur.json: the model that was pruned, {source}, is not a folder or file here; give its"
        assert said in error_of(train, "out", folder, teacher=None)
    (folder / "secateur.json").unlink()
    assert "no secateur.json that names the model that was pruned; give" in error_of(train, "out", folder, teacher=None)


def test_a_teacher_has_the_same_sizes_but_may_have_more_blocks(checkpoint_folder, tmp_path, train):
    """Other tools remove whole blocks; their models learn from the whole model too."""
    dense, shorter = checkpoint_folder("llama"), tmp_path / "shorter"
    network = network_of(dense)
    network.model.layers = network.model.layers[:2]
    network.config.num_hidden_layers = 2
    network.save_pretrained(shorter)
    for file in dense.glob("tokenizer*"):
        shutil.copy(file, shorter)
    curve = train("out", shorter, teacher=str(dense)).curve
    assert curve.perplexities[-1][1] < curve.perplexities[0][1]
    config = json.loads((shorter / "config.json").read_text())
    for key, other in {"vocab_size": 64, "hidden_size": 24}.items():
        wrong = shutil.copytree(dense, tmp_path / key)
        (wrong / "config.json").write_text(json.dumps(config | {key: other}))
        message = f"{wrong} has {key} {other}, but {shorter} has {config[key]}; give --teacher the model that was"
        assert message in error_of(train, "wrong", shorter, teacher=str(wrong))


def test_the_teacher_is_never_loaded_whole(llama, train, monkeypatch, calls_of):
    """One of its blocks at a time is in memory, and all of the pruned model once."""
    loaded, filled, real = calls_of(student, "load_shares"), list[int](), BlockStream.filled

    @contextmanager
    def counted(stream: BlockStream, index: int) -> Iterator[Any]:
        filled.append(index)
        with real(stream, index) as layer:
            others = [other for other in stream.layers.children() if other is not layer]
            assert all(value.is_meta for other in others for value in other.parameters())
            yield layer

    monkeypatch.setattr(BlockStream, "filled", counted)
    train("out", teacher=None)
    assert [checkpoint.source for _, __, checkpoint, *___ in loaded] == [str(llama)]
    assert filled == [0, 1, 2]


def test_a_text_with_too_few_tokens_is_used_several_times(checkpoint_folder, text):
    """Rows are cut from other places each time, and held-out rows come from a part that is never trained on."""
    drawn = torch.randint(100, (900,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{number}" for number in drawn.tolist()))
    checkpoint = open_checkpoint(checkpoint_folder("llama"))
    training = Training(calibration=str(text), length=16, batch=4)
    rows = training_rows(checkpoint, training, 4096, Services())
    assert rows.train.shape == (256, 16)
    assert rows.passes == pytest.approx(4096 / (0.95 * 900), rel=1e-3)
    assert len(rows.train.unique(dim=0)) == 256
    assert torch.equal(rows.held_out, training_rows(checkpoint, training, 64, Services()).held_out)
    trained, kept = ({tuple(part) for part in some.unfold(1, 4, 1).flatten(0, 1).tolist()} for some in rows[:2])
    assert not trained & kept
    mixed = replace(training, calibration=f"general+{text}")
    assert training_rows(checkpoint, mixed, 4096, Services()).passes == pytest.approx(2048 / (0.95 * 900), rel=1e-3)
    for some in (training, mixed):
        text.write_text("w1 w2 w3 " * 90)
        message = error_of(training_rows, checkpoint, some, 4096, Services())
        assert "has 270 tokens, of which 5% are held out; rows of 16 tokens need 320" in message


def test_damaged_targets_are_noticed(tmp_path, train):
    with pytest.raises(KeyboardInterrupt):
        train("out", watcher=Interrupting(), teacher=None)
    saved = tmp_path / ".out.run" / "targets"
    saved.write_bytes(saved.read_bytes()[:-1] + b"x")
    assert "targets: damaged, so the run cannot be resumed; add --restart" in error_of(train, "out", teacher=None)
    train("out", restart=True, teacher=None)


def test_settings_beside_a_training_are_refused(llama, tmp_path):
    with pytest.raises(TypeError, match="tokens is given together with Training; set it in that object"):
        retrain(llama, tmp_path / "out", Training(), tokens="1k")
    with pytest.raises(TypeError, match="is not an object of Training; give options by name, such as seed=1"):
        retrain(llama, tmp_path / "out", {"tokens": "512"})
    assert Training(tokens=512, batch=4) == Training(tokens="512", batch=4)


def test_memory_decides_how_a_step_is_run(checkpoint_folder, tmp_path, train, monkeypatch):
    """Fewer rows at a time, then only inputs of blocks are kept; the weights are the same up to rounding."""
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned", dtype="float32")
    how = {"rank": 0, "learning_rate": 1e-3, "tokens": "512"}
    message = error_of(train, "out", folder, memory="1MB", **how)
    assert re.search(r"needs at least [\d.]+ GB, but 0.00 GB are allowed; raise --memory", message)
    train("whole", folder, **how)
    plan = steps.plan_memory
    monkeypatch.setattr(
        steps, "plan_memory", lambda *given, **named: plan(*given, **named)._replace(micro_batch=1, recompute=True)
    )
    train("parts", folder, **how)
    whole, parts = tensors_of(tmp_path / "whole", tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-3 * float(value.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_training_in_bfloat16_is_nearly_as_good(checkpoint_folder, tmp_path, train, monkeypatch, products):
    """Rounded to the nearest number, most weights would stay as they are."""
    plan = steps.plan_memory
    monkeypatch.setattr(steps, "fast_dtype", lambda _: products)
    losses, changed = [], []
    before = tensors_of(pruned(checkpoint_folder("llama"), tmp_path / "pruned"))[0]
    for dtype in (None, "bfloat16"):
        halved = {"halved": dtype is not None}
        monkeypatch.setattr(steps, "plan_memory", lambda *given, to=halved, **how: plan(*given, **how)._replace(**to))
        losses.append(train(f"{dtype}", tmp_path / "pruned", rank=0, learning_rate=3e-4).perplexity)
        after = tensors_of(tmp_path / f"{dtype}")[0]
        changed.append(sum(int((after[name] != value).sum()) for name, value in before.items()))
        assert record_of(tmp_path / f"{dtype}")["retrained"][0].get("trained_in") == dtype
    (start, exact), (_, rounded) = losses
    assert exact < 0.9 * start
    assert rounded == pytest.approx(exact, rel=0.01)
    assert changed[1] > 0.9 * changed[0]


def test_values_are_rounded_without_a_mean_error():
    value, exact = torch.nn.Parameter(torch.ones(40_000, 10, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(1))
    optimizers = HalvedAdamW([value], seed=0), torch.optim.AdamW([exact], weight_decay=0.0)
    for step in range(5):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
                for one in group["params"]:
                    one.grad = torch.full_like(one, 1.0 + step)
            optimizer.step()
    # The next smaller number of bfloat16 is 0.996, almost as far as the weight has moved.
    assert set(value.float().unique().tolist()) > {1.0, 0.99609375}
    assert float(value.detach().float().mean()) == pytest.approx(float(exact.detach()), abs=2e-5)
    moments = [
        float(optimizer.state[one]["exp_avg_sq"].float().mean())
        for optimizer, one in zip(optimizers, (value, exact), strict=True)
    ]
    assert moments[0] == pytest.approx(moments[1], rel=1e-3)


def test_modules_with_other_matrices_are_trained_in_bfloat16_only_where_products_are(checkpoint_folder):
    def possible(name: str, products: torch.dtype) -> bool:
        return can_halve(open_checkpoint(checkpoint_folder(name)).empty(AutoModelForCausalLM), path[name], products)

    path = {"gpt2": "transformer.h", "mixtral": "model.layers", "qwen2": "model.layers"}
    assert [possible(name, torch.float32) for name in path] == [False, False, True]
    assert all(possible(name, torch.bfloat16) for name in path)


@pytest.mark.parametrize("rank", [0, 8])
def test_the_fastest_way_that_fits_is_taken(checkpoint_folder, text, monkeypatch, rank):
    """As many rows as possible, then one block's insides at a time; more than half of the free memory if need be."""
    monkeypatch.setattr(memory, "memory_of", lambda _: (0, 10**12))
    checkpoint, ways = open_checkpoint(checkpoint_folder("llama")), []
    network = checkpoint.empty(AutoModelForCausalLM)
    training = Training(calibration=str(text), length=16, batch=4, tokens="1536", rank=rank)

    def planned(limit: str | None, device: str = "cpu", **how: Any) -> Any:
        how = {"device": torch.device(device), "products": torch.float32, "processes": 1, "memory": limit} | how
        return memory.plan_memory(checkpoint, network, training, **how)

    limit = planned("1000GB").bytes
    for _ in range(5):
        plan = planned(f"{limit + 5}B")
        assert (plan.bytes, plan.spare_bytes) == (limit, 5)
        ways.append((plan.micro_batch, plan.recompute))
        if ways[-1] != (1, True):
            limit = planned(f"{limit - 1}B").bytes
    assert ways == [(4, False), (2, False), (1, False), (2, True), (1, True)]
    if rank == 0:
        # Training in bfloat16 comes next, and its smallest way is the last one.
        plan = planned(f"{limit - 1}B")
        while plan.way != (0, True, 1, True):
            assert plan.halved
            plan = planned(f"{plan.bytes - 1}B")
        limit = plan.bytes
    # A run goes on as it began, and a limit that a message names is enough.
    assert planned("1000GB", way=[rank, False, 2, True]).way == (rank, False, 2, True)
    assert planned(re.search(r"at least ([\d.]+ GB)", error_of(planned, "1B"))[1]).rank == rank
    assert ("train adapters with --rank 16" in error_of(planned, f"{limit - 1}B")) == (rank == 0)
    monkeypatch.setattr(memory, "memory_of", lambda _: (0, limit))
    assert planned(None).way == planned(None, "cuda").way == (rank, rank == 0, 1, True)


def test_adapters_take_half_of_the_free_memory_where_that_is_enough(checkpoint_folder, monkeypatch):
    """Although all weights were tried first, with all of the free memory."""
    sizes = {(0, False): [(1, 20)], (0, True): [(1, 11)], (ADAPTERS, False): [(4, 9), (2, 4)]}
    monkeypatch.setattr(memory, "memory_of", lambda _: (0, 10))
    monkeypatch.setattr(
        memory,
        "_plans",
        lambda _, *way: [memory.MemoryPlan(*way[:2], rows, False, size) for rows, size in sizes[way[:2]]],
    )
    checkpoint, how = open_checkpoint(checkpoint_folder("llama")), {"products": torch.float32, "processes": 1}
    network = checkpoint.empty(AutoModelForCausalLM)
    plan = memory.plan_memory(checkpoint, network, Training(), device=torch.device("cpu"), memory=None, **how)
    assert (plan.way, plan.bytes, plan.spare_bytes) == ((ADAPTERS, False, 2, False), 4, 1)


def test_a_device_without_memory_gives_an_error(train, monkeypatch, tmp_path):
    """Also before the training. What killed runs left is named."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BlockStream, "advance", fail)
    (tmp_path / ".out.partial-deadbeef").mkdir()
    assert "the device is out of memory; add --restart and train adapters" in error_of(
        train, "out", teacher=None, restart=True, watcher=(watcher := Notes())
    )
    assert any("partial-deadbeef was left by a run that was killed" in note for note in watcher.said)


def test_a_stopped_run_says_how_it_goes_on(train, monkeypatch):
    """With --restart, the same command would begin again."""
    for restart, words in (
        (False, "the same command resumes it"),
        (True, "the same command without --restart resumes"),
    ):
        said, watcher = [], Interrupting()
        monkeypatch.setattr(watcher, "note", said.append)
        with pytest.raises(KeyboardInterrupt):
            train("out", watcher=watcher, restart=restart)
        assert words in said[-1]


def test_a_training_leaves_the_callers_random_numbers(train):
    random.seed(5)
    numpy.random.seed(5)
    wanted = [random.random(), float(numpy.random.rand())]
    random.seed(5)
    numpy.random.seed(5)
    train("out", tokens="64")
    assert [random.random(), float(numpy.random.rand())] == wanted


def test_a_gpu_has_memory_of_its_own(checkpoint_folder, text, monkeypatch):
    """Most of a GPU's free memory is used, and activations of the teacher stay in the machine's memory."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (700, 10**6))
    assert memory_of(device) == (300, 1000)
    checkpoint = open_checkpoint(checkpoint_folder("llama"))
    network, training = checkpoint.empty(AutoModelForCausalLM), Training(calibration=str(text))
    how: dict[str, Any] = {"products": torch.float32, "processes": 1, "memory": None}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**12, 10**12))
    needed = memory.plan_memory(checkpoint, network, training, device=device, **how).bytes
    for room, fits in ((1.3, True), (1.2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, room=room: (round(room * needed), 10**12))
        plan = memory.plan_memory(checkpoint, network, training, device=device, **how)
        assert (plan.way == (0, False, 8, False)) == fits
        assert abs(plan.spare_bytes - available_bytes() / 2 + rss_bytes()) < available_bytes() / 4


def test_adapters_are_trained_if_all_weights_do_not_fit(tmp_path, train, monkeypatch):
    """A resumed run goes on with adapters, however much memory is free then."""
    watcher, bytes_of = Notes(), memory.fixed_bytes
    monkeypatch.setattr(memory, "fixed_bytes", lambda network, rank, *_: 1e6 if rank else 1e15)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        message = error_of(train, "out", rank=None)
    assert re.search(r"all weights do not fit into memory, and LoRA .* pip install \"secateur\[lora\]", message)
    with pytest.raises(KeyboardInterrupt):
        train("out", watcher=Interrupting(), rank=None)
    monkeypatch.setattr(memory, "fixed_bytes", bytes_of)
    for out, more, rank in (("out", {}, ADAPTERS), ("all", {"tokens": "64"}, 0)):
        train(out, watcher=watcher, rank=None, **more)
        assert record_of(tmp_path / out)["retrained"][0]["options"]["rank"] == rank
    wanted = f"Training adapters of rank {ADAPTERS}, as all weights do not fit into memory, ("
    for words in ("Resuming a run that was stopped", wanted, "Training all weights of the blocks ("):
        assert any(note.startswith(words) for note in watcher.said)


def test_a_full_disk_stops_the_training_which_resumes(tmp_path, train, monkeypatch):
    """An incomplete checkpoint is removed by the next run."""
    train("whole", tokens="512")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
        message = r"needs 82\d\.\d\d MB of disk space, but 100\.00 MB are free; free some space or choose another path"
        assert_error(message, train, "out", teacher=None, tokens="1M")
    monkeypatch.setattr(pass_checkpoint, "SPENT", float("inf"))
    add, added = ShardWriter.add, list[str]()

    def fails(writer: Any, name: str, tensor: Any) -> None:
        added.append(name)
        if len(added) > 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(writer, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", fails)
        with pytest.raises(StoppedError, match=r"\.out\.run/training: the disk is full; free some space and run the"):
            train("out", tokens="512")
    assert [path.name for path in tmp_path.glob(".out.run/training/checkpoint-*")] == ["checkpoint-1"]
    train("out", tokens="512")
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"tokens": "some"}, "tokens is 'some'; write a number such as 131072, 128k or 1M"),
        ({"tokens": "63"}, "tokens is 63, but one step takes 4 rows of 16 tokens; use at least 64 tokens"),
        ({"text_weight": 0.1}, "text weight is given together with --teacher none, with which the text has all of it"),
        ({"rank": "8"}, "rank is '8'; it must be a whole number"),
        ({"tokens": "100b", "batch": 10**9}, r"needs at least [\d,]+\.\d+ GB, but .* GB are allowed; raise --memory"),
        ({"rank": 100_000}, r"rank is 100000, but no matrix has more than \d+; use a smaller one, or 0"),
        ({"batch": -1}, "batch is -1; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning rate is 0.0; it must lie between 0 and 1"),
        ({"seed": -1}, "seed is -1; it must lie between 0 and"),
        ({"length": 1}, "length is 1; it must be at least 2"),
        ({"calibration": "random"}, "random token ids teach nothing; name a text or data set"),
        ({"calibration": "missing.txt"}, "missing.txt does not exist"),
        ({"teacher": "missing"}, "missing"),
        ({"device": "cuda:9"}, "device 'cuda:9' is not available here; use --device auto or cpu"),
    ],
)
def test_wrong_options_raise_an_error_and_leave_no_files(tmp_path, train, wishes, message):
    before = sorted(tmp_path.iterdir())
    assert re.search(message, error_of(train, "out", **wishes))
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_folders_raise_an_error(checkpoint_folder, tmp_path, train):
    assert "not a folder with a config.json; name a folder that secateur prune" in error_of(train, "out", tmp_path)
    folder = shutil.copytree(pruned(checkpoint_folder("llama"), tmp_path / "pruned"), tmp_path / "folder")
    for place in (folder, checkpoint_folder("llama")):
        assert "this is the folder of MODEL" in error_of(train, str(place), folder, overwrite=True, teacher=None)
    with RunFolder(tmp_path / "out", {}):
        assert "another run is using this folder" in error_of(train, "out", folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "exists and is not empty" in error_of(train, "full", folder)
    record = record_of(folder)
    for damaged in ({"sizes": {"parameters": [1]}}, {"blocks": [{"block": 0}]}, {"retrained": 5}):
        (folder / "secateur.json").write_text(json.dumps(record | damaged))
        message = error_of(train, "out", folder)
        assert re.search(r"secateur\.json: not a record that secateur prune wrote .*restore the file", message)


def test_a_training_that_diverges_raises_an_error(tmp_path, train, monkeypatch):
    plain = Student.forward

    def spoil(student: Student, *_: Any, **__: Any) -> Any:
        next(iter(student.trained().values())).data.fill_(float("nan"))
        return [{"loss": 1.0, "step": 1}]

    def fail(*_: Any) -> float:
        if not list(tmp_path.glob(".out.run/training/checkpoint-*")):
            return 1.0
        raise SecateurError("NaN")

    for owner, name, value, message in (
        (Student, "forward", lambda student, at: {"loss": plain(student, at)["loss"] / 0}, "the loss of step 1 is inf"),
        (steps, "train", spoil, "NaN or infinite after the training"),
        (Student, "perplexity", fail, "the perplexity after step 16 is not finite"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert_error(f"{message}; use a smaller --learning-rate", train, "out", rank=0)
        assert not (tmp_path / "out").exists()


def test_a_retrained_folder_becomes_a_gguf_file(letters_folder, tmp_path, train):
    folder = pruned(letters_folder("llama"), tmp_path / "pruned", "uniform")
    out = train("out", folder).path
    export(out, tmp_path / "out.gguf", type="f32")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    assert relative(logits_of(opened, token_rows()), logits_of(network_of(out), token_rows())) < 1e-5


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[Processes]:
    """The first of several processes, of which the others do not exist."""
    size = request.param
    if size > 1:
        torch.distributed.init_process_group("fake", rank=0, world_size=size)
    yield Processes(0, size)
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("rank", "halved"), [(0, False), (0, True), (8, False)])
@pytest.mark.parametrize("started", [1, 2, 4], indirect=True)
def test_the_formula_of_the_memory_holds(llama, started, rank, halved):
    """Weights, gradients and moments of the first process take the bytes that docs/cluster.md says."""
    how: dict[str, Any] = {"products": torch.bfloat16, "device": torch.device("cpu"), "processes": started}
    checkpoint = open_checkpoint(llama)
    student = Student(checkpoint, rank=rank, halved=halved, **how)
    own = {
        name: value.to_local() if isinstance(value, DTensor) else value for name, value in student.named_parameters()
    }
    found = sum(value.nbytes * (4 if value.requires_grad else 1) for value in own.values())
    network = checkpoint.empty(model_class(checkpoint.config))
    blocks = network.get_submodule("model.layers").children()
    largest = max(sum(value.numel() for value in block.parameters()) for block in blocks)
    gathered = 0 if started.size == 1 else 4 * largest * (2 if rank else 4)
    planned = memory.fixed_bytes(network, rank, torch.bfloat16, started.size, halved) - gathered
    assert found == pytest.approx(planned - LOGITS_AT_ONCE * memory.LOSS_BYTES, rel=0.05)


def test_the_table_of_the_memory_follows_from_the_formula():
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {"8B": (128256, 4096, 14336, 32, 32), "70B": (128256, 8192, 28672, 80, 64)}
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    for name, values in sizes.items():
        config = LlamaConfig(**dict(zip(names, values, strict=True)), num_key_value_heads=8)
        network = empty_model(AutoModelForCausalLM, config)
        for rank, trained in ((0, "all weights"), (16, "adapters, `--rank 16`")):
            found = (memory.fixed_bytes(network, rank, torch.bfloat16, size) / 1e9 for size in (1, 4, 8, 64))
            assert f"| {name} | {trained} | {' | '.join(f'{one:.0f}' for one in found)} |" in page
        rows = (one / 1e9 for one in memory._row_bytes(network, 128, torch.bfloat16))
        assert all(f"{one:.1f} GB" in page or f"{one:.1f} and" in page for one in rows)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_a_plan_counts_what_attention_keeps(checkpoint_folder, name):
    """Only some families compute attention without keeping its probabilities; see `attn_implementation`."""
    network = build(name).requires_grad_(True).train()
    assert (network.config._attn_implementation == "eager") == (name != "llama")

    def counted(length: int) -> tuple[float, float]:
        """Return the bytes that torch keeps of a row, and those that are planned."""
        kept: dict[int, Tensor] = {}

        def keep(value: Tensor) -> Tensor:
            kept[value.data_ptr()] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), torch.autocast("cpu", torch.bfloat16):
            _hidden = network.base_model(token_rows(1, length), use_cache=False)
        return sum(value.nbytes for value in kept.values()), memory._row_bytes(network, length, torch.bfloat16)[0]

    (short, planned_short), (long, planned_long) = counted(24), counted(48)
    # Weights are kept too, whatever the length.
    ratio = (planned_long - planned_short) / (long - short)
    assert 0.9 < ratio < 2.0
