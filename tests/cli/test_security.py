"""Files of strangers: no command unpickles them, runs their code, leaves their folder or shows their HTML."""

import json
import os
import pickle
from typing import Any

import pytest
import torch
from command_line import SMALL, TEXT, listing, refused

from models import make_letters

TINY = " ".join(SMALL)
COMMANDS = [
    f"prune model out {TINY}",
    f"prune model out.gguf {TINY} --format gguf --widths uniform",
    "prune out.gguf again --calibration random --samples 4 --length 16",
    f"sizes model --out sizes --sparsities 0.2,0.4 {TINY} --perplexity text.txt",
    f"survey model --out survey {TINY}",
    f"plan model --out plan.json {TINY}",
    "eval out --against model --perplexity text.txt --length 16 --speed --prompt a",
    "export out exported.gguf",
    "retrain out retrained --calibration text.txt --tokens 128 --length 16",
    "families",
    "clean out",
]
BOTH = (["prune", "model", "out", *SMALL], ["eval", "model", "--perplexity", "text.txt"])


class Trap:
    """Object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_no_command_unpickles(place, run, monkeypatch):
    """Pickles that other tools would open are next to the weights, and every way to unpickle raises an error."""
    make_letters().save_pretrained(place / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin"):
        (place / "model" / name).write_bytes(pickle.dumps(Trap()))
    torch.save({"weight": torch.ones(1)}, place / "model" / "consolidated.00.pth")
    assert run("families").code == 0

    def poisoned(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, poisoned)
    monkeypatch.setattr(torch, "load", poisoned)
    for command in COMMANDS:
        result = run(*command.split())
        assert result.code == 0, (command, result.err)
    assert not (place / "trapped").exists()


def test_pickled_weights_without_safetensors_are_refused(place, run):
    (place / "model" / "model.safetensors").unlink()
    (place / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    for command in BOTH:
        refused(run(*command), "only pickled weights")
    assert not (place / "trapped").exists()


def test_tokenizer_code_runs_only_with_the_flag(place, run):
    file = place / "model" / "tokenizer_config.json"
    own = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tok.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(own))
    (place / "model" / "tok.py").write_text("import os\nos.mkdir('trapped')\n")
    (place / "model" / "tokenizer.json").unlink()
    before = listing(place)
    for command in BOTH:
        assert run(*command).code == 2
    assert listing(place) == before


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [trapped]", "!!python/name:os.system"])
def test_yaml_tags_create_no_objects(tag, place, run):
    (place / "family.yaml").write_text(f"title: {tag}\n")
    result = run("prune", "model", "out", *SMALL, "--family", "family.yaml")
    assert result.code == 2, result
    assert result.err.count("\n") == 1
    (place / "model" / "README.md").write_text(f"---\nlicense: {tag}\n---\n")
    assert run("prune", "model", "out", *SMALL).code == 0
    assert not (place / "trapped").exists()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors"])
def test_an_index_cannot_name_files_outside_its_folder(shard, place, run):
    weights = place / "model" / "model.safetensors"
    weights.rename(place / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run("prune", "model", "out", *SMALL), "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "tokenizer.model", "additional_chat_templates/a.jinja"])
def test_no_file_outside_the_folder_is_copied(name, place, run):
    """In the hub's cache, files are links to blobs of the same model."""
    (place / "secret").write_text("secret")
    snapshot = place / "hub" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    (place / "hub" / "blobs").mkdir()
    (place / "model").rename(snapshot)
    (license := place / "hub" / "blobs" / "a").write_text("free")
    (snapshot / "LICENSE.txt").symlink_to(license)
    assert run("prune", str(snapshot), "out", *SMALL).code == 0
    assert (place / "out" / "LICENSE.txt").read_text() == "free"
    (snapshot / name).parent.mkdir(exist_ok=True)
    (snapshot / name).symlink_to(place / "secret")
    for command in ("prune", "trim"):
        words = [command, str(snapshot), "out2", *(SMALL if command == "prune" else ["--vocabulary", "latin"])]
        refused(run(*words), f"{snapshot / name}: a link to {place / 'secret'}, outside of the model's folder; put a")


def test_pages_hold_what_strangers_write_as_text(place, run):
    """Names of a folder, a text and a model appear on the pages as text, and open no tag."""
    model, text = "<img src=x onerror=alert(1)>", "text<script>.txt"
    (place / "model").rename(place / model)
    (place / text).write_text(TEXT)
    small = ["--calibration", text, "--samples", "4", "--length", "16"]
    assert run("prune", model, "o<b>ut", *small).code == 0
    assert run("survey", model, "--out", "s<b>", *small).code == 0
    for page in (place / "o<b>ut" / "report.html", place / "s<b>" / "survey.html"):
        found = page.read_text()
        assert not any(tag in found for tag in ("<img", "text<script", "o<b>ut", "s<b>", "<b>")), page
        assert "&lt;img" in found or "\\u003cimg" in found
