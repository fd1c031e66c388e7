"""Wrong options and arguments are refused in one line, before any work."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from command_line import SMALL, Result, listing, refused

from models import POSITIONS
from secateur.base.errors import SecateurError
from secateur.base.options import cli_name, option_specs
from secateur.commands.options import Options

OPTIONS: list[tuple[str, str]] = [
    ("--sparsity 0", "sparsity is 0.0; it must lie between 0 and 1, for example 0.25"),
    ("--sparsity 1", "sparsity is 1.0; it must lie between"),
    ("--sparsity nan", "sparsity is nan; it must lie between"),
    ("--sparsity 0.9999", "sparsity 100.0% is out of reach: at most 99.4% of the blocks' parameters can be removed"),
    ("--sparsity 0.99 --widths uniform", "sparsity 99.0% is out of reach: at most"),
    ("--sparsity 0.9 --modules channels", "only channels may be removed"),
    ("--sparsity 0.5 --modules heads --widths uniform", "26.5% of the blocks' parameters can be removed; only heads"),
    ("--modules nonsense", "modules is 'nonsense'; give one or more of heads, channels, experts"),
    ("--modules heads,heads", "give one or more of heads, channels, experts"),
    ("--blocks 0:9", "blocks is '0:9', but the model has 3 blocks (0:3)"),
    ("--blocks 7:", "but the model has 3 blocks (0:3)"),
    ("--blocks 1:1", "blocks is '1:1', which is empty or reversed; the end must be larger"),
    ("--blocks=-1:2", "blocks is '-1:2'; write first:end, for example 4:30"),
    ("--blocks 0:2 --widths uniform", "a stock class has one width for all 3 blocks, and only 0:2 are to be pruned;"),
    ("--type q8_0", "type q8_0 is only for --format gguf: add that, or leave --type out"),
    ("--format gguf --type Q8_0", "type is 'Q8_0'; write it q8_0"),
    ("--samples 0", "samples is 0; it must be at least 1"),
    ("--samples many", "Invalid value for '--samples'"),
    (f"--length {POSITIONS + 1}", f"length is {POSITIONS + 1}, but the model has only {POSITIONS} positions: choose"),
    ("--samples 4000", "text.txt: too short, it has 1,500 tokens, but 4,000 rows of 16 tokens need 64,000"),
    ("--seed -1", "seed is -1; it must lie between 0 and"),
    ("--seed 99999999999", "it must lie between 0 and"),
    ("--ridge -1", "ridge is -1.0; it must lie between 0 and 1,000,000, for example 0.3"),
    ("--ridge 1e39", "ridge is 1e+39; it must lie between 0 and 1,000,000, for example 0.3"),
    ("--round 96 --modules channels --widths uniform", "--round 96 leaves nothing to remove: the model has 72"),
    ("--criterion best", "must be one of surgeon, flap-wifv, flap-ifv, flap-wifn, l1, l2, llm-pruner-vector,"),
    ("--criterion similarity --tau 0.2 --dry-run", "because it runs the model; leave out --dry-run"),
    ("--tau 0.2", "tau is an option of --criterion similarity: add that, or leave --tau out"),
    ("--widths free", "widths is 'free', but there is no such file; check the path, or write"),
    ("--recover both --recovery bias", "recover is an option of --recovery paper: leave --recover out"),
    ("--recovery bias --widths uniform", "the stock class of llama has no biases of output projections, which"),
    ("--device nonsense", "device 'nonsense' is not available here; use --device auto or cpu"),
    ("--device meta", "device 'meta' computes nothing; use --device auto or cpu"),
    ("--revision main", "model: a local path has no revision 'main'; leave it out"),
    ("--calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    ("--calibration model/model.safetensors", "has an unknown extension: text is read from .txt and .jsonl files"),
    ("--frobnicate", "--frobnicate"),
    ("--target params=1", "target params=1 is out of reach: the smallest possible value is"),
    ("--target params=1 --widths uniform", "or allow more in --modules or --blocks"),
    ("--target bytes=1kB", "request bytes=50500, or allow more"),
    ("--target kv=50% --modules channels", "the modules that may be pruned do not change this quantity"),
    ("--target params=2G", "the dense model has no more than"),
    ("--target ppl=1.2x --dry-run", "because it prunes to several sizes; leave out --dry-run"),
    ("--sparsity 0.2 --target params=80%", "--sparsity and --target both set how much to remove; leave one of them"),
    ("--target params=80% --plan text.txt", "--target and --plan both set how much to remove"),
    ("--sparsity 0.2 --plan text.txt", "--sparsity and --plan both set how much to remove"),
    ("--plan text.txt --widths text.txt", "--plan and --widths text.txt both set how much to remove"),
    ("--plan missing.json", "plan is 'missing.json', but there is no such file; check the path"),
    ("--plan text.txt", "text.txt: not readable as JSON"),
    ("--plan model/config.json", "model/config.json: not a plan: 'blocks' must be a list"),
    ("--widths text.txt", "text.txt: not readable as JSON"),
    ("--widths model/config.json", "is not a range of blocks; write first:end within 0:3"),
    ("--format stock", "the stock format holds one width for all blocks: use --widths uniform, or --format hf"),
    ("--format gguf", "out: the file name must end in .gguf; rename it"),
    ("--sigma identity", "sigma is an option of --criterion second-moment, not of surgeon: leave --sigma out"),
    ("--refit-samples 4000", "text.txt: too short, it has 1,500 tokens, but 4,004 rows of 16 tokens need 64,064"),
    ("--refit-calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    ("--refit-samples 8 --recovery none", "--recovery none fits nothing: leave --refit-samples and --refit-calib"),
    (
        "--calibration self --length 65",
        "length is 65, but the model has only 64 positions: choose a length of at most 64",
    ),
    ("--survey missing/survey.json", "missing does not exist; create it first"),
    ("--survey text.txt", "text.txt: not a survey by secateur; name another file, or delete it"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[row[0] for row in OPTIONS])
def test_a_wrong_option_is_refused_before_any_work(options, message, place, run, no_work):
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, *options.split()), message)
    assert listing(place) == before


@pytest.mark.parametrize("name", [name for name, spec in option_specs(Options).items() if spec.choices])
def test_a_value_that_is_not_a_choice_is_refused(name):
    choices = ", ".join(option_specs(Options)[name].choices)
    with pytest.raises(SecateurError, match=f"{name} is 'other'; it must be one of {re.escape(choices)}"):
        Options(**{name: "other"})


@pytest.mark.parametrize("name", [name for name, spec in option_specs(Options).items() if spec.minimum is not None])
def test_a_number_below_the_minimum_is_refused(name):
    minimum = option_specs(Options)[name].minimum or 0
    with pytest.raises(SecateurError, match=f"{cli_name(name)} is {minimum - 1}; it must be at least {minimum}"):
        Options(**{name: minimum - 1})


ARGUMENTS = [
    ("prune", "Missing argument 'MODEL'; see secateur prune --help"),
    ("prune model", "Missing argument 'OUT'; see secateur prune --help"),
    ("prune model out more", "more"),
    ("prun model out", "No such command 'prun'"),
    ("prune nowhere/at/all out", "nowhere/at/all: does not exist; name a folder, a .gguf file or a hub id"),
    ("prune ~no.such.user/model out", "~no.such.user/model: does not exist; name a folder, a .gguf file or a hub id"),
    ("prune model ~no.such.user/out", "~no.such.user does not exist; create it first"),
    ("prune text.txt out", "text.txt: this file is not a .gguf file; name the model's folder"),
    ("prune model out.gguf", "out.gguf: the format hf writes a folder; add --format gguf, or leave out .gguf"),
    ("prune model missing/out.gguf --format gguf", "missing does not exist; create it first"),
    ("prune model out.gguf --format gguf --type q3_k", "q3_k"),
    ("plan nowhere/at/all", "nowhere/at/all: does not exist"),
    ("plan model --target ppl=1.2x", "only secateur prune can reach a target of perplexity, because it prunes to"),
    ("plan model --out missing/plan.json", "missing does not exist; create it first"),
    ("plan model --out model", "model: a folder with this name exists; choose another name"),
    ("plan model --out text.txt", "text.txt: exists; choose another name or add --overwrite"),
    ("survey model --out page --criterion similarity", "a survey needs a criterion that gives every unit a score"),
    ("survey nowhere/at/all", "nowhere/at/all: does not exist; name a folder"),
    ("survey model --out full", "full: exists and is not empty; choose another name or add --over"),
    ("survey model --out full --overwrite", "full: not overwritten, because it contains other files (thesis.tex); "),
    ("sizes model", "Missing option '--out'; see secateur sizes --help"),
    ("sizes nowhere/at/all --out sizes", "nowhere/at/all: does not exist"),
    ("sizes model --out sizes --sparsities .1,x", "--sparsities is '.1,x'; write fractions separated by commas, for"),
    ("sizes model --out sizes --sparsities .1,.2,.1", "--sparsities is '.1,.2,.1', which contains a number twice;"),
    ("prune model out --calibration random --length 32 --samples 100000000000", "samples is 100,000,000,000"),
    ("prune model out --sparsity 1/4", "--sparsity is '1/4'; write a fraction such as 0.25 or 25%"),
    ("prune model out --sparsity 25", "sparsity is 25.0; it must lie between 0 and 1, for example 0.25"),
    ("sizes model --out sizes --sparsities .1,2", "sparsity is 2.0; it must lie between 0 and 1"),
    ("sizes model --out sizes --sparsities .1,.9999", "sparsity 100.0% is out of reach: at most"),
    ("sizes model --out sizes --sparsities .25,.25000001", "sparsity-0.25: two sizes would have the same name; leave"),
    ("sizes model --out sizes --widths text.txt", "for several sizes it must be one of adaptive, uniform"),
    ("sizes model --out sizes --tokens -1", "Invalid value for '--tokens'"),
    ("sizes model --out sizes --perplexity missing.txt", "missing.txt does not exist: check the path of the text"),
    ("sizes model --out text.txt", "text.txt: a file with this name exists; choose another name"),
    ("sizes model --out sizes --format gguf", "sizes writes folders: use --format hf, then run secateur export"),
    ("sizes model --out sizes --survey sizes/sizes.json", "sizes does not exist; create it first"),
    ("prune model out --survey out", "out: the survey cannot be inside the output out"),
    ("prune model out --overwrite --survey out/s.json", "out/s.json: the survey cannot be inside the output out"),
    ("plan model --survey a.json --out a.json", "a.json: the survey cannot be inside the output a.json"),
    ("sizes model --out sizes --format stock", "use --widths uniform, or --format hf"),
    ("prune model out --blocks " + "9" * 5000 + ":", "write first:end, for example 4:30"),
    ("export nowhere out.gguf", "nowhere: not a folder with a config.json; name a folder that secateur prune wrote"),
    ("export model out", "out: the file name must end in .gguf; rename it"),
    (
        "retrain nowhere out --calibration text.txt",
        "nowhere: not a folder with a config.json; name a folder that secateur",
    ),
    ("retrain model out --rank -1", "rank is -1; it must be at least 0"),
    ("retrain model out --calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    ("eval nowhere/at/all", "nowhere/at/all: does not exist"),
    ("eval model --against nowhere/at/all", "nowhere/at/all: does not exist"),
    ("eval model --perplexity missing.txt", "missing.txt does not exist: check the path of the text"),
    ("eval model --perplexity random", "random token ids cannot be scored; name a text file or a data set"),
    ("eval model --perplexity text.txt --length 1", "length is 1; it must be at least 2"),
    ("eval model --perplexity text.txt --length 65", "length is 65, but the model has only 64 positions"),
    ("eval model --perplexity text.txt --length 16 --tokens 15", "does not fill one row of length 16: use more"),
    ("eval model --tokens -1", "Invalid value for '--tokens'"),
    ("eval model --json missing/figures.json", "missing does not exist; create it first"),
    ("eval model --json model", "model: a folder with this name exists; choose another name"),
    ("eval model --json text.txt", "text.txt: exists; choose another name or add --overwrite"),
    ("retrain model out.gguf", "out.gguf: retrain writes a folder; name one, then export it with secateur"),
    ("eval model --dtype int8", "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[row[0] for row in ARGUMENTS])
def test_wrong_arguments_are_refused_before_any_work(arguments, message, place, run, no_work, monkeypatch):
    from secateur.measure import subject

    monkeypatch.setattr(subject, "load", lambda *_: pytest.fail("a model was loaded"))
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    before = listing(place)
    refused(run(*arguments.split()), message)
    assert listing(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
def test_an_absent_device_is_refused(place, run, no_work):
    before = listing(place)
    refused(run("prune", "model", "out", *SMALL, "--device", "cuda"), "device 'cuda' is not available here; use")
    refused(run("eval", "model", "--device", "cuda:7"), "device 'cuda:7' is not available here; use")
    assert listing(place) == before


def test_a_device_without_float64_is_refused(place, run, no_work, monkeypatch):
    """GPUs of Apple are such devices."""
    empty = torch.empty

    def narrow(*size: Any, dtype: torch.dtype = torch.float32, **how: Any) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return empty(*size, dtype=dtype, device="cpu")

    monkeypatch.setattr(torch, "empty", narrow)
    before = listing(place)
    message = "device 'mps' does not support float64, in which secateur computes sums; use --device cpu"
    refused(run("prune", "model", "out", *SMALL, "--device", "mps"), message)
    assert listing(place) == before


def test_a_real_process_prints_one_line_and_exits_with_code_2(place):
    command = [sys.executable, "-m", "secateur", "prune", "model", "out", "--sparsity", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), "sparsity is 2.0; it must lie between 0 and 1")
    # With standard error closed, there is nowhere to print it.
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stdout, closed.stderr) == (2, "", "")
