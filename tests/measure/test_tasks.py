"""Answers' likelihoods against a plain computation, and tasks on local files through lm-eval."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refused

from models import BOS, POSITIONS, ROWS, build, make_tokenizer
from outputs import error_of
from secateur.measure import Accuracy, accuracy_ratio, evaluation, open_tasks, tasks, zero_shot
from secateur.measure.evaluation import evaluate
from secateur.measure.tasks import AccuracyRatio
from secateur.report.tables import eval_table

PAIRS = [
    ("w1 w2 w3", " w4 w5"),
    ("w1 w2 w3", " w6"),
    ("w9 w8 w7", " w4 w5 w6 w7"),
    ("w9", " w1"),
    (" ".join(f"w{i}" for i in range(30)), " w3 w1 w4 w1 w5"),
    ("w1 w2 w3", " w7 w7 w7 w7 w7 w7"),
    ("w5 w6 ", "w7"),
    ("", "w5 w6"),
]
ITEMS = [
    {"query": f"w{i} w{i + 1}" + i % 2 * f" w{i + 2}", "choices": ["w3 w4", "w50", f"w{i} w9 w9"], "gold": i % 3}
    for i in range(10, 34)
]
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output}
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
NORM = "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"


def ids_of(question: str, answer: str, bos: bool) -> tuple[list[int], list[int]]:
    """Return token ids computed by hand: the tokenizer gives `w7` the id 11 and drops spaces."""
    before = [4 + int(word[1:]) for word in question.split()]
    after = [4 + int(word[1:]) for word in answer.split()]
    return [BOS, *before] if bos or not before else before, after


def plain(model: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of one pair from one forward without a cache, token by token in float64."""
    ids = [*before, *after]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    places = range(len(before) - 1, len(ids) - 1)
    log = math.fsum(float(logits[place].log_softmax(-1)[ids[place + 1]]) for place in places)
    return log, all(int(logits[place].argmax()) == ids[place + 1] for place in places)


class Source:
    """Substitute for a task of lm-eval that records its likelihoods."""

    def __init__(self) -> None:
        self.found: list[list[tuple[float, bool]]] = []

    def process_results(self, item: int, found: list[tuple[float, bool]]) -> dict[str, int]:
        assert item == len(self.found)
        self.found.append(found)
        return {"acc": 1}


def likelihoods(model: Any, tokenizer: Any, *items: list[tuple[str, str]], **watching: Any) -> list[Any]:
    """Return the likelihoods of each item's answers as `zero_shot` passes them to the task."""
    source = Source()
    zero_shot(model, tokenizer, [tasks.OpenTask("these", source, list(enumerate(items)))], **watching)
    return source.found


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]], tolerance: float = 1e-4) -> bool:
    """Equal likelihoods up to a relative tolerance, and the same answers greedy."""
    (logs, greedy), (wanted, best) = zip(*found, strict=True), zip(*expected, strict=True)
    return logs == pytest.approx(wanted, rel=tolerance) and greedy == best


@pytest.mark.parametrize(
    ("name", "bos", "logits", "items"),
    [
        *((name, False, 1 << 27, 64) for name in ROWS),
        ("llama", True, 1 << 27, 64),
        # Batches change nothing.
        *(("llama", False, logits, items) for logits, items in ((1, 64), (128 * 40 * 3, 64), (1 << 27, 1))),
    ],
)
def test_likelihoods_are_those_of_a_plain_computation(name, bos, logits, items, monkeypatch):
    monkeypatch.setattr(sys.modules[zero_shot.__module__], "_LOGITS", logits)
    monkeypatch.setattr(sys.modules[zero_shot.__module__], "_ITEMS_PER_STEP", items)
    model = build(name)
    found = likelihoods(model, make_tokenizer(bos=bos), PAIRS[:3], *([pair] for pair in PAIRS[3:]))
    expected = [plain(model, *ids_of(*pair, bos)) for pair in PAIRS]
    assert close([one for item in found for one in item], expected)


def test_a_question_too_long_loses_its_beginning():
    model = build("llama")
    words = [f"w{i % 100}" for i in range(POSITIONS + 10)]
    question, whole = " ".join(words), " " + " ".join(words[:POSITIONS])
    ((found, longest),) = likelihoods(model, make_tokenizer(), [(question, " w1 w2 w3"), ("w1", whole)])
    before, after = ids_of(question, "w1 w2 w3", False)
    assert close([found], [plain(model, before[-(POSITIONS - 2) :], after)])
    assert math.isfinite(longest[0])
    message = error_of(likelihoods, model, make_tokenizer(), [("w1", whole + " w1")])
    assert f"have 1 and {POSITIONS + 1} tokens, but only 1 to {POSITIONS} are" in message


def test_bad_models_and_texts_are_named():
    model, tokenizer = build("llama"), make_tokenizer()
    for pair, lengths in ((("w1", ""), "1 and 0"), ((" ", "w1"), "0 and 1")):
        assert f"have {lengths} tokens, but only 1 to {POSITIONS}" in error_of(likelihoods, model, tokenizer, [pair])
    model.get_input_embeddings().weight.data[5] = math.nan
    assert "logits are NaN" in error_of(likelihoods, model, tokenizer, PAIRS)
    model.resize_token_embeddings(40)
    message = error_of(likelihoods, model, tokenizer, [("w1", " w60")])
    assert "ids outside the model's vocabulary of 40; use" in message
    tokenizer.bos_token = tokenizer.eos_token = None
    assert "neither BOS nor EOS" in error_of(likelihoods, model, tokenizer, PAIRS)


def test_the_ratio_counts_only_items_on_which_models_differ():
    same = Accuracy.of([1, 0, 1, 1])
    assert accuracy_ratio(same, same) == AccuracyRatio(1.0, (1.0, 1.0))
    assert same.value == 0.75
    assert same.standard_error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert Accuracy.of([1]).standard_error is None
    assert accuracy_ratio(Accuracy.of([0, 0]), Accuracy.of([0, 1])) == AccuracyRatio(0.0, None)
    assert accuracy_ratio(Accuracy.of([0, 1]), Accuracy.of([0, 0])) is None


def test_the_interval_is_that_of_a_bootstrap_over_items():
    draw = np.random.default_rng(0)
    dense = (draw.random(800) < 0.7).astype(int)
    pruned = np.where(draw.random(800) < 0.2, 1 - dense, dense)
    found = accuracy_ratio(Accuracy.of(pruned.tolist()), Accuracy.of(dense.tolist()))
    picks = draw.integers(800, size=(4000, 800))
    expected = np.percentile(pruned[picks].sum(1) / dense[picks].sum(1), [2.5, 97.5])
    assert found.ratio == pruned.sum() / dense.sum()
    assert found.interval == pytest.approx(expected, abs=0.006)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files: mine counts both ways, other only one; bad ones of each kind."""
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    write = {"output": "multiple_choice", "file": data}
    (tmp_path / "mine.yaml").write_text(YAML.format(name="mine", **write) + NORM)
    (tmp_path / "other.yaml").write_text(YAML.format(name="other", **write))
    (tmp_path / "gone.yaml").write_text(YAML.format(name="gone", **write | {"file": tmp_path / "gone.jsonl"}))
    (tmp_path / "writes.yaml").write_text(YAML.format(name="writes", **write | {"output": "generate_until"}))
    (tmp_path / "f1.yaml").write_text(YAML.format(name="uncounted", **write).replace("metric: acc,", "metric: f1,"))
    (tmp_path / "hub.yaml").write_text(YAML.format(name="far", **write).replace(": json", ": nobody/nothing"))
    return tmp_path


def expected_outcomes(model: Any, items: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Argmax of the summed log-likelihood, and of it over the answer's length in characters."""
    acc, norm = [], []
    for item in items:
        logs = [plain(model, *ids_of(item["query"], answer, False))[0] for answer in item["choices"]]
        lengths = [len(answer) for answer in item["choices"]]
        acc.append(int(np.argmax(logs) == item["gold"]))
        norm.append(int(np.argmax(np.divide(logs, lengths)) == item["gold"]))
    return acc, norm


def test_a_task_is_scored_as_computed_by_hand(folder, capfd):
    model = build("llama")
    mine, other = zero_shot(model, make_tokenizer(), open_tasks(["mine", "other"], task_path=folder))
    acc, norm = expected_outcomes(model, ITEMS)
    assert 0 < sum(acc) < len(ITEMS)
    assert acc != norm
    assert (mine.name, mine.items, mine.acc.outcomes) == ("mine", len(ITEMS), acc)
    assert mine.acc_norm.outcomes == norm
    assert (other.acc, other.acc_norm) == (mine.acc, None)
    (few,) = zero_shot(model, make_tokenizer(), open_tasks(["mine"], limit=5, task_path=folder))
    assert few.acc.outcomes == acc[:5]
    assert capfd.readouterr() == ("", "")


def test_the_same_beginning_may_be_the_choice(tmp_path):
    items = [{"contexts": ["w1 w2", "w1 w3 w5"], "ending": f"w{i} w7", "gold": i % 2} for i in range(8)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    text = YAML.format(name="two", output="multiple_choice", file=tmp_path / "items.jsonl")
    for before, after in (("text: query", "text: gold"), ("target: gold", "target: ending"), ("choices", "contexts")):
        text = text.replace(before, after)
    (tmp_path / "two.yaml").write_text(text)
    model = build("llama")
    (found,) = zero_shot(model, make_tokenizer(), open_tasks(["two"], task_path=tmp_path))
    logs = [[plain(model, *ids_of(c, item["ending"], False))[0] for c in item["contexts"]] for item in items]
    assert found.acc.outcomes == [int(np.argmax(row) == item["gold"]) for row, item in zip(logs, items, strict=True)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "task gone cannot be loaded: "),
        ("writes", "task writes is not multiple-choice"),
        ("uncounted", "task uncounted does not measure accuracy"),
        (
            "far",
            "task far cannot be loaded .*data set nobody/nothing from the hub: that is not reachable .*--task-path",
        ),
    ],
)
def test_tasks_that_cannot_be_scored_are_named(folder, name, message, monkeypatch):
    monkeypatch.setattr(tasks, "out_of_reach", lambda: "it is a test")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    assert re.search(message, error_of(open_tasks, ["mine", name], task_path=folder))


def test_the_papers_tasks_are_lm_evals():
    # The first name that is missing is the one complained about.
    names = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "piqaa"]
    assert re.search("task 'piqaa' does not exist in lm-eval; near it: .*piqa", error_of(open_tasks, names))
    assert "the limit is 0" in error_of(open_tasks, ["mine"], limit=0)
    assert "nowhere: no such folder" in error_of(open_tasks, ["mine"], task_path=Path("nowhere"))


def test_two_models_are_compared_by_item(checkpoint_folder, folder):
    first, second = str(checkpoint_folder("llama")), str(checkpoint_folder("llama tied"))
    result = evaluate(first, against=second, texts=[], tasks=["mine"], task_path=folder)
    figures = {figure.label: figure for figure in result.figures()}
    scores, figure = [model.tasks[0].acc for model in result.models], figures["mine acc"]
    assert scores[0].outcomes == expected_outcomes(build("llama"), ITEMS)[0]
    assert figure.values == [score.value for score in scores]
    assert figure.errors == tuple(score.standard_error for score in scores)
    part = accuracy_ratio(*scores)
    assert (figure.ratio, figure.interval) == (part.ratio, part.interval)
    written = json.loads(json.dumps(result.as_dict()))
    assert written["models"][1]["tasks"][0]["acc"]["outcomes"] == "".join(map(str, scores[1].outcomes))
    assert written["accuracy_ratios"]["mine acc"]["ratio"] == part.ratio
    table, lines = eval_table(result)
    cells = [list(column.cells) for column in table.columns]
    row = cells[0].index("mine acc")
    assert cells[1][row] == f"{scores[0].value:.3f} ± {scores[0].standard_error:.3f}"
    assert cells[3][row].startswith(f"{part.ratio:.1%} (")
    assert lines == [
        f"Zero-shot: mine {len(ITEMS)} items; ± one standard error; ratios with a 95 % interval, paired by item."
    ]
    alone = evaluate(first, texts=[], tasks=["mine"], limit=3, task_path=folder)
    assert alone.models[0].tasks[0].items == 3
    assert alone.accuracy_ratios() == {}
    assert all(figure.ratio is None for figure in alone.figures())


def test_the_command_writes_tasks_and_refuses_typos_in_one_line(checkpoint_folder, folder, run, monkeypatch):
    command, out = ["eval", str(checkpoint_folder("llama")), "--task-path", str(folder)], folder / "figures.json"
    found = run(*command, "--tasks", "mine, other", "--limit", "6", "--json", str(out))
    assert "Zero-shot: mine 6 items, other 6 items; ± one standard error." in found.out
    (model,) = json.loads(out.read_text())["models"]
    assert [(task["name"], len(task["acc"]["outcomes"])) for task in model["tasks"]] == [("mine", 6), ("other", 6)]
    monkeypatch.setattr(evaluation, "load", lambda *_: pytest.fail("a model was loaded"))
    refused(run(*command, "--tasks", "mine,gone"), "task gone cannot be loaded: ")
    refused(run(*command, "--tasks", "mine", "--limit", "-1"), "Invalid value for '--limit'")
