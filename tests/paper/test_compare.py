"""Comparisons: figures are those of prune and eval by hand, work is shared, and a killed one goes on where it was."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import TEXT, Result, Run, listing, refused
from rich.console import Console

from models import GROUPED, _config
from outputs import edited_weights
from paper import compare as compare_step
from paper.__main__ import main
from paper.recipe import FOLDER, recipe_names
from paper.store import Store
from secateur import SecateurError
from secateur.cli import terminal
from secateur.measure.evaluation import evaluate
from secateur.retraining.retrain import retrain
from secateur.steps import draw_rows, survey_model
from secateur.steps import open_model as open_step
from secateur.steps.prune import prune
from secateur.text import calibration, draw

GRID: dict[str, Any] = {
    "title": "Small",
    "options": {"calibration": "text.txt", "samples": 4, "length": 16, "format": "hf", "recovery": "none"},
    "runs": {"wanda": {"criterion": "wanda"}, "L2": {"criterion": "l2", "widths": "uniform"}},
    "grid": {"sparsity": [0.2, 0.4], "seed": [0, 1]},
    "evaluation": {"perplexity": ["held.txt"], "tokens": 160},
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that runs `python -m paper` with the given arguments in this process."""
    monkeypatch.setattr(terminal, "log", Console(file=None, stderr=True, highlight=False, markup=False, width=120))

    def call(*arguments: str) -> Result:
        code = main([str(one) for one in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def grid(place: Path) -> Path:
    """The working folder with a recipe and a text to score."""
    (place / "held.txt").write_text(" ".join(reversed(TEXT.split())))
    (place / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    return place


MORE_ROWS = {"llama one block": _config("llama", "num_hidden_layers", **GROUPED, num_hidden_layers=1)}
ALL_BLOCKS = ("figure3", "figure5", "table3")
"""Recipes that are about all blocks; for the others, a model with one block is enough."""
COMPARE = ("model", "grid.yaml", "--out", "out")


@pytest.fixture(scope="module")
def place_of_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.fixture
def whole(grid: Path, run: Run, place_of_whole: Path) -> Path:
    """The output of the recipe, which is made once for all tests."""
    if not place_of_whole.exists():
        assert run(*COMPARE).code == 0
        (grid / "out").rename(place_of_whole)
    return place_of_whole


@pytest.fixture
def out(grid: Path, whole: Path) -> Path:
    """A copy of this output in the working folder."""
    return shutil.copytree(whole, grid / "out")


def forget(out: Path, option: str, value: Any) -> None:
    """Delete the results of the runs that have a value of an option."""
    for file in (out / "runs").glob("*.json"):
        if json.loads(file.read_text())["decided_by"].get("options", {}).get(option) == value:
            file.unlink()


def tables(out: Path) -> tuple[str, str, Any, bytes]:
    """All that must not vary; seconds do."""
    found = json.loads((out / "table.json").read_text())
    for row in found["rows"]:
        del row["seconds"]
    plot = (out / "sparsity.png").read_bytes()
    return (out / "table.md").read_text(), (out / "table.csv").read_text(), found, plot


def test_figures_are_those_of_prune_and_eval(grid, run, out):
    found = json.loads((out / "table.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["dense", *(f"{label}, sparsity {share}" for label in ("wanda", "L2") for share in (0.2, 0.4))]
    assert rows["dense"]["figures"]["held.txt"]["values"] == [score("model")]
    for label, options in GRID["runs"].items():
        values = []
        for seed in (0, 1):
            folder = f"by-hand-{label}-{seed}"
            summary = prune("model", folder, sparsity=0.4, seed=seed, **GRID["options"], **options)
            values.append(score(folder))
        row = rows[f"{label}, sparsity 0.4"]
        figures = row["figures"]["held.txt"]
        assert figures["values"] == values
        assert (figures["least"], figures["most"]) == (min(values), max(values))
        assert figures["mean"] == pytest.approx(sum(values) / 2)
        assert row["sparsity"] == pytest.approx(summary.sparsity, abs=0.02)
        assert len(row["seconds"]) == 2
    with (out / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == list(rows)
    assert float(lines[-1]["held.txt most"]) == rows["L2, sparsity 0.4"]["figures"]["held.txt"]["most"]
    assert "seconds" not in lines[0]
    # Method, removed share, heads, channels and figure.
    assert {line.count("|") for line in (out / "table.md").read_text().splitlines() if line[:1] == "|"} == {6}
    # No weights stay, and nothing lies around.
    assert {file.name for file in out.iterdir()} == {
        *("table.md", "table.csv", "table.json", "sparsity.png", "runs", "surveys", ".lock")
    }


def test_shared_work_is_done_once(grid, run, calls_of, monkeypatch):
    surveys, reads = calls_of(survey_model, "survey"), calls_of(calibration, "read_documents")
    assert run(*COMPARE, "--seeds", "0", "--calibration", str(grid / "text.txt")).code == 0
    # One for each criterion, whatever the sparsity.
    assert sorted(named["criterion"].choice.text for *_, named in surveys) == ["l2", "wanda"]
    assert sorted(Path(source).name for source, *_ in reads) == ["held.txt", "text.txt"]
    # The table has the name of the text, and not its folder.
    said = (grid / "out" / "table.md").read_text()
    assert "calibration text.txt, samples 4" in said
    assert "Seed 0." in said
    assert str(grid) not in said
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    refused(run(*COMPARE), "MB of disk space, but 0.00 MB are free; free some")


def test_only_missing_runs_are_executed(grid, run, whole, out, calls_of):
    prunings = calls_of(compare_step, "prune")
    result = run(*COMPARE)
    assert (result.code, len(prunings)) == (0, 0)
    assert "9 of 9 runs are in out already" in result.err
    forget(out, "sparsity", 0.4)
    shutil.rmtree(out / "surveys")
    assert run(*COMPARE).code == 0
    assert [opened.options.sparsity for opened, *_ in prunings] == [0.4] * 4
    assert tables(out) == tables(whole)
    # One more point of the grid is all that is new; another text makes all runs others.
    (grid / "grid.yaml").write_text(
        yaml.safe_dump(GRID | {"grid": {"sparsity": [0.2, 0.4], "seed": [0, 1, 2]}}, sort_keys=False)
    )
    assert run(*COMPARE).code == 0
    assert [opened.options.seed for opened, *_ in prunings[4:]] == [2] * 4
    (grid / "text.txt").write_text(TEXT[::-1].replace("w", " w"))
    assert run(*COMPARE, "--seeds", "0").code == 0
    assert len(prunings) == 8 + 4


ENDS = [
    (KeyboardInterrupt(), 130, "interrupted: finished runs are in out; run the same command to resume", 6),
    (SecateurError("nothing goes"), 2, "error: 2 of 9 runs failed; the first: model L2, sparsity 0.2, seed 1: ", 7),
]


@pytest.mark.parametrize(("error", "code", "said", "finished"), ENDS)
def test_an_interrupt_ends_all_runs_and_a_failure_no_other(error, code, said, finished, run, whole, out, monkeypatch):
    prune_run = compare_step.prune

    def broken(opened: Any, *given: Any, **more: Any) -> Any:
        if opened.options.criterion == "l2" and opened.options.seed:
            raise error
        return prune_run(opened, *given, **more)

    forget(out, "criterion", "l2")
    with monkeypatch.context() as patch:
        patch.setattr(compare_step, "prune", broken)
        result = run(*COMPARE)
    assert result.code == code
    assert result.err.splitlines()[-1].startswith(said)
    assert f"So far {finished} of 9 runs." in (out / "table.md").read_text()
    assert not (out / ".scratch").exists()
    assert run(*COMPARE).code == 0
    assert tables(out) == tables(whole)


def test_a_killed_comparison_goes_on(grid, run, whole):
    # A fork of this process, which has imported everything.
    if not (child := os.fork()):
        try:
            run(*COMPARE)
        finally:
            os._exit(1)
    try:
        while len(list((grid / "out" / "runs").glob("*.json"))) < 2:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.005)
    finally:
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kept = {file: file.read_bytes() for file in (grid / "out" / "runs").glob("*.json")}
    assert 2 <= len(kept) < 9
    assert run(*COMPARE).code == 0
    assert {file: file.read_bytes() for file in kept} == kept
    assert tables(grid / "out") == tables(whole)
    assert not (grid / "out" / ".scratch").exists()


def part_heads(folder: Path) -> None:
    """Let the last two heads of each block attend far more sharply than the others: some are alike, some are not."""
    with edited_weights(folder) as tensors:
        for name, weight in tensors.items():
            if name.endswith("q_proj.weight"):
                weight[32:48] *= 6
            if name.endswith("c_attn.weight"):
                weight[:, 32:48] *= 6


@pytest.mark.parametrize(
    ("name", "row", "paper"),
    [
        *((name, "llama" if name in ALL_BLOCKS else "llama one block", "LLaMA-7B") for name in recipe_names()),
        # What only models without a gate, or with one bias a layer, meet.
        *((name, "gpt2", "GPT-2") for name in ("figure5", "table3")),
    ],
)
def test_every_recipe_runs(name, row, paper, grid, run, checkpoint_folder, monkeypatch):
    # A tiny model has few widths, so that it may miss the paper's sparsities by more.
    monkeypatch.setattr("secateur.plan.reach.LARGEST_MISS", 1.0)
    folder = {"LLaMA-7B": "llama-7b", "GPT-2": "gpt2"}[paper]
    shutil.copytree(checkpoint_folder(row), grid / folder)
    if name == "table3":
        part_heads(grid / folder)
    samples, refit = ("2,4" if name == figure else "4" for figure in ("figure4a", "figure4b"))
    small = f"--calibration text.txt --samples {samples} --refit-samples {refit} --length 16 --tokens 64 --seeds 0 "
    small += f"--blocks {'0:3' if name in ALL_BLOCKS else '0:1'} --tasks none "
    small += "--perplexity wikitext2=held.txt --perplexity ptb=text.txt"
    result = run(folder, name, "--out", "out", *small.split())
    assert result.code == 0, result.err
    found = json.loads((grid / "out" / "table.json").read_text())
    if plot := {"figure3": "graph", "figure5": "activations"}.get(name):
        assert [len(blocks) for blocks in found["models"].values()] == [3]
        assert (grid / "out" / f"{plot}.png").stat().st_size > 10_000
        return
    measured = [row for row in found["rows"] if row["figures"]["ptb"].get("mean") is not None]
    assert len(measured) == found["planned"] == found["finished"]
    assert all(0 < row["sparsity"] < 1 for row in measured[1:])
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    published = recipe["models"].get(paper, {}).get("published", {})
    assert {row["row"]: row["figures"]["ptb"]["published"] for row in found["rows"] if row["row"] in published} == {
        row: figures["ptb"] for row, figures in published.items()
    }
    plot = {"figure4a": "samples", "figure4b": "refit_samples", "table2": "sparsity"}.get(name, "rows")
    assert (grid / "out" / f"{plot}.png").exists()


def small(folder: Path, **fields: Any) -> list[str]:
    """The arguments for a recipe of one run, half of whose fields are as in `GRID`."""
    recipe = GRID | {"grid": {"seed": [0, 1]}} | fields
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["model", "small.yaml", "--out", "out"]


def values(row: str) -> list[float]:
    found = json.loads(Path("out/table.json").read_text())
    figures: list[float] = next(one for one in found["rows"] if one["row"] == row)["figures"]["held.txt"]["values"]
    return figures


def score(folder: str) -> float:
    return evaluate(folder, texts=["held.txt"], length=16, tokens=160).models[0].texts["held.txt"].perplexity


OWN, REFIT = {"recovery": "paper", "calibration": "self", "refit_samples": 3}, {"recovery": "refit"}
VECTOR = {"criterion": "llm-pruner-vector", "widths": "uniform"}
SHARED: dict[str, tuple[Any, str, dict[str, dict[str, Any]], int]] = {
    "generated rows": (draw, "self_rows", {"a": {"criterion": "wanda", **OWN}, "b": {"criterion": "l2", **OWN}}, 1),
    "resampled rows": (
        draw_rows,
        "resample_tokens",
        {
            "a": {"criterion": "wanda", **REFIT},
            "b": {"criterion": "l2", "ridge": 0.1, **REFIT},
            "two fits": {"criterion": "l2", "effort": "best", **REFIT},
            "fitted to others": {"criterion": "l2", "refit_samples": 3, **REFIT},
        },
        3,
    ),
    # Once with the survey's rows, and once with all of them.
    "gradients": (
        open_step,
        "gradient_scores",
        {"a": {"sparsity": 0.2, **VECTOR}, "b": {"sparsity": 0.4, **VECTOR}},
        2,
    ),
}
"""Functions whose results runs share, some runs, and the number of calls."""


@pytest.mark.parametrize("case", SHARED)
def test_runs_share_what_takes_long_and_give_the_figures_of_single_runs(case, grid, run, calls_of):
    owner, name, runs, times = SHARED[case]
    calls = calls_of(owner, name)
    assert run(*small(grid, runs=runs, grid={"seed": [3]})).code == 0
    assert len(calls) == times
    found = {name: values(name) for name in runs}
    for name, options in runs.items():
        prune("model", name, **GRID["options"] | options, seed=3)
        assert found[name] == [score(name)]


def test_a_row_can_be_retrained(grid, run):
    training = {"teacher": "none", "rank": 8, "tokens": "96", "batch": 3, "learning_rate": 0.01}
    runs = {"L2": {"criterion": "l2"}, "LoRA": {"criterion": "l2"}}
    seeds = {"seed": [3]}
    assert run(*small(grid, runs=runs, retrain={"LoRA": training}, grid=seeds)).code == 0
    prune("model", "hand", **GRID["options"], criterion="l2", seed=3)
    retrain("hand", "more", calibration="text.txt", length=16, seed=3, device="cpu", **training)
    assert values("L2") == [score("hand")]
    assert values("LoRA") == [score("more")]
    table = (grid / "out" / "table.md").read_text()
    assert "LoRA: trained adapters of rank 8 on 96 tokens of text.txt, in rows of 16, to predict the text." in table
    # Another training makes another result, and of that row alone.
    result = run(*small(grid, runs=runs, retrain={"LoRA": training | {"batch": 2}}, grid=seeds))
    assert "2 of 3 runs are in out already" in result.err
    assert values("LoRA") != [score("more")]


WRONG = [
    ("model nothing", "recipe 'nothing' does not exist; name a .yaml file or one of figure3"),
    ("grid.yaml", "the recipe names no model; give one before the recipe"),
    ("model model grid.yaml", "model model is given twice; leave one out"),
    ("model grid.yaml --out model", "model: exists and is not the folder of a comparison; name a new folder"),
    ("model grid.yaml --seeds=-1", "runs.wanda: seed is -1; it must lie between 0 and"),
    ("model grid.yaml --samples 2,4", "samples is 2, 4, but the recipe has no axis for it; give one"),
    ("model lora.yaml --refit-samples 0", "retrain.wanda: tokens is 0, but one step takes 1 rows of"),
    ("model grid.yaml --calibration gone.txt", "gone.txt does not exist: check the path of the text"),
    ("model grid.yaml --perplexity a=text.txt --perplexity a=text.txt", "two texts are called a;"),
    ("model grid.yaml --perplexity random", "random is no text that can be scored; name a text file or"),
    ("model grid.yaml --limit=-5 --tasks piqa", "the limit is -5; it must be at least 1 item"),
    ("model lora.yaml", "LoRA retraining needs peft, which is not installed; pip install"),
    ("model grid.yaml --out busy", "busy: in use by another comparison; wait"),
    ("model wide.yaml", "model, L1, sparsity 0.9999: sparsity 100.0% is out of reach"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_mistakes_come_before_work(arguments, message, grid, run, monkeypatch):
    monkeypatch.setattr(compare_step, "execute", lambda *_: pytest.fail("a mistake was found after long work"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    recipes: dict[str, dict[str, Any]] = {
        "wide": {"runs": {"L1": {"criterion": "l1"}}, "grid": {"sparsity": [0.2, 0.9999]}},
        "lora": {"retrain": {"wanda": {"rank": 8}}},
    }
    for name, changes in recipes.items():
        (grid / f"{name}.yaml").write_text(yaml.safe_dump(GRID | changes))
    (grid / "busy").mkdir()
    words = arguments.split()
    with Store(grid / "busy"):
        before = listing(grid)
        refused(run(*words, *([] if "--out" in words else ["--out", "out"])), message)
        assert listing(grid) == before
