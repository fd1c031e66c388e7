"""The command line: each mistake is one line and exit code 2 before any work, each option does what its help says."""

from __future__ import annotations

import errno
import gc
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import CheckpointFolder
from models import POSITIONS, WORDS, make_letters, make_tokenizer
from secateur import cli
from secateur.base.quiet import quiet
from secateur.cli import bars, terminal
from secateur.commands import fit_blocks, plan, prune, sizes, survey_model, write_model
from secateur.families.registry import FAMILIES
from secateur.write import shards

TEXT = " ".join(f"w{i * i % (WORDS - 4)}" for i in range(1500))
SMALL = ["--calibration", "text.txt", "--samples", "4", "--length", "16"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path, checkpoint_folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a tiny Llama and a text."""
    shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`secateur` with some arguments, inside this process."""
    monkeypatch.setattr(terminal, "log", Console(file=None, stderr=True, highlight=False, markup=False, width=120))
    monkeypatch.setenv("COLUMNS", "120")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *capsys.readouterr())

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long must not be reached."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("a mistake was found after long work")

    for module in (survey_model, fit_blocks, write_model, prune, plan, sizes):
        for name in ("survey_model", "survey", "refit", "write", "write_model"):
            monkeypatch.setattr(module, name, reached, raising=False)


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file below a folder with its size."""
    return sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*"))


def apart_from_state(folder: Path) -> list[tuple[str, int]]:
    """The same without what a run that was stopped keeps to go on from, which must be there."""
    kept = [entry for entry in listing(folder) if not entry[0].startswith(".out.run")]
    assert len(kept) < len(listing(folder))
    return kept


def refused(result: Result, message: str) -> None:
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err


def config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def replaced(name: str) -> Callable[[Path, CheckpointFolder], None]:
    """Another row of the matrix in place of the Llama."""

    def apply(folder: Path, rows: CheckpointFolder) -> None:
        shutil.rmtree(folder)
        shutil.copytree(rows(name), folder)

    return apply


def other_family(model_type: str, **keys: Any) -> Callable[[Path, CheckpointFolder], None]:
    """A model of a family that transformers knows and secateur does not."""

    def apply(folder: Path, _: CheckpointFolder) -> None:
        from transformers import AutoConfig

        sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "n_layer": 1, "n_head": 2} | keys
        with quiet():
            AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)

    return apply


def truncated(folder: Path, _: CheckpointFolder) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_tokenizer(folder: Path, _: CheckpointFolder) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def whole_numbers(folder: Path, _: CheckpointFolder) -> None:
    weights = folder / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, weights, {"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path, CheckpointFolder], Any], str]] = {
    "no config": (lambda f, _: (f / "config.json").unlink(), "model: no config.json; name a folder"),
    "broken config": (
        lambda f, _: (f / "config.json").write_text('{"model_type": '),
        "config.json: not valid JSON at line 1 column",
    ),
    "truncated": (truncated, "model.safetensors: truncated or damaged"),
    "other shape": (
        lambda f, _: config(f, intermediate_size=80),
        "model.layers.0.mlp.gate_proj.weight is [72, 48] where config.json makes it [80, 48] (and 8 more); find the",
    ),
    "fewer tensors": (lambda f, _: config(f, num_hidden_layers=4), "tensors missing from the weights: model.layers.3."),
    "no blocks": (lambda f, _: config(f, num_hidden_layers=0), "the model has no blocks; find the config.json"),
    "no such activation": (
        lambda f, _: config(f, hidden_act="nope"),
        "makes no model of config.json (KeyError: 'nope')",
    ),
    "nested config": (lambda f, _: (f / "config.json").write_text("[" * 10**6), "nested too deeply for a config"),
    "whole numbers": (whole_numbers, "up_proj.weight holds torch.int8, whole numbers in place of weights; use an unq"),
    "only .bin": (
        lambda f, _: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pickled weights (.bin), which are not opened as they can run code; use a revision with safetensors",
    ),
    "no tokenizer": (no_tokenizer, "model: no tokenizer files; copy the model's into the folder"),
    "broken tokenizer": (lambda f, _: (f / "tokenizer.json").write_text("{"), "model: the tokenizer does not load"),
    "unknown": (
        other_family("ctrl"),
        "model type 'ctrl' is not supported; secateur families prints those that are",
    ),
    "another form": (other_family("ctrl"), "describe it in a file and add --family FILE; see docs/extend.md"),
    "mamba": (other_family("mamba"), "it has layers of linear attention, convolution or state space, for which there"),
    "experts": (
        other_family("jetmoe"),
        "model type 'jetmoe' is not supported; secateur families prints those that are (it has experts, for which",
    ),
    "no such model type": (lambda f, _: config(f, model_type="llamma"), "does not know model_type 'llamma'; upgrade"),
    "t5": (lambda f, _: (f / "config.json").write_text('{"model_type": "t5"}'), "t5 is an encoder-decoder model"),
    "vision": (lambda f, _: config(f, vision_config={"hidden_size": 8}), "is a multimodal model (vision_config)"),
    "gptq": (lambda f, _: config(f, quantization_config={"quant_method": "gptq"}), "quantised weights (gptq)"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model(case: str, place: Path, run: Run, no_work: None, checkpoint_folder: CheckpointFolder) -> None:
    change, message = MODELS[case]
    change(place / "model", checkpoint_folder)
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL), message)
    assert listing(place) == before


OPTIONS: list[tuple[str, str]] = [
    ("--sparsity 0", "sparsity is 0.0; it must lie between 0 and 1, for example 0.25"),
    ("--sparsity 1", "sparsity is 1.0; it must lie between"),
    ("--sparsity 1.5", "sparsity is 1.5; it must lie between"),
    ("--sparsity=-1", "sparsity is -1.0; it must lie between"),
    ("--sparsity nan", "sparsity is nan; it must lie between"),
    ("--sparsity inf", "sparsity is inf; it must lie between"),
    ("--sparsity abc", "--sparsity"),
    ("--sparsity 0.995", "sparsity 99.5% is out of reach: at most 99.4% of the blocks can be removed"),
    ("--sparsity 0.99 --widths uniform", "sparsity 99.0% is out of reach: at most"),
    ("--sparsity 0.9 --modules channels", "only channels may be removed"),
    (
        "--sparsity 0.5 --modules heads --widths uniform",
        "out of reach: at most 26.5% of the blocks can be removed; only heads",
    ),
    ("--recovery most", "recovery is 'most'; it must be one of refit, bias, none, paper"),
    ("--modules nonsense", "modules is 'nonsense'; give one or more of heads, channels, experts"),
    ("--modules heads,heads", "give one or more of heads, channels, experts"),
    ("--modules heads,", "give one or more of heads, channels, experts"),
    ("--blocks 0:9", "blocks is '0:9', but the model has 3 blocks (0:3)"),
    ("--blocks 7:", "but the model has 3 blocks (0:3)"),
    ("--blocks 2:1", "blocks is '2:1', which is empty or reversed; the end must be larger"),
    ("--blocks 1:1", "empty or reversed"),
    ("--blocks=-1:2", "blocks is '-1:2'; write first:end, for example 4:30"),
    ("--blocks some", "blocks is 'some'; write first:end"),
    (
        "--blocks 0:2 --widths uniform",
        "a stock class has one width for all 3 blocks, and only 0:2 are to be pruned; leave the block",
    ),
    ("--type q8_0", "type q8_0 goes with --format gguf: add that, or leave --type out"),
    ("--format gguf --type Q8_0", "type is 'Q8_0'; write it q8_0"),
    ("--samples 0", "samples is 0; it must be at least 1"),
    ("--samples -3", "samples is -3; it must be at least 1"),
    ("--samples many", "--samples"),
    ("--length 1", "length is 1; it must be at least 2"),
    (f"--length {POSITIONS + 1}", f"length is {POSITIONS + 1}, but the model has {POSITIONS} positions: take a smal"),
    ("--samples 4000", "text.txt: too short, it has 1,500 tokens, but 4,000 rows of 16 tokens need 64,000"),
    ("--seed -1", "seed is -1; it must lie between 0 and"),
    ("--seed 99999999999", "it must lie between 0 and"),
    ("--ridge -1", "ridge is -1.0; it must lie between 0 and 1,000,000, for example 0.3"),
    ("--effort most", "effort is 'most'; it must be one of quick, normal, best"),
    ("--ridge 1e39", "ridge is 1e+39; it must lie between 0 and 1,000,000, for example 0.3"),
    ("--round 0", "round is 0; it must be at least 1"),
    (
        "--round 96 --modules channels --widths uniform",
        "--round 96 leaves nothing to remove: the model has 72 channels",
    ),
    (
        "--criterion best",
        "must be one of surgeon, flap-wifv, flap-ifv, flap-wifn, l1, l2, llm-pruner-vector, llm-pruner-element1, ",
    ),
    ("--criterion similarity", "similarity needs a threshold: add --tau, for example 0.19"),
    ("--criterion similarity --tau 0.9", "tau is 0.9; it must be above 0 and at most ln 2 = 0.6931, for example 0.19"),
    ("--criterion similarity --tau 0.2 --dry-run", "found by running the model; leave out --dry-run"),
    (
        "--criterion heads=similarity,channels=l1 --tau 0.2 --dry-run",
        "similarity alone removes no channels: write heads=similarity+X",
    ),
    ("--criterion similarity --tau 0.2 --sparsity 0.2", "--tau and --sparsity both set how much to remove"),
    ("--criterion heads=l1", "criterion is 'heads=l1'; write a criterion for each as heads=X,channels=Y"),
    ("--tau 0.2", "tau is about similar heads: leave --tau out, or take --criterion similarity"),
    ("--recovery all", "recovery is 'all'; it must be one of refit, bias, none, paper"),
    ("--recover later", "recover is 'later'; it must be one of after, before, both"),
    ("--widths free", "widths is 'free', but there is no such file; or write adaptive or uniform"),
    ("--dtype int8", "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
    (
        "--recover both --recovery bias",
        "recover is of the paper's recovery: leave --recover out, or add --recovery paper",
    ),
    ("--recover before", "recover is of the paper's recovery: leave --recover out, or add --recovery paper"),
    (
        "--recovery bias --widths uniform",
        "the stock class of llama has no level-2 biases, which --recovery bias adds; leave it out, or take --format hf",
    ),
    ("--device nonsense", "device 'nonsense' is not available here; use --device auto or cpu"),
    ("--device meta", "device 'meta' computes nothing; use --device auto or cpu"),
    ("--revision main", "model: a local path has no revision 'main'; leave it out"),
    ("--calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    ("--calibration model/model.safetensors", "has an unknown extension: text is read from .txt and .jsonl files"),
    ("--frobnicate", "--frobnicate"),
    ("--sparsity", "--sparsity"),
    ("--target params=1", "target params=1 is out of reach: the smallest possible value is"),
    ("--target params=1 --widths uniform", "or allow more in --modules or --blocks"),
    ("--target bytes=1kB", "request bytes=50500, or allow more"),
    ("--target kv=50% --modules channels", "the modules that may be pruned do not change this quantity"),
    ("--target params=2G", "the dense model has no more than"),
    (
        "--target params=80pounds",
        "target 'params=80pounds': 'pounds' is not a unit of params (use K, M, G, B, %); write for exam",
    ),
    ("--target weight=3", "target 'weight=3': write one of params, active, bytes, kv, prefill, decode, ppl, then ="),
    ("--target prefill=2", "'' is not a unit of prefill (use x); write for example prefill=1.5x"),
    ("--target ppl=0.9x", "the ratio to the dense model's perplexity must be above 1x"),
    ("--target ppl=1.2x --dry-run", "the size for a target of perplexity is found by pruning; leave out --dry-run"),
    (
        "--sparsity 0.2 --target params=80%",
        "--sparsity and --target both set how much to remove; leave one of them out",
    ),
    ("--target params=80% --plan text.txt", "--target and --plan both set how much to remove"),
    ("--sparsity 0.2 --plan text.txt", "--sparsity and --plan both set how much to remove"),
    ("--plan text.txt --widths text.txt", "--plan and --widths text.txt both set how much to remove"),
    ("--plan missing.json", "plan is 'missing.json', but there is no such file"),
    ("--plan text.txt", "text.txt: not readable as JSON"),
    ("--plan model/config.json", "model/config.json: not a plan: 'blocks' must be a list"),
    ("--widths text.txt", "text.txt: not readable as JSON"),
    ("--widths model/config.json", "is not a range of blocks; write first:end within 0:3"),
    ("--format stock", "the stock format holds one width for all blocks: take --widths uniform, or --format hf"),
    ("--format onnx", "format is 'onnx'; it must be one of hf, stock, gguf"),
    ("--format gguf", "out: the file name must end in .gguf; rename it"),
    ("--sigma identity", "sigma is part of second-moment, not of surgeon: leave one of them out"),
    ("--sigma data --criterion wanda", "sigma is part of second-moment, not of wanda: leave one of them out"),
    ("--sigma some --criterion second-moment", "sigma is 'some'; it must be one of data, identity, random"),
    ("--refit-samples 0", "refit-samples is 0; it must be at least 1"),
    (
        "--refit-samples 4000",
        "text.txt: too short, it has 1,500 tokens, but 4,004 rows of 16 tokens need 64,064",
    ),
    ("--refit-samples 4000", "take refit-samples 89, or a longer text"),
    ("--refit-calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    (
        "--refit-samples 8 --recovery none",
        "with --recovery none nothing is fitted: leave --refit-samples and --refit-calib",
    ),
    ("--calibration self --length 65", "length is 65, but the model has 64 positions: take a smaller length"),
    ("--survey missing/survey.json", "missing does not exist; create it first"),
    ("--survey text.txt", "text.txt: not a survey by secateur; name another file, or delete it"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[row[0] for row in OPTIONS])
def test_a_wrong_option(options: str, message: str, place: Path, run: Run, no_work: None) -> None:
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, *options.split()), message)
    assert listing(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
def test_an_absent_device(place: Path, run: Run, no_work: None) -> None:
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, "--device", "cuda"), "device 'cuda' is not available here; use")
    refused(run("eval", "model", "--device", "cuda:7"), "device 'cuda:7' is not available here; use")
    assert listing(place) == before


def test_a_device_without_float64(place: Path, run: Run, no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs."""
    empty = torch.empty

    def narrow(*size: Any, dtype: torch.dtype = torch.float32, **how: Any) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return empty(*size, dtype=dtype, device="cpu")

    monkeypatch.setattr(torch, "empty", narrow)
    before = listing(place)
    message = "device 'mps' does not support float64, which sums need here; use --device cpu"
    refused(run("prune", "model", "out", *SMALL, "--device", "mps"), message)
    assert listing(place) == before


FILES: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "empty.txt is empty: give some text"),
    "blank.txt": (b"\n \n", "blank.txt holds no text: give some"),
    "short.txt": (b"w1 w2", "short.txt: too short, it has 2 tokens, but 4 rows of 16 tokens need 64"),
    "binary.txt": (b"MZ\x90\0\3", "binary.txt is not text: a NUL at byte 3; give UTF-8 text"),
    "latin.txt": (b"caf\xe9 w1", "latin.txt is not UTF-8: invalid byte at 3; convert it to UTF-8"),
    "bad.jsonl": (b'{"text": "w1"}\n\n{"text": ', "bad.jsonl line 3 is not JSON"),
    "key.jsonl": (b'{"content": "w1"}', "key.jsonl line 1 has neither text nor messages: add one of these keys"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "w1"}]}', "line 1: messages need a tokenizer with a"),
    "table.csv": (b"a,b", "table.csv has an unknown extension"),
}

NO_TEXTS = {
    "": "no text is named: give a .txt or .jsonl file, - or a data set",
    "model": "model is a folder without Parquet files: name a .txt or .jsonl file",
    "./model": "./model is a folder without Parquet files: name a .txt or .jsonl file",
    "./pipe": "./pipe is not a regular file: give - and pipe its text in",
    "/dev/null": "/dev/null is not a regular file: give - and pipe its text in",
}


@pytest.mark.parametrize("source", NO_TEXTS)
def test_what_is_no_text(source: str, place: Path, run: Run, no_work: None) -> None:
    os.mkfifo("pipe")
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, "--calibration", source), NO_TEXTS[source])
    assert listing(place) == before


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_text(name: str, place: Path, run: Run, no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.measure import evaluation

    data, message = FILES[name]
    Path(name).write_bytes(data)
    monkeypatch.setattr(evaluation, "load", lambda *_: pytest.fail("a model was loaded"))
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, "--calibration", name), message)
    refused(run("eval", "model", "--length", "16", "--perplexity", name), message.replace("4 x 16 need 64", "1 x 16"))
    assert listing(place) == before


def test_a_wrong_output(place: Path, run: Run, no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    (place / "link").symlink_to("model")
    (place / "here").mkdir()
    before = listing(place)
    for out, options, message in [
        ("full", [], "full: exists and is not empty; choose another name or add --over"),
        ("full", ["--overwrite"], "full: not overwritten, as it is no model folder"),
        ("model", ["--overwrite"], "model: this is the folder of MODEL, which would be replaced"),
        ("link", ["--overwrite"], "model: this is the folder of MODEL"),
        ("model/inner", [], "model/inner: this path is inside or around the folder of MODEL"),
        ("text.txt", [], "text.txt: a file with this name exists; choose another name"),
        ("missing/out", [], "missing does not exist; create it first"),
    ]:
        refused(run("prune", "model", out, *SMALL, *options), message)

    monkeypatch.chdir("here")
    refused(run("prune", "../model", ".", *SMALL, "--calibration", "random"), "here: this is the current folder")
    monkeypatch.chdir(place)

    def forbidden(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may write anywhere, so the system's answer is given here
        patch.setattr(Path, "mkdir", forbidden)
        refused(run("prune", "model", "out", *SMALL), "(Permission denied); choose another path")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda self: self.name == "out")
        refused(run("prune", "model", "out", *SMALL), "out: this is a mount point, which cannot be")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    refused(run("prune", "model", "out", *SMALL), "MB of disk space, but 0.0 MB are free; free some")
    refused(
        run("prune", "model", "o.gguf", *SMALL, "--format", "gguf"), "MB of disk space, but 0.0 MB are free; free some"
    )
    assert listing(place) == before


ARGUMENTS = [
    ("prune", "Missing argument 'MODEL'; see secateur prune --help"),
    ("prune model", "Missing argument 'OUT'; see secateur prune --help"),
    ("prune model out more", "more"),
    ("prun model out", "No such command 'prun'"),
    ("--frobnicate", "--frobnicate"),
    ("prune nowhere/at/all out", "nowhere/at/all: does not exist; name a folder, a .gguf file or a hub id"),
    ("prune ~no.such.user/model out", "~no.such.user/model: does not exist; name a folder, a .gguf file or a hub id"),
    ("prune model ~no.such.user/out", "~no.such.user does not exist; create it first"),
    ("eval model --perplexity ~no.such.user/text", "~no.such.user/text does not exist: check the path of the text"),
    ("prune text.txt out", "text.txt: a file, but no .gguf; name the model's folder"),
    ("prune model out.gguf", "out.gguf: a folder is to be written; add --format gguf, or name a folder"),
    ("prune model missing/out.gguf --format gguf", "missing does not exist; create it first"),
    ("prune model out.gguf --format gguf --type q3_k", "q3_k"),
    ("plan", "Missing argument 'MODEL'; see secateur plan --help"),
    ("plan nowhere/at/all", "nowhere/at/all: does not exist"),
    ("plan model --sparsity 0.2 --target params=80%", "--sparsity and --target both set how much to remove"),
    ("plan model --target params=1", "target params=1 is out of reach: the smallest possible value is"),
    ("plan model --target ppl=1.2x", "found by pruning; run secateur prune, whose secateur.json is a plan"),
    ("plan model --plan text.txt", "text.txt: not readable as JSON"),
    ("plan model --out missing/plan.json", "missing does not exist; create it first"),
    ("plan model --out model", "model: a folder with this name exists; choose another name"),
    ("plan model --out text.txt", "text.txt: exists; choose another name or add --overwrite"),
    ("survey model --out page --criterion similarity", "a survey needs a criterion that gives every unit a score"),
    ("sizes model", "Missing option '--out'; see secateur sizes --help"),
    ("sizes nowhere/at/all --out sizes", "nowhere/at/all: does not exist"),
    (
        "sizes model --out sizes --sparsities .1,x",
        "--sparsities is '.1,x'; write fractions separated by commas, for example .1,",
    ),
    ("sizes model --out sizes --sparsities .1,,.2", "write fractions separated by commas"),
    (
        "sizes model --out sizes --sparsities .1,.2,.1",
        "--sparsities is '.1,.2,.1', which has a number twice; write each",
    ),
    (
        "prune model out --calibration random --length 32 --samples 100000000000",
        "samples is 100,000,000,000: the token ids",
    ),
    ("prune model out --sparsity 1/4", "--sparsity is '1/4'; write a fraction such as 0.25 or 25%"),
    ("prune model out --sparsity 25", "sparsity is 25.0; it must lie between 0 and 1, for example 0.25"),
    ("prune model out --sparsity 0%", "sparsity is 0.0; it must lie between 0 and 1"),
    ("sizes model --out sizes --sparsities .1,2", "sparsity is 2.0; it must lie between 0 and 1"),
    ("sizes model --out sizes --sparsities .1,.999", "sparsity 99.9% is out of reach: at most"),
    (
        "sizes model --out sizes --sparsities .25,.25000001",
        "sparsity-0.25: two sizes would have one name; leave one of",
    ),
    ("sizes model --out no/sizes", "no does not exist; create it first"),
    ("sizes model --out sizes --widths text.txt", "for several sizes it must be one of adaptive, uniform"),
    ("sizes model --out sizes --tokens -1", "tokens is -1; it must be positive, or 0 for all"),
    ("sizes model --out sizes --perplexity missing.txt", "missing.txt does not exist: check the path of the text"),
    ("sizes model --out text.txt", "text.txt: a file is there; name a folder"),
    ("sizes model --out sizes --format gguf", "sizes writes folders: use --format hf, then run secateur export"),
    ("sizes model --out sizes --survey missing/survey.json", "missing does not exist; create it first"),
    ("sizes model --out sizes --survey sizes/sizes.json", "sizes does not exist; create it first"),
    ("prune model out --survey out", "out: the survey cannot be inside the output out"),
    (
        "prune model out --overwrite --survey out/s.json",
        "out/s.json: the survey cannot be inside the output out",
    ),
    ("plan model --survey a.json --out a.json", "a.json: the survey cannot be inside the output a.json"),
    ("sizes model --out sizes --format stock", "take --widths uniform, or --format hf"),
    ("prune model out --blocks " + "9" * 5000 + ":", "write first:end, for example 4:30"),
    ("export", "Missing argument 'DIR'; see secateur export --help"),
    ("export nowhere out.gguf", "nowhere: no folder with a config.json; name one that secateur prune wrote"),
    ("export model out", "out: the file name must end in .gguf; rename it"),
    ("retrain nowhere out --calibration text.txt", "nowhere: no folder with a config.json; name one that secateur"),
    ("retrain model out --rank -1", "rank is -1; it must be at least 0"),
    ("retrain model out --calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    ("eval", "Missing argument 'MODEL'; see secateur eval --help"),
    ("eval nowhere/at/all", "nowhere/at/all: does not exist"),
    ("eval model --against nowhere/at/all", "nowhere/at/all: does not exist"),
    ("eval model --perplexity missing.txt", "missing.txt does not exist: check the path of the text"),
    ("eval model --perplexity random", "random ids cannot be scored; name a text file or a data set"),
    ("eval model --perplexity text.txt --length 1", "length is 1; it must be at least 2"),
    ("eval model --perplexity text.txt --length 65", "length is 65, but the model has 64 positions"),
    ("eval model --perplexity text.txt --length 16 --tokens 15", "does not fill one row of length 16: take more"),
    ("eval model --tokens -1", "tokens is -1; it must be positive, or 0 for the whole text"),
    ("eval model --json missing/figures.json", "missing does not exist; create it first"),
    ("eval model --json model", "model: a folder with this name exists; choose another name"),
    ("eval model --json text.txt", "text.txt: exists; choose another name or add --overwrite"),
    ("retrain model out.gguf", "out.gguf: retrain writes a folder; name one, then export it with secateur"),
    ("eval model --dtype int8", "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[row[0] for row in ARGUMENTS])
def test_wrong_arguments(
    arguments: str, message: str, place: Path, run: Run, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.measure import evaluation

    monkeypatch.setattr(evaluation, "load", lambda *_: pytest.fail("a model was loaded"))
    before = listing(place)
    refused(run(*arguments.split()), message)
    assert listing(place) == before


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: CheckpointFolder) -> Path:
    """Folders, plans and surveys of other runs; not to be changed."""
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
    damaged = {"no-curve": "curves", "no-probe": "probes", "short": "curves"}
    for name, key in damaged.items():
        entries = [dict(entry) for entry in found[key]]
        if name == "short":
            entries[-1]["errors"] = entries[-1]["errors"][:-1]
        else:
            entries = [entry for entry in entries if (entry["block"], entry["kind"]) != (1, "channels")]
        (place / f"{name}.json").write_text(json.dumps({**found, key: entries}))
    found["curves"][0]["energy"] = float("nan")
    (place / "energy.json").write_text(json.dumps(found))
    plan = kept(place, "uniform")
    (place / "typo.json").write_text(json.dumps({"blocks": [{"block": 0, "head": [0, 1], "channels": [1]}]}))
    (place / "other.json").write_text(
        json.dumps({"blocks": [{**plan["blocks"][0], "width": {"kv_groups": 3, "heads_per_group": 2, "channels": 7}}]})
    )
    (place / "holes.json").write_text(json.dumps({"blocks": [plan["blocks"][0], plan["blocks"][2]]}))
    return place


@pytest.fixture
def made(place: Path, runs: Path) -> None:
    """What these runs have made, in the working folder."""
    shutil.copytree(runs, place, dirs_exist_ok=True)


WRONG_FILES = [
    (
        "prune mistral out --plan adaptive/secateur.json",
        "this plan was made for another model; remove 'fingerprint' to use it",
    ),
    ("prune gpt2 out --plan adaptive/secateur.json", "this plan was made for another model"),
    ("plan mistral --plan adaptive/secateur.json", "this plan was made for another model"),
    ("prune mistral out --survey survey.json", "survey.json: a survey of other weights; name another file to make"),
    ("plan mistral --survey survey.json", "survey.json: a survey of other weights"),
    ("sizes mistral --out sizes --survey survey.json", "survey.json: a survey of other weights"),
    ("prune model out --survey survey.json --criterion l2", "a survey with criterion surgeon instead of l2"),
    ("prune model out --survey adaptive/secateur.json", "not a survey by secateur"),
    (
        "prune model out --survey no-curve.json",
        "no-curve.json: this survey lacks widths of the channels of block 1; name",
    ),
    ("plan model --survey no-probe.json", "no-probe.json: this survey lacks widths of the channels of block 1; name"),
    (
        "sizes model --out sizes --survey short.json",
        "this survey lacks widths of the channels of block 2; name another",
    ),
    (
        "prune model out --plan adaptive/secateur.json --format stock",
        "holds one width for all blocks; take --format hf",
    ),
    ("prune model out --plan holes.json --format stock", "hf; the nearest that fits: --widths uniform --sparsity 0"),
    ("prune model out --widths first.json --format stock", "holds one width for all blocks; take --format hf"),
    ("prune model out --widths first.json --modules heads", "--modules and --widths first.json both set where"),
    (
        "prune model out --widths first.json --blocks 0:1",
        "--blocks and --widths first.json both set where to remove it; leave",
    ),
    ("prune model out --plan adaptive/secateur.json --widths uniform", "--plan and --widths uniform both set how much"),
    (
        "prune model out --plan typo.json",
        "typo.json: block 0: unknown key 'head'; use block, channels,",
    ),
    (
        "prune model out --plan other.json",
        "other.json: block 0: 'width' does not match the listed units",
    ),
    (
        "prune model out --survey energy.json",
        "energy.json: not a survey by secateur; name another file",
    ),
    (
        "prune model out --plan uniform/secateur.json --round 8",
        "--round and --plan both set where to remove it; leave one of",
    ),
    ("prune model out.gguf --format gguf", "the tokenizer is WordLevel; GGUF output holds byte-level BPE and"),
    (
        "prune gpt2 out.gguf --format gguf",
        "gpt2 has one width for all blocks, so prune all of them with uniform widths",
    ),
    ("prune gpt2 out.gguf --format gguf --target ppl=1.1x", "gpt2 has one width for all blocks, so prune all of them"),
    ("prune gpt2 out.gguf --format gguf --widths uniform --blocks 0:2 --dry-run", "gpt2 has one width for all blocks"),
    (
        "prune model out --widths uniform --target ppl=1.1x --blocks 0:1",
        "and only 0:1 are to be pruned; leave the block",
    ),
    (
        "prune model out --widths uniform --target ppl=1.1x --recovery bias",
        "has no level-2 biases, which --recovery bias",
    ),
    (
        "prune model out --widths uniform --target ppl=1.1x --modules channels --round 128",
        "--round 128 leaves nothing to remove: the model has 72 channels",
    ),
    ("prune gpt2 out.gguf --format gguf --plan gpt2-adaptive/secateur.json", "widths; the nearest that fits: --widths"),
    ("prune adaptive out", "can be evaluated but not pruned again; prune the dense model"),
    ("plan adaptive", "can be evaluated but not pruned again; prune the dense model"),
    ("export adaptive out.gguf", "adaptive: the tokenizer is WordLevel; GGUF output holds"),
    ("export gpt2-adaptive out.gguf", "uniform widths; the nearest that fits: prune again with --widths uniform --sp"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_FILES, ids=[row[0] for row in WRONG_FILES])
def test_files_that_do_not_belong(
    arguments: str, message: str, place: Path, run: Run, made: None, no_work: None
) -> None:
    before = listing(place)
    small = [] if arguments.startswith("export") else SMALL
    refused(run(*arguments.split(), *small), message)
    assert listing(place) == before


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_heads_that_a_stock_class_cannot_lose(
    name: str, run: Run, no_work: None, checkpoint_folder: CheckpointFolder, place: Path
) -> None:
    model, before = str(checkpoint_folder(name)), listing(place)
    for options in (["--modules", "heads"], ["--modules", "heads", "--sparsity", "0.9"]):
        result = run("prune", model, "out", *SMALL, "--widths", "uniform", *options)
        refused(result, f"{name} derives its head size from hidden_size / heads")
        assert "prune channels only" in result.err
    result = run("prune", model, "out", *SMALL, "--widths", "uniform", "--sparsity", "0.9")
    refused(result, "is out of reach: at most")
    assert listing(place) == before


def test_heads_that_no_format_can_lose_and_biases(
    run: Run, no_work: None, checkpoint_folder: CheckpointFolder, place: Path
) -> None:
    model, before = str(checkpoint_folder("olmo2")), listing(place)
    uniform = [*SMALL, "--widths", "uniform"]
    refused(run("prune", model, "out", *uniform, "--modules", "heads"), "norms run across all heads; prune channels")
    model = str(checkpoint_folder("mistral"))
    refused(
        run("prune", model, "out", *uniform, "--recovery", "bias"), "the stock class of mistral has no level-2 biases"
    )
    assert listing(place) == before


def test_a_hub_without_a_network(place: Path, run: Run, no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id, and a data set: told at once, not after minutes of retries."""
    import datasets

    from secateur.model import hub_source

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    monkeypatch.setattr(hub_source, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub_source.constants, "ENDPOINT", "http://127.0.0.1:9")
    before, start = listing(place), time.perf_counter()
    result = run("prune", "owner/name", "out", *SMALL)
    refused(result, "owner/name: no such folder, not in the cache, and http://127.0.0.1:9 does not answer; name a")
    result = run("prune", "model", "out", "--length", "64", "--calibration", "wikitext2")
    refused(result, "data set wikitext2 is not in the local cache, and http://127.0.0.1:9 does not answer: give a")
    assert time.perf_counter() - start < 15
    assert listing(place) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poor", "name"),
    [
        ({"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "model"),
        ({"PYTHONIOENCODING": "latin-1"}, "café"),
    ],
)
def test_a_poor_encoding_breaks_nothing(place: Path, poor: dict[str, str], name: str) -> None:
    """The bars of a plan, the lines of a prune and a name that is not ASCII."""
    (place / "model").rename(place / name)
    # Both commands in one process, which takes longer to import torch than to run them.
    code = (
        "import sys\n"
        "from secateur import cli\n"
        "at = sys.argv.index('then')\n"
        "for words in (sys.argv[1:at], sys.argv[at + 1 :]):\n"
        "    sys.argv = ['secateur', *words]\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as ended:\n"
        "        if ended.code:\n"
        "            raise\n"
        "    print('ended')\n"
    )
    asked = ["prune", name, "out", *SMALL, "--sparsity", "0.4", "--effort", "quick"]
    planned = ["plan", name, *SMALL, "--sparsity", "0.4"]
    command = [sys.executable, "-c", code, *asked, "then", *planned]
    result = subprocess.run(command, env=os.environ | poor, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    pruned, said, _ = result.stdout.split(b"ended\n")
    assert re.search(rb"attention *\|[1-8# ]{3}\|", pruned), pruned
    assert (place / "out" / "report.html").exists()
    assert b"###" in said


def test_a_mistake_in_a_real_process(place: Path) -> None:
    command = [sys.executable, "-m", "secateur", "prune", "model", "out", "--sparsity", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), "sparsity is 2.0; it must lie between 0 and 1")
    # Nowhere to say it.
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stdout, closed.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("tensor", "module"), [("self_attn.v_proj", "attention"), ("mlp.gate_proj", "feed-forward"), ("embed", "")]
)
def test_damaged_weights_are_located(tensor: str, module: str, place: Path, run: Run) -> None:
    file = place / "model" / "model.safetensors"
    weights = load_file(file)
    name = f"model.layers.1.{tensor}.weight" if module else "model.embed_tokens.weight"
    weights[name][:, 3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    before = listing(place)
    for options in ([], ["--modules", "channels"]):  # found by the survey, and by the first block that is pruned
        result = run("prune", "model", "out", *SMALL, *options)
        assert result.code == 2
        assert result.err.count("error: ") == 1
        last = result.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert "NaN or infinite activations" in last
        assert f"block {1 if module else 0}" in last
        assert module in last
    assert listing(place) == before


@pytest.fixture
def after_one_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Lets the work end with an exception once a block is through."""
    refit = fit_blocks.refit

    def arrange(error: BaseException) -> None:
        def one(*given: Any, **more: Any) -> Iterator[Any]:
            yield next(refit(*given, **more))
            raise error

        monkeypatch.setattr(fit_blocks, "refit", one)

    return arrange


@pytest.mark.parametrize("there", [False, True])
def test_interrupts_leave_nothing_behind(
    there: bool, place: Path, run: Run, after_one_block: Callable[[BaseException], None]
) -> None:
    if there:
        shutil.copytree(place / "model", place / "out")
    before = listing(place)
    after_one_block(KeyboardInterrupt())
    result = run("prune", "model", "out", *SMALL, *(["--overwrite"] if there else []))
    assert result.code == 130
    assert result.err.splitlines()[-1] == "interrupted: no partial output is left"
    assert apart_from_state(place) == before
    assert run("clean", "out").code == 0
    assert listing(place) == before


def test_a_full_disk_leaves_nothing_behind(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = shards.ShardWriter.add

    def full(writer: shards.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if "layers.1." in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(writer, name, tensor)

    before = listing(place)
    monkeypatch.setattr(shards.ShardWriter, "add", full)
    result = run("prune", "model", "out", *SMALL)
    assert result.code == 2
    assert (
        "out: the disk is full; free some space and run the same command again (the run will resume)"
        in result.err.splitlines()[-1]
    )
    assert apart_from_state(place) == before
    gc.collect()
    assert capsys.readouterr() == ("", "")  # no bar is drawn late


def test_files_that_may_not_be_read(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, no_work: None) -> None:
    from secateur.model import checkpoint

    def forbidden(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr(checkpoint, "list_tensors", forbidden)
    refused(run("prune", "model", "out", *SMALL), "model/model.safetensors: Permission denied; check the path")


def test_prune_writes_a_model_and_says_what_it_did(place: Path, run: Run) -> None:
    result = run("prune", "model", "out", *SMALL)
    assert result.code == 0
    notes = result.err.splitlines()
    counted = sum(tensor.numel() for tensor in load_file(place / "model" / "model.safetensors").values())
    assert notes[0] == f"Opened model: llama, 3 blocks, {counted:,} parameters, float32"
    assert f"{counted:,}" in next(line for line in result.out.splitlines() if "parameters" in line)
    assert notes[1].startswith("Calibrating on 4 rows of 16 tokens; computing on ")
    assert [line.split()[0] for line in notes[2:]] == ["Resample", "Draw", "Survey", "Price", "Keeping", "Prune"]
    assert "of 18 query heads (" in notes[6]
    assert "estimated loss increase: " in notes[6]
    for words in ("parameters", "weights on disk", "KV cache per token", "KV groups", "channels", "peak memory"):
        assert words in result.out
    assert "Calibrated on 64 tokens; rows begin without BOS" in result.out
    assert "Written to out" in result.out
    assert "Note:" not in result.out
    assert {"config.json", "model.safetensors", "secateur.json", "timings.json", "tokenizer.json"} <= {
        file.name for file in (place / "out").iterdir()
    }
    # Nothing hidden is left beside it.
    assert {file.name for file in place.iterdir()} == {"model", "text.txt", "out"}


def kept(place: Path, name: str = "out") -> dict[str, Any]:
    record: dict[str, Any] = json.loads((place / name / "secateur.json").read_text())
    return record


def test_a_dry_run_writes_nothing(place: Path, run: Run, no_work: None) -> None:
    before = listing(place)
    result = run("prune", "model", "out", *SMALL, "--dry-run")
    assert result.code == 0
    assert "Expected" in result.out
    for words in (
        "parameters",
        "weights on disk",
        "KV cache per token",
        " s and ",
        " GB of memory",
        "Nothing was written",
    ):
        assert words in result.out
    assert listing(place) == before


def test_rounding(place: Path, run: Run) -> None:
    assert run("prune", "model", "rounded", *SMALL, "--round", "8").code == 0
    assert kept(place, "rounded")["blocks"][0]["width"]["channels"] % 8 == 0


def test_a_target_that_widths_cannot_meet_is_said(place: Path, run: Run) -> None:
    result = run("prune", "model", "out", *SMALL, "--modules", "heads", "--sparsity", "0.2")
    assert result.code == 0
    record = kept(place)["sparsity"]
    assert abs(record["reached"] - record["wanted"]) > 0.005
    assert record["note"] in result.out
    assert "Note: " in result.out
    assert "instead of 20.0%" in " ".join(result.out.split())


def test_other_dtypes(place: Path, run: Run) -> None:
    assert run("prune", "model", "half", *SMALL, "--dtype", "bfloat16").code == 0
    assert {t.dtype for t in load_file(place / "half" / "model.safetensors").values()} == {torch.bfloat16}
    again = ["--sparsity", "0.1", "--dtype", "float32"]
    refused(run("prune", "half", "again", *SMALL, *again), "can be evaluated but not pruned again; prune the dense")
    assert run("prune", "model", "half", *SMALL, "--dtype", "bfloat16", "--widths", "uniform", "--overwrite").code == 0
    assert run("prune", "half", "again", *SMALL, *again).code == 0
    assert {t.dtype for t in load_file(place / "again" / "model.safetensors").values()} == {torch.float32}


def test_overwriting(place: Path, run: Run) -> None:
    assert run("prune", "model", "out", *SMALL, "--criterion", "l1").code == 0
    refused(run("prune", "model", "out", *SMALL), "exists and is not empty")
    assert kept(place)["options"]["criterion"] == "l1"
    assert run("prune", "model", "out", *SMALL, "--criterion", "l2", "--overwrite").code == 0
    assert kept(place)["options"]["criterion"] == "l2"
    assert {file.name for file in place.iterdir()} == {"model", "text.txt", "out"}


def test_similar_heads(place: Path, run: Run) -> None:
    arguments = [*SMALL, "--criterion", "similarity", "--tau"]
    result = run("prune", "model", "out", *arguments, "0.15")
    assert result.code == 0, result
    found = kept(place)["similarity"]
    assert found["tau"] == 0.15
    assert f"Note: tau {found['tau']:.4g} finds " in result.out
    assert "of the attention's parameters" in " ".join(result.out.split())
    result = run("plan", "model", *arguments, str(found["tau"]), "--out", "plan.json")
    assert result.code == 0, result
    written = json.loads((place / "plan.json").read_text())["blocks"]
    assert [block["heads"] for block in written] == [block["heads"] for block in kept(place)["blocks"]]


def test_sources_of_calibration_text(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words out of a file, a pipe and .jsonl give the same model."""
    lines = [json.dumps({"text": TEXT}), ""]
    (place / "text.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    weights = []
    for name, source in (("a", "text.txt"), ("b", "text.jsonl"), ("c", "-"), ("d", "random")):
        assert run("prune", "model", name, *SMALL, "--calibration", source, "--modules", "channels").code == 0
        weights.append((place / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2] != weights[3]


def test_plan_shows_what_prune_does(place: Path, run: Run) -> None:
    before = listing(place)
    result = run("plan", "model", *SMALL, "--sparsity", "0.4")
    assert result.code == 0, result.err
    assert listing(place) == before
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert "40." in result.out.partition("% of the blocks' parameters are removed")[0][-6:]
    assert "Expected to cost" in result.out
    part = run("plan", "model", *SMALL, "--sparsity", "0.4", "--blocks", "1:2")
    assert "% of the parameters of blocks 1:2 go: " in part.out
    result = run("plan", "model", *SMALL, "--sparsity", "0.4", "--out", "plan.json", "--survey", "survey.json")
    assert "Written to plan.json; prune with --plan plan.json" in result.out
    assert run("prune", "model", "planned", *SMALL, "--plan", "plan.json").code == 0
    assert run("prune", "model", "direct", *SMALL, "--sparsity", "0.4", "--survey", "survey.json").code == 0
    written = [(place / name / "model.safetensors").read_bytes() for name in ("planned", "direct")]
    assert written[0] == written[1]
    for row, block in zip(rows, kept(place, "direct")["blocks"], strict=True):
        groups, heads, channels = (int(cell.split("/")[0]) for cell in row[1:4])
        assert (groups * heads, channels) == (len(block["heads"]), len(block["channels"]))
        assert groups == block["width"]["kv_groups"]
    drawn = run("plan", "model", *SMALL, "--plan", "direct/secateur.json")
    assert [line for line in drawn.out.splitlines() if "│" in line] == [
        line for line in result.out.splitlines() if "│" in line
    ]


def test_sizes_draws_a_curve(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine takes long enough to say where the time went.
    monkeypatch.setattr(bars.Bars, "times", lambda _: "")
    arguments = ["sizes", "model", "--out", "sizes", *SMALL, "--sparsities", ".5,.2", "--perplexity", "text.txt"]
    result = run(*arguments)
    assert result.code == 0, result.err
    assert "sizes.json and sizes.png are in sizes" in result.out
    shares = [line.split("│")[2].strip() for line in result.out.splitlines() if line.count("│") > 4]
    assert [float(share[:-1]) for share in shares] == pytest.approx([0, 20, 50], abs=1)
    names = {"sparsity-0.2", "sparsity-0.5", "sizes.json", "sizes.png", "survey.json"}
    assert {file.name for file in (place / "sizes").iterdir()} == names
    # The same again makes nothing; after a loss only what is missing, to the byte.
    written = (place / "sizes" / "sparsity-0.2" / "model.safetensors").read_bytes()
    stamps = [(place / "sizes" / f"sparsity-{share}").stat().st_mtime_ns for share in ("0.2", "0.5")]
    shutil.rmtree(place / "sizes" / "sparsity-0.2")
    again = run(*arguments)
    assert again.code == 0, again.err
    assert again.out == result.out
    assert "sizes/sparsity-0.5: already finished" in again.err
    assert (place / "sizes" / "sparsity-0.5").stat().st_mtime_ns == stamps[1]
    assert (place / "sizes" / "sparsity-0.2").stat().st_mtime_ns > stamps[0]
    assert (place / "sizes" / "sparsity-0.2" / "model.safetensors").read_bytes() == written
    said = "error: sizes/sparsity-0.2: made with other options, weights or another text; add --overwrite to replace it"
    other = run(*arguments, "--seed", "1")
    assert (other.code, other.err.splitlines()[-1]) == (2, said)
    (place / "text.txt").write_text(TEXT[::-1])
    other = run(*arguments)
    assert (other.code, other.err.splitlines()[-1]) == (2, said)
    before = listing(place)
    short = run(*arguments, "--overwrite", "--tokens", "5")
    assert short.code == 2
    assert short.err.splitlines()[-1].startswith("error: tokens is 5, which does not fill one row of length")
    assert listing(place) == before
    assert run(*arguments, "--overwrite").code == 0


def test_retrain(place: Path, run: Run) -> None:
    assert run("prune", "model", "pruned", *SMALL).code == 0
    result = run("retrain", "pruned", "out", *SMALL, "--epochs", "1", "--batch", "2", "--device", "cpu")
    assert result.code == 0
    assert result.out.count("\n") == 1
    assert result.out.startswith("Perplexity on held-out rows: ")
    assert "Retrain" in result.err
    assert "Retrain 2 of 2" in result.err
    assert kept(place)["retrained"][0]["steps"] == 2


def test_gguf_out_of_the_command(place: Path, run: Run) -> None:
    """In one step, or by way of a folder; the weights are the same."""
    make_letters().save_pretrained(place / "model")
    (place / "text.txt").write_text("A plan of widths, block by block. " * 40)
    result = run("prune", "model", "out.gguf", *SMALL, "--format", "gguf")
    assert result.code == 0, result.err
    assert "Run it: llama-cli -m out.gguf" in result.out
    assert run("prune", "model", "folder", *SMALL).code == 0
    assert "llama.cpp architecture " in run("export", "folder", "again.gguf").out
    assert {file.name for file in place.iterdir()} == {"model", "text.txt", "out.gguf", "folder", "again.gguf"}
    # The names inside differ, as they are the files'.
    sizes = [(place / name).stat().st_size for name in ("out.gguf", "again.gguf")]
    assert abs(sizes[0] - sizes[1]) < 64


def test_eval_side_by_side(place: Path, run: Run) -> None:
    assert run("prune", "model", "out", *SMALL, "--modules", "channels").code == 0
    result = run(
        *("eval", "out", "--against", "model", "--perplexity", "text.txt", "--perplexity", str(place / "text.txt")),
        *("--length", "16", "--tokens", "640", "--speed", "--json", "figures.json"),
    )
    assert result.code == 0, result.err
    figures = json.loads((place / "figures.json").read_text())
    small, dense = figures["models"]
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in result.out.splitlines()
        if "│" in line
    }
    assert rows["parameters"][:2] == [f"{small['parameters']:,}", f"{dense['parameters']:,}"]
    assert float(rows["parameters"][2]) == pytest.approx(small["parameters"] / dense["parameters"], abs=6e-4)
    scores = [model["texts"]["text.txt"] for model in (small, dense)]
    assert rows["perplexity text.txt"][:2] == [f"{score['perplexity']:,.3f}" for score in scores]
    assert float(rows["perplexity text.txt"][2]) == pytest.approx(
        scores[0]["perplexity"] / scores[1]["perplexity"], abs=6e-4
    )
    assert small["texts"]["text.txt"]["tokens"] == 40 * 15
    assert {"prefill tokens/s", "decoding tokens/s"} < set(rows)
    assert rows["prefill tokens/s"][2] == f"{figures['speed_ratios'][0]:.3f}"
    assert result.out.count("text.txt: 600 tokens scored in 40 rows of 16; rows begin without BOS") == 2
    assert "Speed: a prompt of 48, then 16 new tokens" in result.out


def test_eval_of_two_models_on_one_pipe(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    result = run("eval", "model", "--against", "model", "--perplexity", "-", "--length", "16", "--tokens", "64")
    assert result.code == 0
    assert "1.000" in next(line for line in result.out.splitlines() if "perplexity" in line)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("asked", ["families", "--help"])
def test_standard_output_on_a_full_device(asked: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "secateur", asked]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: standard output: the device is full")
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_standard_error_on_a_full_device(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be said is lost; the work, its results and the exit code are not."""
    command = ["eval", "model", "--perplexity", "text.txt", "--length", "16", "--tokens", "64", "--json", "-"]
    plain = run(*command)
    with suppress(OSError), Path("/dev/full").open("w") as full:
        for name in ("stderr", "__stderr__"):
            monkeypatch.setattr(sys, name, full)
        found, wrong = run(*command), run("eval", "nowhere/at/all")
    assert plain.err
    assert (found.code, found.out) == (plain.code, plain.out)
    assert found.code == 0
    assert (wrong.code, wrong.out) == (2, "")


def test_a_user_without_a_home(
    place: Path, run: Run, no_work: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refused(run("prune", "m.gguf", "out", *SMALL), "no home folder for a cache; set XDG_CACHE_HOME to a folder")
    logging.getLogger("matplotlib").warning("a temporary cache directory was made")
    assert capsys.readouterr().err == ""


def test_standard_input_that_is_closed(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, no_work: None) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    result = run("prune", "model", "out", *SMALL, "--calibration", "-")
    assert (result.code, result.err.splitlines()[-1]) == (
        2,
        "error: standard input is closed: pipe a text in, or name a file",
    )


def test_random_ids_need_no_tokenizer(place: Path, run: Run) -> None:
    no_tokenizer(place / "model", lambda _: place)
    assert run("prune", "model", "out", *SMALL, "--calibration", "random", "--effort", "quick").code == 0
    gguf = ["--calibration", "random", "--format", "gguf"]
    refused(run("prune", "model", "o.gguf", *SMALL, *gguf), "model: no tokenizer files; copy the model's into the fold")


def test_an_interrupt_in_the_middle_of_imports() -> None:
    """A library that is being imported would make a crash of it; no trace of that is to be seen."""
    code = (
        "import os, signal, sys\n"
        # Whoever runs the tests in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "library, number = sys.argv[1], int(sys.argv[2])\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == library:\n"
        "            os.kill(os.getpid(), number)\n"
        "            sum(range(1000))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from secateur import cli\n"
        "sys.argv = ['secateur', 'families']\n"
        "cli.main()\n"
    )
    for name, number, ended in (("typer", signal.SIGINT, -signal.SIGINT), ("torch", signal.SIGTERM, 130)):
        command = [sys.executable, "-c", code, name, str(int(number))]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (ended, "")
        assert result.stderr == ("interrupted: no partial output is left\n" if ended > 0 else "")


def test_eval_with_nothing_to_do_prints_sizes(place: Path, run: Run) -> None:
    no_tokenizer(place / "model", lambda _: place)
    result = run("eval", "model")
    assert result.code == 0
    assert "64,464" in result.out
    assert "perplexity" not in result.out
    assert "tokens/s" not in result.out


def test_bos_is_said(place: Path, run: Run) -> None:
    make_tokenizer(bos=True).save_pretrained(place / "model")
    assert "rows begin with BOS." in run("prune", "model", "out", *SMALL, "--modules", "channels").out
    assert kept(place)["calibration"]["begins_with_bos"]
    assert "rows begin with BOS." in run("eval", "out", "--perplexity", "text.txt", "--length", "16").out


def test_version_and_help(run: Run) -> None:
    import secateur

    assert run("--version") == (0, f"secateur {secateur.__version__}\n", "")
    for arguments in ([], ["--help"], ["-h"]):
        result = run(*arguments)
        assert result.code == 0
        commands = re.findall("^│ ([a-z]+)", result.out, flags=re.MULTILINE)
        wanted = "prune export retrain plan survey sizes eval doctor compare clean families"
        assert commands == wanted.split()
    text = run("prune", "--help").out
    target = "sparsity target plan blocks modules widths round"
    method = "criterion recovery recover ridge effort"
    rows = "calibration samples length refit-calibration refit-samples seed"
    other = "device revision trust-remote-code dtype format type survey dry-run overwrite restart memory family"
    for option in f"{target} {method} tau sigma {rows} {other}".split():
        assert f"--{option} " in text
    panels = ("Target", "Method", "Calibration", "Output", "Computing", "Messages", "The paper's variants")
    assert re.findall("─ ([A-Z][\\w' ]+) ─", text)[2:] == list(panels)
    text = run("eval", "--help").out
    options = "perplexity length tokens speed against json device dtype revision trust-remote-code"
    for option in options.split():
        assert f"--{option} " in text


def test_every_command_speaks_as_it_is_asked(run: Run) -> None:
    for command in re.findall("^│ ([a-z]+)", run("--help").out, flags=re.MULTILINE):
        text = run(command, "--help").out
        assert all(f"--{option} " in text for option in ("json", "quiet", "verbose")), command


def test_results_as_json(place: Path, run: Run) -> None:
    result = run("prune", "model", "out", *SMALL, "--json", "-", "--quiet")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["out"] == "out"
    record = json.loads((place / "out" / "secateur.json").read_text())
    assert found["parameters"] == record["sizes"]["parameters"]
    assert list(found["widths"].values()) == [block["width"] for block in record["blocks"]]
    assert run("families", "--json", "families.json").out
    families = json.loads((place / "families.json").read_text())
    assert {family["name"] for family in families} == set(FAMILIES)
    plan = json.loads(run("plan", "model", *SMALL, "--json", "-").out)
    assert plan["sparsity"]["reached"] > 0
    (model,) = json.loads(run("eval", "out", "--json", "-").out)["models"]
    assert model["parameters"] == found["parameters"][1]
    assert json.loads(run("clean", "out", "--json", "-").out) == {"removed": []}
    assert "families.json: exists" in run("families", "--json", "families.json").err


def test_more_is_said_where_that_is_wanted(place: Path, run: Run) -> None:
    few, many = (run("plan", "missing", *SMALL, *more) for more in ([], ["--verbose"]))
    assert few.code == many.code == 2
    assert few.err.count("\n") == 1
    assert "Traceback" in many.err
    assert many.err.splitlines()[-1] == few.err.strip()


def test_shells_complete_names() -> None:
    for words, wanted in (("secateur pr", "prune"), ("secateur prune --crit", "--criterion")):
        asked = {"_SECATEUR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "secateur"]
        result = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)
        assert result.stdout.split() == [wanted]


def test_help_is_quick() -> None:
    code = (
        "import sys; sys.argv = ['secateur', 'prune', '--help']\n"
        "from secateur.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("out", "left"),
    [
        ("out", ".out.partial-1a"),
        ("o.gguf", ".o.gguf.partial-1a"),
        ("o.gguf", ".o.gguf.folder-2b"),
        ("o.gguf", "..o.gguf.folder-2b.partial-1a"),
    ],
)
def test_what_a_killed_run_has_left(out: str, left: str, place: Path, run: Run, no_work: None) -> None:
    """It is named ahead of anything else; another target's is not."""
    for name in (left, f".other-{left}"):
        (place / name).mkdir()
    result = run("prune", "model", out, *SMALL, "--blocks", "9:12", *(["--format", "gguf"] if "." in out else []))
    assert [line for line in result.err.splitlines() if "left by" in line] == [
        f"{left}: left by a run that was killed; delete it, unless another run is writing it now"
    ]


def test_a_full_disk(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when the figures are written."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = listing(place)
    result = run("eval", "model", "--json", "figures.json")
    assert result.code == 2
    assert (
        result.err.splitlines()[-1]
        == "error: figures.json: the disk is full; free some space and run the same command again (nothing was written)"
    )
    assert listing(place) == before


@pytest.mark.slow
def test_a_polite_kill_cleans_up(place: Path) -> None:
    """In the middle of the work, in a real process; a terminal that is closed sends SIGHUP."""
    code = (
        "import os, signal, sys\n"
        "from secateur import cli\n"
        "from secateur.commands import fit_blocks\n"
        # Under nohup it is ignored, and stays so.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "refit = fit_blocks.refit\n"
        "sys.argv = ['secateur', *sys.argv[1:]]\n"
        "for number in (signal.SIGTERM, signal.SIGHUP):\n"
        "    def one(*given, **more):\n"
        "        yield next(refit(*given, **more))\n"
        "        os.kill(os.getpid(), number)\n"
        "        signal.pause()\n"
        "    fit_blocks.refit = one\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as ended:\n"
        "        print('ended', ended.code)\n"
    )
    before = listing(place)
    arguments = ["prune", "model", "out", *SMALL]
    # Beside that, not even root can write into this home.
    home = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "HF_HOME": "/dev/null/hub"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | home, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.count("ended 130") == 2, result.stdout
    assert result.stderr.splitlines()[-1] == "interrupted: no partial output is left"
    assert apart_from_state(place) == before
