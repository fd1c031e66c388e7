"""Results of each command: what it writes and prints."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from command_line import SMALL, TEXT, listing, refused, remove_tokenizer
from safetensors.torch import load_file

from models import make_tokenizer
from outputs import record_of, weights_of
from secateur.cli import bars
from secateur.families.registry import FAMILIES


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


def test_a_dry_run_writes_nothing(place, run, no_work):
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


def test_a_sparsity_that_is_not_reached_is_noted(place, run):
    result = run("prune", "model", "out", *SMALL, "--modules", "heads", "--sparsity", "0.2")
    assert result.code == 0
    record = record_of(place / "out")["sparsity"]
    assert abs(record["reached"] - record["wanted"]) > 0.005
    assert record["note"] in result.out
    assert "Note: " in result.out
    assert "instead of 20.0%" in " ".join(result.out.split())


def test_weights_are_written_in_the_dtype(place, run):
    assert run("prune", "model", "half", *SMALL, "--dtype", "bfloat16").code == 0
    assert {t.dtype for t in load_file(place / "half" / "model.safetensors").values()} == {torch.bfloat16}
    again = ["--sparsity", "0.1", "--dtype", "float32"]
    assert run("prune", "half", "again", *SMALL, *again).code == 0
    assert {t.dtype for t in load_file(place / "again" / "model.safetensors").values()} == {torch.float32}


def test_plan_and_prune_agree_on_similar_heads(place, run):
    arguments = [*SMALL, "--criterion", "similarity", "--tau"]
    result = run("prune", "model", "out", *arguments, "0.15")
    assert result.code == 0, result
    found = record_of(place / "out")["similarity"]
    assert found["tau"] == 0.15
    assert f"Note: tau {found['tau']:.4g} finds " in result.out
    assert "of the attention's parameters" in " ".join(result.out.split())
    result = run("plan", "model", *arguments, str(found["tau"]), "--out", "plan.json")
    assert result.code == 0, result
    written = json.loads((place / "plan.json").read_text())["blocks"]
    assert [block["heads"] for block in written] == [block["heads"] for block in record_of(place / "out")["blocks"]]


def test_file_pipe_and_jsonl_of_one_text_give_one_model(place, run, monkeypatch):
    lines = [json.dumps({"text": TEXT}), ""]
    (place / "text.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    weights = []
    for name, source in (("a", "text.txt"), ("b", "text.jsonl"), ("c", "-"), ("d", "random")):
        assert run("prune", "model", name, *SMALL, "--calibration", source, "--modules", "channels").code == 0
        weights.append(weights_of(place / name))
    assert weights[0] == weights[1] == weights[2] != weights[3]


def test_random_ids_need_no_tokenizer(place, run):
    remove_tokenizer(place / "model")
    assert run("prune", "model", "out", *SMALL, "--calibration", "random", "--effort", "quick").code == 0
    gguf = ["--calibration", "random", "--format", "gguf"]
    refused(run("prune", "model", "o.gguf", *SMALL, *gguf), "model: no tokenizer files; copy the model's into the fold")


def test_bos_in_calibration_rows_is_reported(place, run):
    make_tokenizer(bos=True).save_pretrained(place / "model")
    assert "rows begin with BOS." in run("prune", "model", "out", *SMALL, "--modules", "channels").out
    assert record_of(place / "out")["calibration"]["begins_with_bos"]
    assert "rows begin with BOS." in run("eval", "out", "--perplexity", "text.txt", "--length", "16").out


def test_plan_prints_the_widths_that_prune_gives(place, run):
    before = listing(place)
    result = run("plan", "model", *SMALL, "--sparsity", "0.4")
    assert result.code == 0, result.err
    assert listing(place) == before
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert "40." in result.out.partition("% of the blocks' parameters are removed")[0][-6:]
    assert "Estimated loss increase: " in result.out
    copied = run("plan", "model", *SMALL, "--sparsity", "0.4", "--effort", "quick", "--recover", "after")
    assert copied.out == result.out
    assert "Without effect on plan: --effort\n" in copied.err
    part = run("plan", "model", *SMALL, "--sparsity", "0.4", "--blocks", "1:2")
    assert "% of the parameters of blocks 1:2 are removed; " in part.out
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
    assert [line for line in drawn.out.splitlines() if "│" in line] == [
        line for line in result.out.splitlines() if "│" in line
    ]


def test_sizes_writes_models_a_table_and_a_plot_and_resumes(place, run, monkeypatch):
    # A busy machine takes long enough to say where the time went.
    monkeypatch.setattr(bars.Bars, "times", lambda _: "")
    arguments = ["sizes", "model", "--out", "sizes", *SMALL, "--sparsities", ".5,.2", "--perplexity", "text.txt"]
    result = run(*arguments)
    assert result.code == 0, result.err
    assert "sizes.json and sizes.png are in sizes" in result.out
    assert "text.txt" in result.out.splitlines()[2]
    shares = [line.split("│")[2].strip() for line in result.out.splitlines() if line.count("│") > 4]
    assert [float(share[:-1]) for share in shares] == pytest.approx([0, 20, 50], abs=1)
    names = {"sparsity-0.2", "sparsity-0.5", "sizes.json", "sizes.png", "survey.json"}
    assert {file.name for file in (place / "sizes").iterdir()} == names
    # The same again makes nothing; after a loss only what is missing, to the byte.
    written = weights_of(place / "sizes" / "sparsity-0.2")
    stamps = [(place / "sizes" / f"sparsity-{share}").stat().st_mtime_ns for share in ("0.2", "0.5")]
    shutil.rmtree(place / "sizes" / "sparsity-0.2")
    again = run(*arguments)
    assert again.code == 0, again.err
    assert again.out == result.out
    assert "sizes/sparsity-0.5: already finished" in again.err
    assert (place / "sizes" / "sparsity-0.5").stat().st_mtime_ns == stamps[1]
    assert (place / "sizes" / "sparsity-0.2").stat().st_mtime_ns > stamps[0]
    assert weights_of(place / "sizes" / "sparsity-0.2") == written
    said = "error: sizes/sparsity-0.2: made with other options, other weights or another text; add --overwrite"
    other = run(*arguments, "--seed", "1")
    assert (other.code, other.err.splitlines()[-1]) == (2, f"{said} to replace it")
    (place / "text.txt").write_text(TEXT[::-1])
    other = run(*arguments)
    assert (other.code, other.err.splitlines()[-1]) == (2, f"{said} to replace it")
    before = listing(place)
    short = run(*arguments, "--overwrite", "--tokens", "5")
    assert short.code == 2
    assert short.err.splitlines()[-1].startswith("error: tokens is 5, which does not fill one row of length")
    assert listing(place) == before
    assert run(*arguments, "--overwrite").code == 0


def test_retrain_reports_perplexity_before_and_after(place, run):
    assert run("prune", "model", "pruned", *SMALL).code == 0
    options = ("--length", "16", "--tokens", "64", "--batch", "2", "--device", "cpu")
    result = run("retrain", "pruned", "out", "--calibration", "text.txt", *options)
    assert result.code == 0
    assert result.out.count("\n") == 1
    assert result.out.startswith("Perplexity on held-out rows: ")
    assert "Retrain" in result.err
    assert "Retrain 2 of 2" in result.err
    assert len(record_of(place / "out")["retrained"][0]["losses"]) == 2


def test_eval_compares_two_models(place, run):
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
    assert rows["bits per byte text.txt"][:2] == [f"{score['bits_per_byte']:.4f}" for score in scores]
    assert {"prefill tokens/s", "decoding tokens/s"} < set(rows)
    assert rows["prefill tokens/s"][2] == f"{figures['speed_ratios'][0]:.3f}"
    scored = f"text.txt: 600 tokens ({scores[0]['bytes']:,} bytes) scored in 40 rows of 16; rows begin without BOS"
    assert result.out.count(scored) == 2
    assert "Speed: a prompt of 48 tokens, then 16 new tokens" in result.out


def test_eval_scores_two_models_on_one_pipe(place, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    result = run("eval", "model", "--against", "model", "--perplexity", "-", "--length", "16", "--tokens", "64")
    assert result.code == 0
    assert "1.000" in next(line for line in result.out.splitlines() if "perplexity" in line)


def test_eval_without_options_prints_sizes(place, run):
    remove_tokenizer(place / "model")
    result = run("eval", "model")
    assert result.code == 0
    assert "64,464" in result.out
    assert "perplexity" not in result.out
    assert "tokens/s" not in result.out


def test_json_holds_the_results(place, run):
    result = run("prune", "model", "out", *SMALL, "--json", "-", "--quiet")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["out"] == "out"
    record = record_of(place / "out")
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
