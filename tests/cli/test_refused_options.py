"""Wrong options and arguments, in Python and on the command line, are refused in one line, before any work."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, Result, listing, refused

from models import POSITIONS
from outputs import error_of
from secateur import Options, RunOptions
from secateur.base.options import cli_name, option_specs
from secateur.fit.recovery import recovery_of
from secateur.measure import evaluation
from secateur.retraining.options import Training

OPTIONS: list[tuple[str, str]] = [
    ("--sparsity 0", "sparsity is 0.0; it must lie between 0 and 1, for example 0.25"),
    ("--sparsity 0.9999", "sparsity 100.0% is out of reach: at most 99.4% of the blocks' parameters can be removed"),
    ("--sparsity 0.9 --modules channels", "only channels may be removed"),
    ("--sparsity 0.5 --modules heads --widths uniform", "26.5% of the blocks' parameters can be removed; only heads"),
    ("--modules nonsense", "modules is 'nonsense'; give one or more of heads, channels, experts"),
    ("--blocks 0:9", "blocks is '0:9', but the model has 3 blocks (0:3)"),
    ("--blocks 1:1", "blocks is '1:1', which is empty or reversed; the end must be larger"),
    ("--blocks=-1:2", "blocks is '-1:2'; write first:end, for example 4:30"),
    ("--blocks 0:2 --widths uniform", "a stock class has one width for all 3 blocks, and only 0:2 are to be pruned;"),
    ("--type q8_0", "type q8_0 is only for --format gguf: add that, or leave --type out"),
    ("--format gguf --type Q8_0", "type is 'Q8_0'; write it q8_0"),
    (f"--length {POSITIONS + 1}", f"length is {POSITIONS + 1}, but the model has only {POSITIONS} positions: choose"),
    ("--samples 4000", "text.txt: too short, it has 1,500 tokens, but 4,000 rows of 16 tokens need 64,000"),
    ("--seed -1", "seed is -1; it must lie between 0 and"),
    ("--ridge 1e39", "ridge is 1e+39; it must lie between 0 and 1,000,000, for example 0.3"),
    ("--round 96 --modules channels --widths uniform", "--round 96 leaves nothing to remove: the model has 72"),
    ("--widths free", "widths is 'free', but there is no such file; check the path, or write"),
    ("--recover both --recovery bias", "recover is an option of --recovery paper: leave --recover out"),
    ("--recovery bias --widths uniform", "the stock class of llama has no biases of output projections, which"),
    ("--device nonsense", "device 'nonsense' is not available here; use --device auto or cpu"),
    ("--device meta", "device 'meta' computes nothing; use --device auto or cpu"),
    ("--revision main", "model: a local path has no revision 'main'; leave it out"),
    ("--calibration missing.txt", "missing.txt does not exist: check the path of the text"),
    ("--calibration model/model.safetensors", "has an unknown extension: text is read from .txt and .jsonl files"),
    ("--target params=1", "target params=1 is out of reach: the smallest possible value is"),
    ("--target bytes=1kB", "request bytes=50500, or allow more"),
    ("--target kv=50% --modules channels", "the modules that may be pruned do not change this quantity"),
    ("--target params=2G", "the dense model is within it already"),
    ("--target ppl=1.2x --dry-run", "because it prunes to several sizes; leave out --dry-run"),
    ("--sparsity 0.2 --target params=80%", "--sparsity and --target both set how much to remove; leave one of them"),
    ("--plan text.txt --widths text.txt", "--plan and --widths text.txt both set how much to remove"),
    ("--plan missing.json", "plan is 'missing.json', but there is no such file; check the path"),
    ("--plan text.txt", "text.txt: not readable as JSON"),
    ("--plan model/config.json", "model/config.json: not a plan: 'blocks' must be a list"),
    ("--widths model/config.json", "is not a range of blocks; write first:end within 0:3"),
    ("--format stock", "the stock format holds one width for all blocks: use --widths uniform, or --format hf"),
    ("--format gguf", "out: the file name must end in .gguf; rename it"),
    ("--sigma identity", "sigma is an option of --criterion second-moment, not of surgeon: leave --sigma out"),
    ("--refit-samples 8 --recovery none", "--recovery none fits nothing: leave --refit-samples and --refit-calib"),
    ("--calibration self --length 65", "length is 65, but the model has only 64 positions: choose a length of at most"),
    ("--survey text.txt", "text.txt: not a survey by secateur; name another file, or delete it"),
]


@pytest.mark.parametrize(("name", "spec"), option_specs(Options).items(), ids=option_specs(Options))
def test_values_outside_the_choices_and_below_the_minimum_are_refused(name, spec):
    if spec.choices:
        assert f"{name} is 'other'; it must be one of {', '.join(spec.choices)}" in error_of(Options, **{name: "other"})
    if (least := spec.minimum) is not None:
        wanted = f"{cli_name(name)} is {least - 1}; it must be at least {least}"
        assert wanted in error_of(Options, **{name: least - 1})


ARGUMENTS = [
    ("prune", "Missing argument 'MODEL'; see secateur prune --help"),
    ("prun model out", "No such command 'prun'"),
    ("prune nowhere/at/all out", "nowhere/at/all: does not exist; name a folder, a .gguf file or a hub id"),
    ("prune model ~no.such.user/out", "~no.such.user does not exist; create it first"),
    ("prune text.txt out", "text.txt: this file is not a .gguf file; name the model's folder"),
    ("prune model out.gguf", "out.gguf: the format hf writes a folder; add --format gguf, or leave out .gguf"),
    ("plan model --target ppl=1.2x", "only secateur prune can reach a target of perplexity, because it prunes to"),
    ("prune model ''", "the name of a file or folder is empty; name one, or . for the current folder"),
    ("prune '' out", "the name of a file or folder is empty; name one, or . for the current folder"),
    ("plan model --out text.txt", "text.txt: exists; choose another name or add --overwrite"),
    ("survey model --out page --criterion similarity", "a survey needs a criterion that gives every unit a score"),
    ("survey model --out full", "full: exists and is not empty; choose another name or add --over"),
    ("survey model --out full --overwrite", "full: not overwritten, because it contains other files (thesis.tex); "),
    ("sizes model --out sizes --sparsities .1,x", "--sparsities is '.1,x'; write fractions separated by commas, for"),
    ("prune model out --calibration random --length 32 --samples 100000000000", "samples is 100,000,000,000"),
    ("prune model out --sparsity 1/4", "--sparsity is '1/4'; write a fraction such as 0.25 or 25%"),
    ("sizes model --out sizes --sparsities .25,.25000001", "sparsity-0.25: two sizes would have the same name; leave"),
    ("sizes model --out sizes --widths text.txt", "for several sizes it must be one of adaptive, uniform"),
    ("sizes model --out text.txt", "text.txt: a file with this name exists; choose another name"),
    ("sizes model --out sizes --format gguf", "sizes writes folders: use --format hf, then run secateur export"),
    ("sizes model --out sizes --survey sizes/sizes.json", "the table and the plot are written there; name another"),
    ("prune model out --survey full", "full: this is a folder; name a JSON file for --survey"),
    ("prune model out --survey out", "out: the survey cannot be inside the output out"),
    ("prune model out --blocks " + "9" * 5000 + ":", "write first:end, for example 4:30"),
    ("export nowhere out.gguf", "nowhere: not a folder with a config.json; name a folder that secateur prune wrote"),
    ("retrain nowhere out --calibration text.txt", "nowhere: not a folder with a config.json; name a folder that"),
    ("eval model --against nowhere/at/all", "nowhere/at/all: does not exist"),
    ("eval model --perplexity random", "random token ids cannot be scored; name a text file or a data set"),
    ("eval model --perplexity text.txt --length 16 --tokens 15", "does not fill one row of length 16: use more"),
    ("eval model --json model", "model: a folder with this name exists; choose another name"),
    ("retrain model out.gguf", "out.gguf: retrain writes a folder; name one, then export it with secateur"),
    ("eval model --dtype int8", "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
]
CASES = [*((f"prune model out {' '.join(SMALL)} {options}", message) for options, message in OPTIONS), *ARGUMENTS]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[row[0] for row in (*OPTIONS, *ARGUMENTS)])
def test_wrong_arguments_are_refused_before_any_work(arguments, message, place, run, no_work, monkeypatch):
    monkeypatch.setattr(evaluation, "load", lambda *_: pytest.fail("a model was loaded"))
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    before = listing(place)
    refused(run(*shlex.split(arguments)), message)
    assert listing(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
@pytest.mark.parametrize("arguments", [["prune", "model", "out", *SMALL], ["eval", "model"]], ids=["prune", "eval"])
def test_an_absent_device_is_refused(arguments, place, run, no_work):
    refused(run(*arguments, "--device", "cuda:7"), "device 'cuda:7' is not available here; use")


def test_a_real_process_prints_one_line_and_exits_with_code_2(place):
    command = [sys.executable, "-m", "secateur", "prune", "model", "out", "--sparsity", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), "sparsity is 2.0; it must lie between 0 and 1")
    # With standard error closed, there is nowhere to print it.
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stdout, closed.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("owner", "given", "message"),
    [
        (Options, {"calibration": 5}, "calibration is 5; it must be text"),
        (Options, {"samples": "8"}, "samples is '8'; it must be a whole number"),
        (Options, {"samples": 8.5}, "samples is 8.5; it must be a whole number"),
        (Options, {"samples": True}, "samples is True; it must be a whole number"),
        (Options, {"samples": None}, "samples is None; it must be a whole number"),
        (Options, {"sparsity": "25%"}, "sparsity is '25%'; it must be a number"),
        (Options, {"modules": 1}, "modules is 1; it must be a list of names, or names separated by commas"),
        (Options, {"modules": ["heads", 1]}, "modules is ['heads', 1]; it must be a list of names, or names separated"),
        (Options, {"modules": "heads,"}, "modules is 'heads,'; give one or more of heads, channels, experts"),
        (Options, {"samples": 10**5000}, "samples is a number of more than 18 digits; choose a smaller one"),
        (RunOptions, {"survey": 1}, "survey is 1; it must be a path"),
        (RunOptions, {"overwrite": "yes"}, "overwrite is 'yes'; it must be True or False"),
    ],
)
def test_a_wrong_type_is_refused(owner, given, message):
    assert error_of(owner, **given).startswith(message)


def test_equivalent_types_are_converted():
    file = Path(__file__)
    given = Options(sparsity=np.float32(0.25), samples=np.int64(8), modules=["heads"], calibration=file)  # type: ignore[arg-type]
    assert (given.samples, given.calibration) == (8, str(file))
    # As the record keeps them.
    assert json.dumps([given.sparsity, given.samples]) == "[0.25, 8]"
    assert Options(modules="heads, channels").modules == ("heads", "channels")  # type: ignore[arg-type]
    assert RunOptions(survey="a.json").survey == Path("a.json")  # type: ignore[arg-type]
    assert Training(teacher=file).teacher == str(file)  # type: ignore[arg-type]


def test_the_default_recovery_is_that_of_the_library():
    assert Options().recovery_settings == recovery_of()
