"""Results of each command: what it writes and prints; help and version."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from command_line import SMALL, TEXT, Result, listing, refused, remove_tokenizer
from safetensors.torch import load_file

from outputs import edit_json, record_of, weights_of
from secateur.cli import bars
from secateur.commands import sizes
from secateur.families.registry import FAMILIES
from secateur.measure.evaluation import evaluate


def test_prune_writes_a_model_and_prints_a_summary(place, run):
    result = run("prune", "model", "out", *SMALL)
    assert result.code == 0
    notes = result.err.splitlines()
    counted = sum(tensor.numel() for tensor in load_file(place / "model" / "model.safetensors").values())
    assert notes[0] == f"Opened model: llama, 3 blocks, {counted:,} parameters, float32"
    assert f"{counted:,}" in next(line for line in result.out.splitlines() if "parameters" in line)
    assert notes[1].startswith("Calibrating on 4 rows of 16 tokens; computing on ")
    assert [line.split()[0] for line in notes[2:]] == ["Resample", "Draw", "Survey", "Probe", "Keeping", "Prune"]
    assert "of 18 query heads (" in notes[6]
    assert "estimated loss increase: " in notes[6]
    words = "parameters|weights, stored alike|KV cache per token|KV groups|channels|peak memory|Written to out"
    words += "|Calibrated on 64 tokens; rows begin without BOS"
    assert [word for word in words.split("|") if word not in result.out] == []
    assert "Note:" not in result.out
    wanted = {"config.json", "model.safetensors", "secateur.json", "timings.json", "tokenizer.json"}
    assert wanted <= {file.name for file in (place / "out").iterdir()}
    # Nothing hidden is left beside it.
    assert {file.name for file in place.iterdir()} == {"model", "text.txt", "out"}


def test_a_dry_run_writes_nothing(place, run):
    before = listing(place)
    result = run("prune", "model", "out", *SMALL, "--dry-run")
    assert result.code == 0
    words = "Expected|parameters|weights, stored alike|KV cache per token| s and | GB of memory|Nothing was written"
    assert [word for word in words.split("|") if word not in result.out] == []
    assert listing(place) == before
    assert "Without effect" not in result.err
    result = run("prune", "model", "out", *SMALL, "--dry-run", "--recovery", "bias", "--effort", "best")
    assert "\nWithout effect with --recovery bias: --effort\n" in result.err


def test_file_pipe_and_jsonl_of_one_text_give_one_model(place, run, monkeypatch):
    lines = [json.dumps({"text": TEXT}), ""]
    (place / "text.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    weights = []
    for name, source in (("a", "text.txt"), ("b", "text.jsonl"), ("c", "-"), ("d", "random")):
        assert run("prune", "model", name, *SMALL, "--calibration", source, "--modules", "channels").code == 0
        weights.append(weights_of(place / name))
    assert weights[0] == weights[1] == weights[2] != weights[3]


def test_random_ids_and_sizes_need_no_tokenizer(place, run):
    remove_tokenizer(place / "model")
    options = [*SMALL, "--calibration", "random", "--effort", "quick"]
    assert run("prune", "model", "out", *options).code == 0
    refused(
        run("prune", "model", "o.gguf", *options, "--format", "gguf"), "model: no tokenizer files; copy the model's"
    )
    result = run("eval", "model")
    assert result.code == 0
    assert "64,464" in result.out
    assert "│ bytes in float32 │" in result.out
    assert "perplexity" not in result.out
    assert "tokens/s" not in result.out


def cells_of(table: str) -> list[list[str]]:
    """Return the cells of a printed table, row by row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]


def test_plan_prints_the_widths_that_prune_gives(place, run):
    before = listing(place)
    result = run("plan", "model", *SMALL, "--sparsity", "0.4")
    assert result.code == 0, result.err
    assert listing(place) == before
    rows = cells_of(result.out)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert "40." in result.out.partition("% of the blocks' parameters are removed")[0][-6:]
    assert "Estimated loss increase: " in result.out
    copied = run("plan", "model", *SMALL, "--sparsity", "0.4", "--effort", "quick", "--recover", "after", "--dry-run")
    assert copied.out == result.out
    assert "Without effect on plan: --effort, --dry-run\n" in copied.err
    part = run("plan", "model", *SMALL, "--sparsity", "0.4", "--blocks", "1:2")
    assert "% of the parameters of block 1 are removed; " in part.out
    assert " channels in block 1. Removing " in part.err
    part = run("plan", "model", *SMALL, "--sparsity", "0.4", "--blocks", "1:3")
    # As in the table of `prune`, of the whole model.
    assert " of 216 feed-forward channels (" in part.err
    part = run("prune", "model", "part", *SMALL, "--sparsity", "0.4", "--blocks", "1:2", "--dry-run")
    assert " are removed; block 1 keeps: " in part.out
    result = run("plan", "model", *SMALL, "--sparsity", "0.4", "--out", "plan.json", "--survey", "survey.json")
    assert "Written to plan.json; prune with --plan plan.json" in result.out
    assert run("prune", "model", "planned", *SMALL, "--plan", "plan.json").code == 0
    assert run("prune", "model", "direct", *SMALL, "--sparsity", "0.4", "--survey", "survey.json").code == 0
    written = [weights_of(place / name) for name in ("planned", "direct")]
    assert written[0] == written[1]
    for row, block in zip(rows, record_of(place / "direct")["blocks"], strict=True):
        groups, heads, channels = (int(cell.split("/")[0]) for cell in row[1:4])
        assert (groups * heads, channels) == (len(block["heads"]), len(block["channels"]))
        assert groups == block["width"]["kv_groups"]
    drawn = run("plan", "model", *SMALL, "--plan", "direct/secateur.json")
    assert cells_of(drawn.out) == cells_of(result.out) == rows


def last_error(result: Result) -> str:
    assert result.code == 2
    return result.err.splitlines()[-1].removeprefix("error: ")


def test_sizes_writes_models_a_table_and_a_plot_and_resumes(place, run, monkeypatch):
    # A busy machine takes long enough to say where the time went.
    monkeypatch.setattr(bars.Bars, "times", lambda _: "")
    arguments = ["sizes", "model", "--out", "sizes", *SMALL, "--sparsities", ".5,.2", "--perplexity", "text.txt"]
    limits: list[str] = []
    monkeypatch.setattr(sizes, "evaluate", lambda *_, **how: limits.append(how["memory"]) or evaluate(*_, **how))
    arguments += ["--memory", "90%"]
    result = run(*arguments)
    assert (result.code, limits) == (0, ["90%"] * 3), result.err
    said = "Perplexity: of rows of 16 tokens, each scored on its own.\nsizes.json and sizes.png are in sizes"
    assert said in result.out
    assert "text.txt" in result.out.splitlines()[2]
    assert [float(cells[1][:-1]) for cells in cells_of(result.out)] == pytest.approx([0, 20, 50], abs=1)
    names = {"sparsity-0.2", "sparsity-0.5", "sizes.json", "sizes.png", "survey.json"}
    assert {file.name for file in (place / "sizes").iterdir()} == names
    # The same again makes only what is missing, to the byte.
    small, large = (place / "sizes" / f"sparsity-{share}" for share in ("0.2", "0.5"))
    written, stamp = weights_of(small), large.stat().st_mtime_ns
    shutil.rmtree(small)
    again = run(*arguments)
    assert (again.code, again.out) == (0, result.out), again.err
    assert "sizes/sparsity-0.5: already finished" in again.err
    assert (weights_of(small), large.stat().st_mtime_ns) == (written, stamp)
    said = "sizes/sparsity-0.2: made with other options, other weights or another text; add --overwrite to replace it"
    assert last_error(run(*arguments, "--seed", "1")) == said
    (place / "text.txt").write_text(TEXT[::-1])
    assert last_error(run(*arguments)) == said
    before = listing(place)
    short = last_error(run(*arguments, "--overwrite", "--tokens", "5"))
    assert short.startswith("tokens is 5, which does not fill one row of length")
    assert listing(place) == before
    assert run(*arguments, "--overwrite").code == 0


def test_eval_compares_two_models_on_a_file_and_on_a_pipe(place, run, monkeypatch):
    assert run("prune", "model", "out", *SMALL, "--modules", "channels").code == 0
    texts = ["--perplexity", "text.txt", "--perplexity", str(place / "text.txt"), "--length", "16", "--tokens", "640"]
    result = run("eval", "out", "--against", "model", *texts, "--speed", "--json", "figures.json")
    assert result.code == 0, result.err
    figures = json.loads((place / "figures.json").read_text())
    small, dense = figures["models"]
    rows = {name: cells for name, *cells in cells_of(result.out)}
    assert rows["parameters"][:2] == [f"{small['parameters']:,}", f"{dense['parameters']:,}"]
    assert float(rows["parameters"][2]) == pytest.approx(small["parameters"] / dense["parameters"], abs=6e-4)
    scores = [model["texts"]["text.txt"] for model in (small, dense)]
    one, two = (score["perplexity"] for score in scores)
    assert rows["perplexity text.txt"][:2] == [f"{one:,.3f}", f"{two:,.3f}"]
    assert float(rows["perplexity text.txt"][2]) == pytest.approx(one / two, abs=6e-4)
    assert small["texts"]["text.txt"]["tokens"] == 40 * 15
    assert rows["bits per byte text.txt"][:2] == [f"{score['bits_per_byte']:.4f}" for score in scores]
    assert {"prefill tokens/s", "decoding tokens/s"} < set(rows)
    assert rows["prefill tokens/s"][2] == f"{figures['speed_ratios'][0]:.3f}"
    scored = f"text.txt: 600 tokens ({scores[0]['bytes']:,} bytes) scored in 40 rows of 16; rows begin without BOS"
    assert result.out.count(scored) == 2
    assert "Speed: a prompt of 48 tokens, then 16 new tokens" in result.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    piped = run("eval", "model", "--against", "model", "--perplexity", "-", "--length", "16", "--tokens", "64")
    assert "1.000" in next(line for line in piped.out.splitlines() if "perplexity" in line)


def test_a_narrow_terminal_cuts_no_figure(place, run, monkeypatch):
    wide = run("prune", "model", "out", *SMALL, "--widths", "uniform")
    monkeypatch.setenv("COLUMNS", "20")
    narrow = run("prune", "model", "narrow", *SMALL, "--widths", "uniform")
    assert "…" not in narrow.out
    figures = [cells[1:] for cells in cells_of(wide.out)]
    assert [cells[1:] for cells in cells_of(narrow.out) if cells[1]] == figures


def test_json_holds_the_results(place, run):
    result = run("prune", "model", "out", *SMALL, "--json", "-", "--quiet")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["out"] == "out"
    record = record_of(place / "out")
    assert found["parameters"] == record["sizes"]["parameters"]
    assert list(found["widths"].values()) == [block["width"] for block in record["blocks"]]
    assert run("families", "--json", "families.json").out
    gguf = {family["name"]: family["gguf"] for family in json.loads((place / "families.json").read_text())["results"]}
    assert (gguf.keys(), gguf["olmo2"]) == (FAMILIES.keys(), "olmo2")
    assert "families.json: exists" in run("families", "--json", "families.json").err
    assert run("families", "--json", "families.json", "--overwrite").code == 0
    assert json.loads(run("plan", "model", *SMALL, "--json", "-").out)["sparsity"]["reached"] > 0
    (model,) = json.loads(run("eval", "out", "--json", "-").out)["models"]
    assert model["parameters"] == found["parameters"][1]
    assert json.loads(run("clean", "out", "--json", "-").out)["removed"] == []


def test_another_config_is_another_model_and_a_tilde_is_the_home_folder(place, run, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    arguments = ["plan", "model", "--survey=~/survey.json", *SMALL]
    assert run(*arguments).code == 0
    assert (place / "survey.json").exists()
    edit_json(place / "model" / "config.json", rms_norm_eps=1e-5)
    assert "survey.json: a survey of a model with another config.json; name another file" in last_error(run(*arguments))


def test_version_and_help_list_commands_options_and_panels(run):
    import secateur

    assert run("--version") == (0, f"secateur {secateur.__version__}\n", "")
    for arguments in ([], ["--help"], ["-h"]):
        result = run(*arguments)
        assert result.code == 0
        commands = re.findall("^│ ([a-z]+)", result.out, flags=re.MULTILINE)
        assert " ".join(commands) == "prune trim export retrain plan survey sizes eval doctor clean families"
    own = {
        "prune": "sparsity target plan blocks modules widths round criterion recovery recover ridge effort tau sigma "
        "calibration samples length refit-calibration refit-samples seed device revision trust-remote-code dtype "
        "format type survey dry-run overwrite restart memory family",
        "eval": "perplexity length tokens speed against device dtype revision trust-remote-code",
    }
    for command in commands:
        text = run(command, "--help").out
        options = f"json quiet verbose {own.get(command, '')}".split()
        assert [option for option in options if f"--{option} " not in text] == []
        assert "--type " not in text or command != "sizes"
        assert ("survey.json in the folder of" in text) == (command == "sizes")
        assert "Replace the file of --json" in text or command not in ("eval", "doctor")
    panels = ["Target", "Method", "Calibration", "Output", "Computing", "Messages", "The paper's variants"]
    assert re.findall("─ ([A-Z][\\w' ]+) ─", run("prune", "--help").out)[2:] == panels


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['secateur', 'prune', '--help']\n"
        "from secateur.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_verbose_prints_the_traceback(place, run):
    few, many = (run("plan", "missing", *SMALL, *more) for more in ([], ["--verbose"]))
    assert few.code == many.code == 2
    assert few.err.count("\n") == 1
    assert "Traceback" in many.err
    assert many.err.splitlines()[-1] == few.err.strip()
