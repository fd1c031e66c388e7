"""Texts, plans, surveys and outputs that cannot be used are refused in one line, before any work."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, TEXT, listing, refused

from conftest import CheckpointFolder
from outputs import record_of
from secateur.measure import evaluation
from secateur.steps import prune

FILES: dict[str, tuple[bytes, str]] = {
    "short.txt": (b"w1 w2", "short.txt: too short, it has 2 tokens, but 4 rows of 16 tokens need 64"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "w1"}]}', "line 1: messages need a tokenizer with a"),
}
NO_TEXTS = {
    "": (None, "no text is named: give a .txt or .jsonl file, - or a data set"),
    "./model": (None, "./model is a folder without Parquet files: name a .txt or .jsonl file"),
    "./pipe": (None, "./pipe is not a regular file: give - and pipe its text in"),
}


@pytest.mark.parametrize("name", FILES | NO_TEXTS)
def test_an_unusable_text_is_refused_before_any_work(name, place, run, no_work, monkeypatch):
    data, message = (FILES | NO_TEXTS)[name]
    os.mkfifo("pipe")
    if data is not None:
        Path(name).write_bytes(data)
    monkeypatch.setattr(evaluation, "load", lambda *_: pytest.fail("a model was loaded"))
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, "--calibration", name), message)
    refused(
        run("eval", "model", "--length", "16", "--perplexity", name),
        message.replace("4 rows of 16 tokens need 64", "1 row of 16 tokens needs 16"),
    )
    assert listing(place) == before


def test_an_output_that_cannot_be_written_is_refused(place, run, no_work, monkeypatch):
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    before = listing(place)
    refused(run("prune", "model", "full", *SMALL), "full: exists and is not empty; choose another name or add --over")
    said = "missing.txt does not exist: check the path of the text"
    refused(run("prune", "missing", "out", "--calibration", "missing.txt"), said)
    refused(run("prune", "model", "missing/out", *SMALL), "missing does not exist; create it first")
    refused(run("prune", "model", "model", *SMALL, "--overwrite"), "model: this is the folder of MODEL, which would be")
    with monkeypatch.context() as patch:
        patch.chdir("full")
        refused(run("prune", "../model", ".", *SMALL, "--calibration", "random"), "full: this is the current folder")

    def forbidden(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may write anywhere, so the system's answer is given here
        patch.setattr(Path, "mkdir", forbidden)
        refused(run("prune", "model", "out", *SMALL), "(Permission denied); choose another path")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda self: self.name == "out")
        refused(run("prune", "model", "out", *SMALL), "out: this is a mount point, which cannot be")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    for out, options in (("out", []), ("o.gguf", ["--format", "gguf"])):
        refused(run("prune", "model", out, *SMALL, *options), "MB of disk space, but 0.00 MB are free; free some")
    assert listing(place) == before


REPLACED = [
    ("families --json model/config.json", "model/config.json: not overwritten, because it is not a report that --json"),
    ("families --json model/model.safetensors", "model.safetensors: not overwritten, because it is not a report that"),
    ("plan model --out model/config.json", "config.json: not overwritten, because it is not a plan that secateur plan"),
    ("plan model --out p.json --json ./p.json", "p.json: --json and another path of this command are the same; change"),
    ("sizes model --out mine", "mine/sizes.png: would be replaced, but it is not a table that secateur sizes wrote;"),
    ("survey model --out survey", "survey: not overwritten, because it is not a folder that secateur survey wrote"),
    ("export model mine.gguf", "mine.gguf: not overwritten, because it is not a gguf file; choose another name"),
]


@pytest.mark.parametrize(("arguments", "message"), REPLACED, ids=[row[0] for row in REPLACED])
def test_an_output_replaces_only_its_own_kind(arguments, message, place, run, no_work):
    for folder in ("mine", "survey"):
        Path(folder).mkdir()
    for file in ("mine/sizes.png", "mine/table.csv", "survey/survey.json", "mine.gguf"):
        Path(file).write_text("mine")
    before = listing(place)
    small = SMALL if arguments.split()[0] in ("plan", "sizes", "survey") else []
    overwrite = [] if arguments.startswith("sizes") else ["--overwrite"]
    refused(run(*arguments.split(), *small, *overwrite), message)
    assert listing(place) == before


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: CheckpointFolder) -> Path:
    """Folder with pruned models, plans and surveys of other runs; read-only for tests."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text.txt").write_text(TEXT)
    small: dict[str, Any] = {"samples": 4, "length": 16, "calibration": str(place / "text.txt")}
    survey, llama, gpt2 = place / "survey.json", checkpoint_folder("llama"), checkpoint_folder("gpt2")
    prune.prune(llama, place / "adaptive", survey=survey, **small)
    prune.prune(llama, place / "uniform", widths="uniform", criterion="l1", **small)
    shutil.copytree(checkpoint_folder("mistral"), place / "mistral")
    shutil.copytree(gpt2, place / "gpt2")
    prune.prune(gpt2, place / "gpt2-adaptive", **small)
    (place / "first.json").write_text('{"0:2": 0.3}')
    found = json.loads(survey.read_text())
    for name, key in {"no-curve": "curves", "no-probe": "probes"}.items():
        kept = [entry for entry in found[key] if (entry["block"], entry["kind"]) != (1, "channels")]
        (place / f"{name}.json").write_text(json.dumps({**found, key: kept}))
    found["curves"][-1]["errors"].pop()
    (place / "short.json").write_text(json.dumps(found))
    found["curves"][0]["energy"] = float("nan")
    (place / "energy.json").write_text(json.dumps(found))
    plan = record_of(place / "uniform")
    first, _, third = plan["blocks"]
    for name, blocks in {
        "typo": [{"block": 0, "head": [0, 1], "channels": [1]}],
        "other": [first | {"width": {"kv_groups": 3, "heads_per_group": 2, "channels": 7}}],
        "holes": [first, third],
    }.items():
        (place / f"{name}.json").write_text(json.dumps({"blocks": blocks}))
    return place


@pytest.fixture
def other_runs(place: Path, runs: Path) -> None:
    """Copy the outputs of these runs into the working folder."""
    shutil.copytree(runs, place, dirs_exist_ok=True)


WRONG_FILES = [
    ("prune mistral out --plan adaptive/secateur.json", "this plan was made for another model; remove 'fingerprint'"),
    ("prune mistral out --survey survey.json", "survey.json: a survey of other weights; name another file to make"),
    ("prune model out --survey survey.json --criterion l2", "a survey with criterion surgeon instead of l2"),
    ("prune model out --survey no-curve.json", "no-curve.json: this survey lacks widths of the channels of block 1;"),
    ("sizes model --out sizes --survey short.json", "this survey lacks widths of the channels of block 2; name"),
    ("prune model out --plan adaptive/secateur.json --format stock", "holds one width for all blocks; use --format hf"),
    ("prune model out --plan holes.json --format stock", "hf; the nearest that fits: --widths uniform --sparsity 0"),
    ("prune model out --widths first.json --modules heads", "--modules and --widths first.json both set what"),
    ("prune model out --plan adaptive/secateur.json --widths uniform", "--plan and --widths uniform both set how much"),
    ("prune model out --plan typo.json", "typo.json: block 0: unknown key 'head'; use block, channels,"),
    ("prune model out --plan other.json", "other.json: block 0: 'width' does not match the listed units"),
    ("prune model out --survey energy.json", "energy.json: not a survey by secateur; name another file"),
    ("prune model out --plan uniform/secateur.json --round 8", "--round and --plan both set what to remove from which"),
    ("prune model out.gguf --format gguf", "the tokenizer is WordLevel; GGUF output supports only byte-level BPE and"),
    ("prune gpt2 out.gguf --format gguf", "gpt2 has one width for all blocks, so prune all of them with uniform"),
    ("prune model out --widths uniform --target ppl=1.1x --blocks 0:1", "and only 0:1 are to be pruned; leave the"),
    ("prune model out --widths uniform --target ppl=1.1x --recovery bias", "has no biases of output projections"),
    ("prune gpt2 out.gguf --format gguf --plan gpt2-adaptive/secateur.json", "prune all of them with uniform widths"),
    ("export adaptive out.gguf", "adaptive: the tokenizer is WordLevel; GGUF output supports only"),
    ("export gpt2-adaptive out.gguf", "uniform widths; prune the original model again with --format gguf"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_FILES, ids=[row[0] for row in WRONG_FILES])
def test_plans_and_surveys_of_other_models_are_refused(arguments, message, place, run, other_runs, no_work):
    before = listing(place)
    small = [] if arguments.startswith("export") else SMALL
    refused(run(*arguments.split(), *small), message)
    assert listing(place) == before
