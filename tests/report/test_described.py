"""Card and page of a pruned folder, README.md and report.html: written, measured, and opened in a browser."""

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axe_playwright_python.sync_playwright import Axe
from command_line import SMALL, Run

from models import blocks_of, build, load_written, save, seen
from outputs import Opened, record_of, weights_of
from secateur import draw_rows, open_model, prune
from secateur.measure.answers import AnswerScore
from secateur.measure.figures import Evaluation, ModelScore
from secateur.report.card import card
from secateur.report.model_page import CURVE_WIDTH, model_page
from secateur.report.summary import each_keeps
from secateur.report.tables import measurement_notes

UNITS = ("heads", "kv_groups", "channels")
NASTY = '<script>window.broken = 1</script> "quoted" `code` | [link](x) é'


def pruned(place: Path, run: Run, *more: str, out: str = "out") -> dict[str, Any]:
    assert run("prune", "model", out, *SMALL, *more).code == 0
    return record_of(place / out)


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def text_of(page: str) -> str:
    """Return the text that a browser shows."""
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(page)
    return " ".join(" ".join(parts).split())


def test_the_card_says_what_was_done(place, run):
    (place / "model" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: of-its-own\nlanguage: [en, de]\nmodel-index: {}\n---\n# The base model\n"
    )
    (place / "model" / "LICENSE").write_text("all rights")
    record = pruned(place, run, "--widths", "uniform")
    text = (place / "out" / "README.md").read_text()
    base = {"license": "other", "license_name": "of-its-own", "language": ["en", "de"]}
    own = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pruned", "secateur"]}
    assert front(text) == base | own
    assert (place / "out" / "README.base.md").read_text().endswith("# The base model\n")
    assert (place / "out" / "LICENSE").read_text() == "all rights"
    assert f"{record['sparsity']['reached']:.1%} of the blocks' parameters" in text
    channels = sum(block["width"]["channels"] for block in record["blocks"])
    page = text_of((place / "out" / "report.html").read_text())
    assert f"were removed, and {channels:,} of 216 feed-forward channels are kept. Estimated" in page
    assert "Licence files of the base model, if it has any, are in this folder" in text
    before, after = record["sizes"]["parameters"]
    assert f"| parameters | {before:,} | {after:,} | {after / before:.3f} |" in text
    assert 'from_pretrained("THIS_FOLDER")' in text
    # The command makes the same model, byte for byte.
    (command,) = [line for line in text.splitlines() if line.startswith("secateur prune")]
    assert command == record["command"]
    _, *words = shlex.split(command)
    assert run(*[{"OUT": "again"}.get(word, word) for word in words]).code == 0
    for file in (place / "out").iterdir():
        if file.name != "timings.json":
            assert (place / "again" / file.name).read_bytes() == file.read_bytes(), file.name


METADATA = [": [", "license: 5\nlanguage: [1]", "a: &a [x]\nb: [*a, *a]\nlicense: mit", "[" * 100_000, "- a list"]


@pytest.mark.parametrize("base", [None, "# none", "---\nlicense: mit", *(f"---\n{one}\n---\n" for one in METADATA)])
def test_a_base_card_without_readable_metadata(base):
    assert "license" not in front(card(made(), base_card=base))


def made(**changes: Any) -> dict[str, Any]:
    """A record of one block of each kind."""
    dense = {"kv_groups": 2, "heads_per_group": 2, "channels": 10}
    mixture = {"kv_groups": 2, "heads_per_group": 2, "experts": 4, "expert_channels": 5}
    heads = {"kind": "heads", "kept": 2, "units": 4, "relative": 0.1}
    fed = {"kind": "channels", "kept": 5, "units": 10, "relative": 0.0}
    return {
        "secateur": "1",
        "torch": "2",
        "transformers": "5",
        "model": "owner/name",
        "on_hub": True,
        "command": "secateur prune owner/name OUT",
        "options": {"recovery": "refit", "blocks": None},
        "sparsity": {"reached": 0.4},
        "cost": 0.25,
        "sizes": {"parameters": [1000, 600], "bytes": [2000, 1200], "cache_bytes": [0, 0]},
        "dense": [dense, mixture],
        "loads": {"class": "AutoModelForCausalLM", "format": "hf", "task": "text-generation", "vllm": None},
        "blocks": [
            {"block": 0, "width": dense | {"kv_groups": 1, "channels": 5}, "modules": [heads, fed]},
            {"block": 1, "width": mixture | {"experts": 3}, "modules": [fed | {"kind": "experts"}]},
        ],
    } | changes


def test_the_card_names_the_base_and_tells_a_fit_from_none():
    assert front(card(made()))["base_model"] == "owner/name"
    assert "base_model" not in front(card(made(on_hub=False)))
    text = card(made(model="/home/me/models/name", on_hub=False))
    assert "base_model" not in front(text)
    assert "/home/me" not in text
    for recovery, words in (("refit", "were fitted"), ("none", "are unchanged."), ("bias", "biases")):
        text = card(made(options={"recovery": recovery, "blocks": None}))
        assert words in text
        assert ("were fitted" in text) == (recovery == "refit")
        page = text_of(model_page(made(options={"recovery": recovery, "blocks": None})))
        assert all("refit" not in shown.replace("each pruned and refitted alone", "") for shown in (text, page))


def test_names_are_escaped():
    text = card(made(model=f"/x/{NASTY}", on_hub=False), measured=[(NASTY, "1", "2", "0.5")])
    assert "<script>" not in text.replace("`<script>", "")
    (row,) = [line for line in text.splitlines() if line.endswith("| 2 | 1 | 0.5 |")]
    assert row.count(" | ") == 3
    assert "\\|" in row
    texts = [(NASTY, NASTY, NASTY), ("{{ versions }}", "", "")]
    page = model_page(made(model=f"/x/{NASTY}", on_hub=False), [(NASTY, "1", "2", "0.5")], texts)
    assert "{{ versions }}" in page
    assert "<script" not in page
    # In the figures, and in the prompt and what two models wrote; of a path the name alone is shown.
    assert text_of(page).count("window.broken") == 4


def test_measurements_are_added_to_card_and_page(place, run):
    pruned(place, run)
    before = {name: (place / "out" / name).read_text() for name in ("README.md", "report.html")}
    assert "has not been measured yet" in before["README.md"]
    asked = ["--perplexity", "text.txt", "--length", "16", "--tokens", "64", "--prompt", "w1 w2 w3"]
    result = run("eval", "out", "--against", "model", *asked, "--report", "--json", "figures.json")
    assert result.code == 0, result.err
    here, base = json.loads((place / "figures.json").read_text())["models"]
    scores = [model["texts"]["text.txt"]["perplexity"] for model in (base, here)]
    row = " | ".join([*(f"{score:,.3f}" for score in scores), f"{scores[1] / scores[0]:.3f}"])
    card_now, page = ((place / "out" / name).read_text() for name in before)
    assert f"| perplexity text.txt | {row} |" in card_now
    assert "has not been measured yet" not in card_now
    notes = ["Prompts: each model continues them as text, as it has no chat template."]
    notes.append("bytes) scored in 4 rows of 16; rows begin without BOS.")
    assert all(shown.count(note) == 1 for note in notes for shown in (result.out, card_now, text_of(page)))
    wrote = [model["written"]["w1 w2 w3"] for model in (here, base)]
    assert all(20 < len(text.split()) <= 80 for text in wrote)
    assert wrote[0] != wrote[1]
    for text in (*wrote, f"{scores[1]:,.3f}"):
        words = " ".join(text.split())
        assert words in text_of(page)
        assert words in " ".join(result.out.split())


@pytest.mark.parametrize(("row", "where"), [("llama", "every block"), ("lfm2", "every block (as far as it has them)")])
def test_one_width_of_several_blocks(row, where):
    widths = {index: block.width for index, block in enumerate(blocks_of(build(row)))}
    found, width = each_keeps(widths, 3)
    assert (found, [*width]) == (where, ["heads_per_group", "kv_groups", "channels"])
    assert each_keeps({1: width, 2: width}, 3)[0] == "each of blocks 1 to 2"
    assert each_keeps({0: width, 2: width}, 3)[0] == "each of 2 blocks"


def test_notes_name_the_models():
    """The columns of a card are in another order than those of `eval`."""
    loops = AnswerScore(40, 9, 0.0, 0.5)
    scores = [ModelScore(name, 1, 1, "float32", 4, False, {}, [], answers=loops) for name in ("x", "y")]
    scores[0].written, scores[0].chat_template = {"Who?": "I."}, True
    answers, prompts = measurement_notes(Evaluation(scores), ("this model", "the base model"))
    assert "share of the answer tokens of the base model that this model ranks first." in answers
    assert prompts.startswith("Prompts: this model answers them as a user's message in its chat template; the base ")


@pytest.mark.parametrize("steps", [1, 4, 100, 101, 250])
def test_curves_end_at_the_number_of_trained_tokens(steps):
    entry = {"losses": [2.0] * steps, "perplexities": [[0, 3.0], [steps, 2.0]], "perplexity": {"teacher": 1.0}}
    page = model_page(made(retrained=[entry | {"tokens": 1024 * steps}]))
    assert page.count(f" in {1024 * steps:,} tokens</figcaption>") == 2
    loss, _ = re.findall(r'<path d="M([^"]*)" class="line" fill="none"', page)
    # Each point is in the middle of its steps.
    assert float(loss.split("L")[-1].split()[0]) == pytest.approx(CURVE_WIDTH * (1 - 0.5 / min(steps, 100)), rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--against", "out", "--report"], "secateur prune did not write this folder (no complete secateur"),
        (["out", "--against", "other", "--report"], "with which the report must compare it"),
        (["out", "--report"], "--report needs --against: add --against with the model that MODEL was pruned from"),
        (["out", "--prompt", " "], "a prompt is empty; give some words"),
        (["out", "--prompt", "w1 " * 64], "a prompt has 64 tokens, but the model has only 64 positions; shorten it"),
    ],
)
def test_eval_refuses(place, run, words, message):
    pruned(place, run)
    save("mistral", place / "other")
    before = (place / "out" / "README.md").read_text()
    result = run("eval", *words)
    assert (result.code, message in result.err.splitlines()[-1]) == (2, True), result.err
    assert (place / "out" / "README.md").read_text() == before


def test_the_card_of_a_retrained_folder_names_the_retraining(place, run):
    pruned(place, run)
    asked = ("--calibration", "text.txt", "--tokens", "128", "--length", "16")
    result = run("retrain", "out", "trained", *asked)
    assert (result.code, result.out.count("\n")) == (0, 1)
    assert result.out.startswith("Perplexity on held-out rows: ")
    text = (place / "trained" / "README.md").read_text()
    (said,) = record_of(place / "trained")["retrained"]
    assert f"from {said['perplexity']['before']:.2f} to {said['perplexity']['after']:.2f}." in text
    assert "Then the model was retrained." in text
    # What the pruning measured does not describe the trained weights.
    assert "Estimated loss increase by the last pruning: " in text
    # The commands make the same model, byte for byte.
    first, then = (shlex.split(line)[1:] for line in text.splitlines() if line.startswith("secateur "))
    assert first == shlex.split(record_of(place / "out")["command"])[1:]
    assert run(*[{"OUT": "again"}.get(word, word) for word in then]).code == 0
    assert (place / "again" / "README.md").read_text() == text
    assert weights_of(place / "again") == weights_of(place / "trained")
    assert "It was not trained afterwards." in (place / "out" / "README.md").read_text()
    page = (place / "trained" / "report.html").read_text()
    assert "Map and errors are those of the last pruning alone." in page
    assert page.count('class="line" fill="none"') == 2
    assert re.search(r'y="145" text-anchor="middle">50</text>', page)
    teacher, after = said["perplexity"]["teacher"], said["perplexity"]["after"]
    assert "Perplexity on held-out rows, ratio to that of the teacher: from " in page
    assert f" to {after / teacher:.3g} in 128 tokens" in page
    assert "Retraining" not in (place / "out" / "report.html").read_text()


BETWEEN = {"llama": "post_attention_layernorm", "mixtral": "post_attention_layernorm"}
BETWEEN |= {"granite biased": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm"}
"""Layer whose input is the residual stream between attention and feed-forward."""


@pytest.mark.parametrize("options", [{}, {"recovery": "bias"}, {"sparsity": 0.9, "effort": "quick"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BETWEEN)
def test_the_errors_are_those_of_the_written_model(tmp_path, name, dtype, options):
    """Measured in the dense and in the written model, on the calibration rows with their weights."""
    folder = save(name, tmp_path / "model", dtype)
    given = {"calibration": "random", "samples": 16, "length": 16} | options
    rows = draw_rows(open_model(folder, **given)).grouped
    prune(folder, tmp_path / "out", **given)
    models = [load_written(path, dtype=torch.float32) for path in (folder, tmp_path / "out")]
    for block in record_of(tmp_path / "out")["blocks"]:
        for module, (path, at) in zip(block["modules"], ((BETWEEN[name], 0), ("", 1)), strict=True):
            error = energy = count = 0.0
            for ids, weight in zip(rows.groups, rows.weights, strict=True):
                if weight:
                    dense, small = (seen(model, block["block"], path, ids)[at].double() for model in models)
                    error += weight * float((small - dense).square().sum())
                    energy, count = energy + weight * float(dense.square().sum()), count + weight * ids.numel()
            # Products of bfloat16 numbers are rounded, and rounding may route a token to another expert.
            near = {"rel": 0.1, "abs": 1e-4} if dtype == torch.bfloat16 else {"rel": 1e-3}
            assert module["relative"] == pytest.approx(error / energy, **near)
            assert module["error"] == pytest.approx(module["relative"] * energy / count, rel=0.01)


def test_the_drawing_of_errors_has_a_scale(place, run):
    """Its marks are powers of ten or parts of them."""
    record = pruned(place, run)
    page = (place / "out" / "report.html").read_text()
    marks = [float(mark) for mark in re.findall(r'text-anchor="end">([^<]+)<', page)]
    errors = [module["relative"] for block in record["blocks"] for module in block["modules"]]
    assert marks
    assert all(min(error for error in errors if error) <= mark <= max(errors) for mark in marks)


@pytest.mark.parametrize(("width", "scheme"), [(380, "dark"), (1280, "light")])
def test_in_a_browser(tmp_path, browser, scheme, width):
    """Nothing is fetched or complained of, all fits, every part is reached by the keyboard, and axe finds no fault."""
    file = tmp_path / "report.html"
    dense = made()["dense"][0]
    blocks = [made()["blocks"][0] | {"block": index} for index in range(40)]
    many = made(model=NASTY, dense=[dense] * 40, blocks=blocks)
    file.write_text(model_page(many, [("perplexity", "2", "1", "2.0")], [(NASTY, "a " * 200, "b")]), encoding="utf-8")
    assert file.stat().st_size < 100_000
    with Opened(browser, file, width, scheme) as opened:
        page = opened.page
        assert (opened.complaints, opened.requests) == ([], [file.as_uri()])
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("window.broken") is None
        reached = set()
        for _ in range(6):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.tagName + document.activeElement.ariaLabel"))
        assert {"SUMMARYnull", "DIVShare removed from each block: attention, below it feed-forward"} <= reached
        page.evaluate("document.querySelector('details').open = true")
        assert Axe().run(page).response["violations"] == []
