"""Retraining: the loss falls, and the written folder holds the trained weights in the same format."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from conftest import CheckpointFolder
from models import ROWS, logits_of, relative, token_rows
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.progress import Silent
from secateur.base.run_folder import RunFolder
from secateur.base.services import Services
from secateur.commands.prune import prune
from secateur.measure import loading, perplexity
from secateur.measure.loading import load
from secateur.model import pass_checkpoint
from secateur.model.checkpoint import open_checkpoint
from secateur.model.stream import BlockStream
from secateur.retraining import memory
from secateur.retraining import retrain as steps
from secateur.retraining.adapters import adapted_layers
from secateur.retraining.options import ADAPTERS, Training
from secateur.retraining.retrain import retrain
from secateur.retraining.rows import training_rows
from secateur.retraining.schedule import PLANNED, Seconds, tokens_in_time

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
CASES = [("llama", "uniform"), *((name, "adaptive") for name in list(ROWS)[:11] if name != "qwen2")]

RELOAD = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
logits = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        logits[folder] = model(torch.tensor(json.loads(sys.argv[1])), use_cache=False).logits
save_file(logits, sys.argv[2])
assert "secateur" not in sys.modules
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Seven words over and over."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{3 * (i % 7)}" for i in range(900)))
    return path


def pruned(model: Path, out: Path, widths: str = "adaptive", **more: Any) -> Path:
    prune(
        model,
        out,
        widths=widths,
        modules=("channels",) if widths == "uniform" else ("heads", "channels"),
        **PRUNE,
        **more,
    )
    return out


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "secateur.json").read_text())
    return found


def test_peft_adapts_the_remaining_layers(checkpoint_folder: CheckpointFolder, tmp_path: Path) -> None:
    """Layers are found by name, even if some blocks have no heads or no channels."""
    blocks = [
        {"kv_groups": 0, "heads_per_group": 0, "channels": 40},
        {"kv_groups": 3, "heads_per_group": 2, "channels": 0},
    ]
    plan = {"blocks": [{"block": index, "width": width} for index, width in enumerate(blocks)]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    prune(checkpoint_folder("llama"), tmp_path / "out", plan=str(tmp_path / "plan.json"), **PRUNE | {"sparsity": None})
    network = load(open_checkpoint(tmp_path / "out"), torch.float32, torch.device("cpu"))
    adapted: Any = get_peft_model(network, LoraConfig(target_modules=["down_proj", "o_proj"], task_type="CAUSAL_LM"))
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert len(names) == 4
    loss = adapted(token_rows(2), labels=token_rows(2)).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_a_folder_saved_by_another_tool_is_retrained(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, widths: str
) -> None:
    """A pruned model that another tool loaded and saved has no record; its config holds all widths."""
    folder, saved, out = pruned(checkpoint_folder("llama"), tmp_path / "pruned", widths), tmp_path / "s", tmp_path / "o"
    network = load(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    network.save_pretrained(saved)
    open_checkpoint(folder).tokenizer().save_pretrained(saved)
    retrain(saved, out, calibration=str(text), **SMALL)
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert list(record(out)) == ["retrained"]


@pytest.mark.parametrize(("name", "widths"), CASES, ids=["-".join(case) for case in CASES])
def test_the_loss_falls_and_the_folder_is_complete(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, name: str, widths: str
) -> None:
    folder, out = pruned(checkpoint_folder(name), tmp_path / "pruned", widths), tmp_path / "out"
    done = retrain(folder, out, calibration=str(text), **SMALL)
    assert len(done.losses) == 24
    loss, perplexity_over_dense = (axes.lines[0].get_ydata() for axes in done.plot().axes)
    assert list(loss) == list(done.losses)
    assert [perplexity_over_dense[0], perplexity_over_dense[-1]] == list(done.perplexity)
    assert sum(done.losses[-4:]) < 0.8 * sum(done.losses[:4])
    assert done.perplexity[1] < 0.8 * done.perplexity[0]
    # The same tensors but for the blocks' matrices, and the same files but for the timings of the pruning.
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    network = load(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    names = {open_checkpoint(folder).resolve(f"{layer}.weight") for layer in adapted_layers(network)}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    files = [{file.name for file in path.iterdir()} for path in (folder, out)]
    assert files[1] == files[0] - {"timings.json"}
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    (entry,) = record(out).pop("retrained")
    assert record(out) == record(folder) | {"retrained": [entry]}
    assert entry["tokens"] == done.tokens == 1536
    assert entry["perplexity"] == {"dense": None, "before": done.perplexity[0], "after": done.perplexity[1]}
    # Adapters of rank 8 on each matrix.
    shapes = [network.get_submodule(layer).weight.shape for layer in adapted_layers(network)]
    assert done.adapted == sum(8 * sum(shape) for shape in shapes)


@pytest.mark.parametrize("rank", [8, 0])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phimoe"])
def test_experts_are_trained(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, name: str, rank: int
) -> None:
    """Whether they are stored one by one or together; the written weights are those that were measured."""
    folder, out = tmp_path / "pruned", tmp_path / "out"
    prune(checkpoint_folder(name), folder, widths="uniform", modules=("experts",), **PRUNE | {"sparsity": 0.2})
    settings = SMALL | {"calibration": str(text), "rank": rank}
    del settings["device"]
    training = Training(**settings)
    done = retrain(folder, out, training, device="cpu")
    assert done.perplexity[1] < 0.8 * done.perplexity[0]
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    experts = [key for key in before if ".experts." in key and "bias" not in key]
    assert experts
    assert not any(torch.equal(before[key], after[key]) for key in experts)
    written = open_checkpoint(out)
    held_out = training_rows(written, training, 64, Services()).held_out
    found = perplexity(load(written, torch.float32, torch.device("cpu")), held_out).perplexity
    assert found == pytest.approx(done.perplexity[1], rel=2e-2)


def test_the_reloaded_model_equals_the_trained_one(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is loaded in a process that does not import this library, with adaptive and with uniform widths."""
    kept: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for widths in ("adaptive", "uniform"):
        out = tmp_path / widths
        folders[str(out)] = pruned(checkpoint_folder("llama"), tmp_path / f"pruned {widths}", widths, dtype="bfloat16")
        loaded: list[Any] = []

        def kept_load(*given: Any, into: list[Any] = loaded, **named: Any) -> Any:
            into.append(load(*given, **named))
            return into[0]

        monkeypatch.setattr(loading, "load", kept_load)
        retrain(folders[str(out)], out, calibration=str(text), **SMALL)
        kept[str(out)] = loaded[0].float()
    ids = token_rows()
    arguments = [json.dumps(ids.tolist()), str(tmp_path / "logits.safetensors"), *kept]
    places = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    ended = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True, env=places)
    assert ended.returncode == 0, ended.stderr
    found = load_file(tmp_path / "logits.safetensors")
    for out, network in kept.items():
        assert relative(found[out], logits_of(network, ids)) < 1e-5
        dense = load(open_checkpoint(folders[out]), torch.float32, torch.device("cpu"))
        assert relative(found[out], logits_of(dense, ids)) > 1e-2


def test_the_seed_alone_decides_the_bytes(checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path) -> None:
    """The caller's random numbers are not disturbed."""
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    settings = {**SMALL, "calibration": str(text), "tokens": "256"}
    torch.manual_seed(5)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    for out, seed in (("one", 0), ("two", 0), ("other", 1)):
        retrain(folder, tmp_path / out, seed=seed, **settings)
    assert torch.equal(torch.rand(2), drawn)
    one, two, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two", "other"))
    assert one == two
    assert one != other


class Interrupting(Silent):
    """Ctrl-C in the middle of a training."""

    def track(self, items: Any, what: str, done: int = 0) -> Iterator[Any]:
        for number, item in enumerate(items):
            if what == "Retrain" and number == 13:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("rank", [8, 0])
def test_an_interrupted_training_resumes(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, rank: int
) -> None:
    """The resumed training writes the same bytes as an uninterrupted one, and leaves no checkpoint."""
    dense = checkpoint_folder("llama")
    folder = pruned(dense, tmp_path / "pruned")
    settings = {**SMALL, "calibration": str(text), "rank": rank, "teacher": str(dense)}
    retrain(folder, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        retrain(folder, tmp_path / "out", watcher=Interrupting(), **settings)
    (state,) = tmp_path.glob(".out.run/training/checkpoint-*")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        SecateurError, match=r"\.out\.run: the unfinished run has tokens 1536, this command has 512; use the same"
    ):
        retrain(folder, tmp_path / "out", **settings | {"tokens": "512", "learning_rate": 1e-3})
    # One that was killed while it was written does not count.
    (state.parent / "checkpoint-99").mkdir()
    retrain(folder, tmp_path / "out", **settings)
    whole, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == out
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "pruned", "whole", "out"}


def test_the_distribution_approaches_the_teachers(checkpoint_folder: CheckpointFolder, tmp_path: Path) -> None:
    """On token ids that were not trained on."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{id - 4}" for id in token_rows(1, 2000)[0].tolist()))
    dense = checkpoint_folder("llama")
    folder = pruned(dense, tmp_path / "pruned", dtype="float32")
    settings = {
        **SMALL,
        "calibration": str(text),
        "tokens": "6144",
        "rank": 0,
        "learning_rate": 2e-3,
        "text_weight": 0.0,
    }
    retrain(folder, tmp_path / "out", **settings | {"teacher": None})
    ids, device = token_rows(8, 20), torch.device("cpu")
    wanted, before, after = (
        logits_of(load(open_checkpoint(path), torch.float32, device), ids).log_softmax(-1)
        for path in (dense, folder, tmp_path / "out")
    )
    far, near = ((wanted.exp() * (wanted - found)).sum(-1).mean() for found in (before, after))
    assert near < 0.7 * far


def test_the_teacher_is_the_model_that_the_record_names(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path
) -> None:
    """If this model has moved, the error says so, and --teacher names its new place."""
    dense = shutil.copytree(checkpoint_folder("llama"), tmp_path / "dense")
    folder = pruned(dense, tmp_path / "pruned")
    settings = {**SMALL, "calibration": str(text), "tokens": "256"}
    named = retrain(folder, tmp_path / "named", **settings | {"teacher": str(dense)})
    recorded = retrain(folder, tmp_path / "recorded", **settings | {"teacher": None})
    assert recorded.curve == named.curve
    assert recorded.curve.dense is not None
    rows = training_rows(open_checkpoint(dense), Training(calibration=str(text), length=16, batch=4), 64, Services())
    network = load(open_checkpoint(dense), torch.float32, torch.device("cpu"))
    assert recorded.curve.dense == pytest.approx(perplexity(network, rows.held_out).perplexity, rel=1e-2)
    dense.rename(tmp_path / "moved")
    with pytest.raises(SecateurError, match="which is the teacher: give its new place with --teacher, or --teacher no"):
        retrain(folder, tmp_path / "out", **settings | {"teacher": None})
    (folder / "secateur.json").unlink()
    with pytest.raises(SecateurError, match=r"no secateur\.json that names the model that was pruned; give"):
        retrain(folder, tmp_path / "out", **settings | {"teacher": None})


def test_the_teacher_is_never_loaded_whole(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its blocks at a time is in memory, and all of the pruned model once."""
    loaded: list[Any] = []
    filled: list[int] = []
    real = BlockStream.filled

    @contextmanager
    def counted(stream: BlockStream, index: int) -> Iterator[Any]:
        filled.append(index)
        with real(stream, index) as layer:
            others = [other for other in stream.layers.children() if other is not layer]
            assert all(value.is_meta for other in others for value in other.parameters())
            yield layer

    def load_once(checkpoint: Any, *given: Any, **named: Any) -> Any:
        loaded.append(checkpoint.source)
        return load(checkpoint, *given, **named)

    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    monkeypatch.setattr(BlockStream, "filled", counted)
    monkeypatch.setattr(loading, "load", load_once)
    retrain(folder, tmp_path / "out", **SMALL | {"calibration": str(text), "teacher": None})
    assert loaded == [str(folder)]
    assert filled == [0, 1, 2]


def test_a_text_with_too_few_tokens_is_used_several_times(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path
) -> None:
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
    windows = {
        tuple(window) for row in rows.train.tolist() for window in zip(*(row[i:] for i in range(4)), strict=False)
    }
    kept = {
        tuple(window) for row in rows.held_out.tolist() for window in zip(*(row[i:] for i in range(4)), strict=False)
    }
    assert not windows & kept
    text.write_text("w1 w2 w3 " * 90)
    with pytest.raises(SecateurError, match="has 270 tokens, of which 5% are held out; rows of 16 tokens need 320"):
        training_rows(checkpoint, training, 4096, Services())


def test_standard_input_can_be_the_text(checkpoint_folder, tmp_path, text, monkeypatch):
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    losses = []
    for source in (str(text), "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))
        losses.append(retrain(folder, tmp_path / "out", overwrite=True, **SMALL | {"calibration": source}).losses)
    assert losses[0] == losses[1]


def test_one_process_reads_the_text_for_all(checkpoint_folder: CheckpointFolder) -> None:
    sent = [[[1, 2]], [[3, 4]], 0.5]
    second: Any = SimpleNamespace(broadcast=lambda make: sent)
    training = Training(length=2, batch=1)
    rows = training_rows(open_checkpoint(checkpoint_folder("llama")), training, 2, Services(second))
    assert [rows.train.tolist(), rows.held_out.tolist(), rows.passes] == sent


class Noting(Silent):
    """Watcher that keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_time_decides_the_number_of_tokens(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped goes on with the number that was planned."""
    folder, watcher = pruned(checkpoint_folder("llama"), tmp_path / "pruned"), Noting()
    settings = SMALL | {"calibration": str(text), "tokens": None, "teacher": None}
    message = (
        r"time is 0\.01s, of which [\d.]+ s have gone by, and a training of one step takes [\d.]+ s; allow at least"
    )
    with pytest.raises(SecateurError, match=message):
        retrain(folder, tmp_path / "out", **settings, time="0.01s")
    monkeypatch.setattr(steps, "tokens_in_time", lambda *_, **__: 1536)
    with pytest.raises(KeyboardInterrupt):
        retrain(folder, tmp_path / "out", watcher=Interrupting(), **settings, time="1m")
    monkeypatch.undo()
    done = retrain(folder, tmp_path / "out", watcher=watcher, **settings, time="1m")
    assert done.tokens == 1536
    assert "Training on 1,536 tokens, as many as fit into 1m" in watcher.notes
    assert not any("ends by" in note for note in watcher.notes)


def test_a_time_counts_from_the_start(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start may lie before the call, and the end is said beforehand."""
    folder, watcher, began = pruned(checkpoint_folder("llama"), tmp_path / "pruned"), Noting(), time.time() - 30
    settings = SMALL | {"calibration": str(text), "tokens": None, "teacher": None, "time": "1h"}
    given: list[Any] = []

    def tokens(*arguments: Any) -> int:
        given.extend(arguments)
        return 64

    monkeypatch.setattr(steps, "tokens_in_time", tokens)
    retrain(folder, tmp_path / "out", watcher=watcher, started=began, **settings)
    training, seconds, deadline = given
    assert deadline == began + 3600
    assert all(part > 0 for part in seconds)
    end = f"{datetime.fromtimestamp(deadline).astimezone():%H:%M:%S}"
    assert watcher.notes[1:3] == [f"This command ends by {end}", "Training on 64 tokens, as many as fit into 1h"]
    one_second = Seconds(step=1.0, measurement=0.0, rest=0.0)
    assert tokens_in_time(training, one_second, time.time() + 100.5) == 64 * int(100 * PLANNED)
    with pytest.raises(SecateurError, match=r"time is 1h, of which 3,\d+\.\d s have gone by, and .* takes 1\.0 s"):
        tokens_in_time(training, one_second, time.time() + 1)


def test_steps_fill_a_time() -> None:
    """Perplexity is measured before and after the training, and after every 16th step, but ten times at most."""
    seconds = Seconds(step=1.0, measurement=0.5, rest=3.0)
    for steps_done, between in ((1, 0), (15, 0), (32, 1), (160, 9), (1000, 10)):
        needed = 3.0 + steps_done + 0.5 * (2 + between)
        assert steps_done - 1 <= seconds.steps_in(needed + 1e-6) <= steps_done
    assert seconds.steps_in(seconds.least + 0.1) == 1
    assert seconds.steps_in(3.0) < 1


def test_damaged_targets_are_noticed(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    settings = SMALL | {"calibration": str(text), "teacher": None}
    with pytest.raises(KeyboardInterrupt):
        retrain(folder, tmp_path / "out", watcher=Interrupting(), **settings)
    saved = tmp_path / ".out.run" / "targets"
    saved.write_bytes(saved.read_bytes()[:-1] + b"x")
    with pytest.raises(SecateurError, match="targets: damaged, so the run cannot be resumed; add --restart"):
        retrain(folder, tmp_path / "out", **settings)
    retrain(folder, tmp_path / "out", restart=True, **settings)


def test_memory_decides_how_a_step_is_run(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows at a time, then only inputs of blocks are kept; the weights are the same up to rounding."""
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned", dtype="float32")
    settings = SMALL | {"calibration": str(text), "rank": 0, "learning_rate": 1e-3, "tokens": "512"}
    with pytest.raises(SecateurError, match=r"needs at least [\d.]+ GB, but 0.00 GB are allowed; raise --memory"):
        retrain(folder, tmp_path / "out", memory="1MB", **settings)
    retrain(folder, tmp_path / "whole", **settings)
    plan = steps.plan_memory
    monkeypatch.setattr(
        steps, "plan_memory", lambda *given, **named: plan(*given, **named)._replace(micro_batch=1, recompute=True)
    )
    retrain(folder, tmp_path / "parts", **settings)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-3 * float(value.abs().max()), rtol=0, msg=name)


def test_adapters_are_trained_if_all_weights_do_not_fit(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run goes on with adapters, however much memory is free then."""
    folder, watcher = pruned(checkpoint_folder("llama"), tmp_path / "pruned"), Noting()
    settings = SMALL | {"calibration": str(text), "rank": None}
    bytes_of = memory._fixed_bytes
    monkeypatch.setattr(memory, "_fixed_bytes", lambda network, rank, products: 1e6 if rank else 1e15)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        SecateurError, match=r"all weights do not fit into memory, and LoRA .* pip install \"secateur\[lora\]"
    ):
        retrain(folder, tmp_path / "out", **settings)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_fixed_bytes", lambda network, rank, products: 1e6 if rank else 1e15)
    with pytest.raises(KeyboardInterrupt):
        retrain(folder, tmp_path / "out", watcher=Interrupting(), **settings)
    monkeypatch.setattr(memory, "_fixed_bytes", bytes_of)
    retrain(folder, tmp_path / "out", watcher=watcher, **settings)
    assert record(tmp_path / "out")["retrained"][0]["options"]["rank"] == ADAPTERS
    assert any(note.startswith("Resuming a run that was stopped") for note in watcher.notes)
    wanted = f"Training adapters of rank {ADAPTERS}, as all weights do not fit into memory, ("
    assert any(note.startswith(wanted) for note in watcher.notes)
    watcher.notes.clear()
    retrain(folder, tmp_path / "all", watcher=watcher, **settings | {"tokens": "64"})
    assert watcher.notes[0].startswith("Training all weights of the blocks (")
    assert record(tmp_path / "all")["retrained"][0]["options"]["rank"] == 0


def test_a_wrong_request_leaves_the_state_of_a_stopped_run(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path
) -> None:
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    settings = SMALL | {"calibration": str(text)}
    with pytest.raises(KeyboardInterrupt):
        retrain(folder, tmp_path / "out", watcher=Interrupting(), **settings)
    with pytest.raises(SecateurError, match=r"needs at least .* raise --memory"):
        retrain(folder, tmp_path / "out", memory="1MB", **settings)
    assert list(tmp_path.glob(".out.run/training/checkpoint-*/trainer_state.json"))


def test_a_full_disk_stops_the_training_which_resumes(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of torch.save is that of a full disk. An incomplete checkpoint is removed by the next run."""
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    settings = SMALL | {"calibration": str(text), "tokens": "512"}
    retrain(folder, tmp_path / "whole", **settings)
    monkeypatch.setattr(pass_checkpoint, "SPENT", float("inf"))
    save, count = torch.save, 0

    def fails(what: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count > 6:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        save(what, file)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(StoppedError, match=r"\.out\.run/training: the disk is full; free some space and run the same"):
        retrain(folder, tmp_path / "out", **settings)
    assert len(list(tmp_path.glob(".out.run/training/checkpoint-*"))) == 2
    monkeypatch.setattr(torch, "save", save)
    retrain(folder, tmp_path / "out", **settings)
    whole, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == out


def test_a_small_disk_is_noticed_before_the_training(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    settings = SMALL | {"calibration": str(text), "teacher": None}
    free = shutil.disk_usage(tmp_path)._replace(free=17 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    retrain(folder, tmp_path / "out", **settings | {"tokens": "64"})
    with pytest.raises(SecateurError, match=r"other: the training needs 0\.\d+ GB of disk space for its state"):
        retrain(folder, tmp_path / "other", **settings | {"tokens": "64k"})


def test_a_retrained_folder_can_be_retrained(checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path) -> None:
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    settings = {**SMALL, "calibration": str(text), "tokens": "256"}
    retrain(folder, tmp_path / "one", **settings)
    retrain(tmp_path / "one", tmp_path / "two", **settings | {"rank": 2})
    assert [entry["options"]["rank"] for entry in record(tmp_path / "two")["retrained"]] == [8, 2]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"tokens": "some"}, "tokens is 'some'; write a number such as 131072, 128k or 1M"),
        ({"tokens": "63"}, "tokens is 63, but one step takes 4 rows of 16 tokens; use at least 64 tokens"),
        ({"tokens": "64", "time": "1m"}, "both --tokens and --time are given; leave one of them out"),
        ({"tokens": None, "time": "soon"}, "time is 'soon'; write a time such as 90s, 30m or 2h"),
        ({"rank": -1}, "rank is -1; it must be at least 0"),
        ({"rank": "8"}, "rank is '8'; it must be a whole number"),
        ({"tokens": None, "time": "99999999999d"}, "time is '99999999999d'; use at most 10,000d, or --tokens"),
        ({"tokens": "100b", "batch": 10**9}, r"needs at least [\d,]+\.\d+ GB, but .* GB are allowed; raise --memory"),
        ({"rank": 100_000}, r"rank is 100000, but no matrix has more than \d+; use a smaller one, or 0"),
        ({"batch": -1}, "batch is -1; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning rate is 0.0; it must lie between 0 and 1"),
        ({"learning_rate": float("nan")}, "learning rate is nan; it must lie between 0 and 1"),
        ({"seed": -1}, "seed is -1; it must lie between 0 and"),
        ({"length": 1}, "length is 1; it must be at least 2"),
        ({"calibration": "random"}, "random token ids teach nothing; name a text or data set"),
        ({"calibration": "missing.txt"}, "missing.txt does not exist"),
        ({"teacher": "missing"}, "missing"),
        ({"device": "cuda:1"}, "device is 'cuda:1', but the Trainer always takes the first GPU; use auto or cpu"),
    ],
)
def test_wrong_options_raise_an_error_and_leave_no_files(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, wishes: dict[str, Any], message: str
) -> None:
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SecateurError, match=message):
        retrain(folder, tmp_path / "out", **{**SMALL, "calibration": str(text), **wishes})
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_folders_raise_an_error(checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path) -> None:
    settings = {**SMALL, "calibration": str(text)}
    with pytest.raises(SecateurError, match=r"not a folder with a config\.json; name a folder that secateur prune"):
        retrain(tmp_path, tmp_path / "out", **settings)
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")
    for place in (folder, checkpoint_folder("llama")):
        with pytest.raises(SecateurError, match="this is the folder of MODEL"):
            retrain(folder, place, overwrite=True, **settings | {"teacher": None})
    with RunFolder(tmp_path / "out", {}), pytest.raises(SecateurError, match="another run is using this folder"):
        retrain(folder, tmp_path / "out", **settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(SecateurError, match="exists and is not empty"):
        retrain(folder, tmp_path / "full", **settings)
    record = json.loads((folder / "secateur.json").read_text())
    for damaged in ({"sizes": {"parameters": [1]}}, {"blocks": [{"block": 0}]}, {"retrained": 5}):
        (folder / "secateur.json").write_text(json.dumps(record | damaged))
        with pytest.raises(
            SecateurError, match=r"secateur\.json: not a record that secateur prune wrote .*restore the file"
        ):
            retrain(folder, tmp_path / "out", **settings)


def test_a_training_that_diverges_raises_an_error(
    checkpoint_folder: CheckpointFolder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned(checkpoint_folder("llama"), tmp_path / "pruned")

    def spoilt(student: Any, *_: Any, **__: Any) -> Any:
        next(iter(student.trained().values())).data.fill_(float("nan"))
        return [{"loss": 1.0, "step": 1}]

    monkeypatch.setattr(steps, "train", spoilt)
    with pytest.raises(SecateurError, match="NaN or infinite after the training; use a smaller --learning-rate"):
        retrain(folder, tmp_path / "out", **SMALL | {"calibration": str(text), "rank": 0})
    assert not (tmp_path / "out").exists()


def test_a_missing_peft_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SecateurError, match=r'needs peft, which is not installed; pip install "secateur\[lora\]"'):
        retrain("anything", "out", Training(calibration="wikitext2", rank=8))


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")]
)
def test_a_divided_model_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, engine: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SecateurError, match=f"accelerate is configured for {engine}.*; start retrain with torchrun"):
        retrain("anything", "out", Training(calibration="general"))
