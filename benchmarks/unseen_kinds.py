"""Kinds of text that the calibration text `general` does not contain.

WikiText-2 is made of articles of Wikipedia, and `general` has articles in WikiText's spelling, with spaces around every
word and mark; but none of the articles are the same.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from kinds import HALVES, Document, Folders, Kind, half, packaged

PASSAGE = 2_000
"""Smallest number of characters of a passage: with short ones, 8,192 tokens come from many books or files."""
ARTICLE = 400
"""Smallest number of characters of a dictionary's article."""
TRIVIA = ("2015", "2016", "artandliterature", "computers", "entertainment", "games", "general", "greekmyth", "sports")
"""Lists of trivia questions about the world, not about one game, and without pictures."""


def wikitext(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield articles of WikiText-2's test set; each half is a file."""
    for name, file in zip(HALVES, ("wikitext2_calibration.txt", "wikitext2_eval.txt"), strict=True):
        yield name, {"text": (folders.data / file).read_text(encoding="utf-8")}


def treebank(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield the Penn Treebank's validation split, for scoring only."""
    yield "evaluation", {"text": (folders.data / "ptb_valid.txt").read_text(encoding="utf-8")}


def web(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield pages of C4."""
    for line in (folders.data / "c4_sample.jsonl").read_text(encoding="utf-8").splitlines():
        yield half(line), json.loads(line)


def novels(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield passages of Jane Austen's six novels, for scoring only."""
    for lines in r_strings(unpacked(folders, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")):
        yield from scored(passages(unwrapped("\n".join(lines))))


def dictionary(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield articles of the Free On-line Dictionary of Computing, for scoring only."""
    with gzip.open(unpacked(folders, "usr/share/dictd/foldoc.dict.dz"), "rt", encoding="utf-8") as file:
        articles = re.split(r"\n(?=\S)", file.read())
    # Braces mark references to other articles; brackets hold notes of the editor.
    texts = (unwrapped(re.sub(r"[{}]|^ +\[.*?\]$", "", article, flags=re.M | re.S)) for article in articles)
    yield from scored(text for text in texts if len(text) >= ARTICLE)


def trivia(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield trivia questions with their first answer, for scoring only."""
    for name in TRIVIA:
        file = packaged("redbot", f"ext/trivia/lists/{name}.yaml")
        questions = yaml.safe_load(file.read_text(encoding="utf-8"))
        questions.pop("AUTHOR", None)
        yield from scored(f"Question: {question}\nAnswer: {answers[0]}" for question, answers in questions.items())


def python(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield passages of the source of two Python packages, without tests, for scoring only."""
    for package in ("sympy", "networkx"):
        for path in sorted(packaged(package, "").rglob("*.py")):
            if "tests" not in path.parts:
                yield from scored(passages(path.read_text(encoding="utf-8")))


def javascript(folders: Folders) -> Iterator[tuple[str, Document]]:
    """Yield passages of the source of a JavaScript package, for scoring only."""
    for path in sorted(unpacked(folders, "package/lib").rglob("*.js")):
        yield from scored(passages(path.read_text(encoding="utf-8")))


def scored(texts: Iterator[str]) -> Iterator[tuple[str, Document]]:
    """Yield texts as documents for scoring only."""
    return (("evaluation", {"text": text}) for text in texts)


def passages(text: str) -> Iterator[str]:
    """Yield a text in passages that end with a line; an incomplete last passage is left out."""
    passage = ""
    for line in text.splitlines(keepends=True):
        passage += line
        if len(passage) >= PASSAGE:
            yield passage.strip("\n")
            passage = ""


def unwrapped(text: str) -> str:
    """Return a text with each of its paragraphs on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def unpacked(folders: Folders, path: str) -> Path:
    """Return a file or folder of an unpacked package."""
    if not (folders.unpacked / path).exists():
        raise SystemExit(f"{folders.unpacked / path} does not exist: the first lines of texts.py say how to get it")
    return folders.unpacked / path


def r_strings(file: Path) -> Iterator[list[str]]:
    """Yield the character vectors in a file of R's database format.

    An object is the length of its bytes, followed by its bytes, which zlib has compressed. A vector is a header of 27
    bytes, the number of strings, and the strings: four bytes of flags, the length and the bytes of each.
    """
    data = file.read_bytes()
    while data:
        decompressor = zlib.decompressobj()
        vector, data = decompressor.decompress(data[4:]), decompressor.unused_data
        strings, at = [], 31
        for _ in range(int.from_bytes(vector[27:31], "big")):
            start = at + 8
            at = start + int.from_bytes(vector[at + 4 : start], "big")
            strings.append(vector[start:at].decode("utf-8"))
        yield strings


UNSEEN: dict[str, Kind] = {
    "wikitext": wikitext,
    "treebank": treebank,
    "web": web,
    "novels": novels,
    "dictionary": dictionary,
    "trivia": trivia,
    "python": python,
    "javascript": javascript,
}
"""Kinds of text that `general` does not contain."""
