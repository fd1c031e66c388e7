"""`general`: rows of several kinds of text, out of a file that comes with the package.

A pruned model keeps what its calibration shows, on every kind of text only if it is shown every kind. Above all it must
see text that repeats itself: the heads by which a model copies what stood before are the first to go otherwise, and
with them names, source code and long contexts. docs/calibrate.md says what the shares were decided by.
"""

import json
import lzma
import re
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.model.tokens import encode
from secateur.text.documents import rendered
from secateur.text.windows import checked, windows

REPEATED, LOOSE = "repeated", "repeated ids"
SHARES = {
    "encyclopaedia": 20,
    "spaced": 20,
    "code": 20,
    "talk": 20,
    "mathematics": 16,
    REPEATED: 24,
    LOOSE: 8,
}
"""What is in the rows, and how much of each."""
FILE = Path(__file__).with_name("general.jsonl.xz")
"""Documents, a JSON object a line: `kind`, and `text` or `messages`."""


def general_rows(tokenizer: Any, *, samples: int, body: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Draw rows of all kinds, spread evenly: every stretch of rows holds about the same mixture.

    Args:
        body: tokens in a row.

    Returns:
        Token ids, int64 [samples, body].
    """
    counts = shared_out(samples)
    texts = [kind for kind in SHARES if kind not in (REPEATED, LOOSE)]
    ids = {kind: checked(encode(tokenizer, "\n\n".join(_documents(kind, tokenizer))), vocab_size) for kind in texts}
    found = {kind: windows(of, counts[kind], body, generator) for kind, of in ids.items()}
    passage = -(-body // 2)
    each = -(-counts[REPEATED] // len(ids))
    passages = torch.cat([windows(of, each, passage, generator) for of in ids.values()])
    passages = passages[torch.randperm(len(passages), generator=generator)[: counts[REPEATED]]]
    # Every id that some text holds is as likely; others are hardly trained.
    known = torch.cat(list(ids.values())).unique()
    loose = known[torch.randint(len(known), (counts[LOOSE], passage), generator=generator)]
    return spread([*found.values(), *(once.repeat(1, 2)[:, :body] for once in (passages, loose))])


def shared_out(samples: int) -> dict[str, int]:
    """How many rows of each kind there are: their shares, rounded so that they come to `samples`."""
    total = sum(SHARES.values())
    ends = [round(samples * so_far / total) for so_far in accumulate(SHARES.values())]
    return {kind: end - start for kind, start, end in zip(SHARES, [0, *ends], ends, strict=False)}


def spread(parts: list[Tensor]) -> Tensor:
    """Rows of several tensors, each as evenly spread over the result as its number allows."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def _documents(kind: str, tokenizer: Any) -> list[str]:
    """Texts of one kind."""
    if kind in ("encyclopaedia", "spaced"):
        # No article is there twice.
        articles = [document["text"] for document in _file()["encyclopaedia"]]
        return list(map(spaced, articles[1::2])) if kind == "spaced" else articles[::2]
    return [
        rendered(document["messages"], tokenizer) if "messages" in document else document["text"]
        for document in _file()[kind]
    ]


def spaced(text: str) -> str:
    """A text as corpora like WikiText and the Penn Treebank spell it: words and marks stand apart."""
    head, _, body = text.partition("\n")
    for pattern, by in (
        (r"(?<=\w)-(?=\w)", " @-@ "),
        (r'([;:!?()"\[\]]|,(?!\d)|\.(?=\s|$))', r" \1 "),
        (r"(?<=\d)([.,])(?=\d)", r" @\1@ "),
        (r"(?<=\w)('s|n't|'re|'ve|'ll|'d|')(?=\s|$)", r" \1"),
        (r"\n+", " \n "),
        (" +", " "),
    ):
        body = re.sub(pattern, by, body)
    return f" = {head} = \n\n {body}"


@cache
def _file() -> dict[str, list[dict[str, Any]]]:
    """All documents, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    with lzma.open(FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            found.setdefault(document["kind"], []).append(document)
    return found
