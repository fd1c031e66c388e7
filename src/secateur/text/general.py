"""Rows of the source `general`: several kinds of text from a file that comes with the package.

A pruned model keeps the abilities that its calibration rows use, so the rows hold several kinds of text. Text that
repeats itself matters most. Without it, the heads with which a model copies earlier tokens are removed first, and the
model loses names, source code and long contexts. docs/calibrate.md has the measurements behind the shares.
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

from secateur.text.documents import render_or_join
from secateur.text.windows import windows

ARTICLES, REPEATED, REPEATED_IDS = "encyclopaedia", "repeated", "repeated ids"
TEXT_SHARES = {ARTICLES: 20, "spaced": 20, "code": 20, "chat": 20, "mathematics": 16}
"""Parts of rows of each kind of text."""
SHARES = {**TEXT_SHARES, REPEATED: 24, REPEATED_IDS: 8}
"""Parts of rows of each kind, out of 128. Repeated rows hold a passage of text, or of random ids, twice."""
FILE = Path(__file__).with_name("general.jsonl.xz")
"""Documents, one JSON object a line: `kind`, and `text` or `messages`."""
TRAINING_FILE = FILE.with_name("general_training.jsonl.xz")
"""More documents, also of other kinds. Only a training reads them: they take seconds to tokenize."""


def general_documents(tokenizer: Any, to_train: bool = False) -> dict[str, list[str]]:
    """Return the documents of each kind of text; the tokenizer's chat template renders conversations.

    Args:
        tokenizer: The model's tokenizer.
        to_train: Whether the documents that only a training reads are among them.
    """
    found = _documents_of(FILE, TRAINING_FILE) if to_train else _documents_of(FILE)
    texts = {kind: _texts(documents, tokenizer) for kind, documents in found.items()}
    # Every second article is spaced, so that no article occurs in both kinds.
    articles = texts.pop(ARTICLES)
    return {ARTICLES: articles[::2], "spaced": [spaced(article) for article in articles[1::2]], **texts}


def general_rows(ids: dict[str, Tensor], *, samples: int, body: int, generator: torch.Generator) -> Tensor:
    """Draw rows of all kinds, spread evenly: every stretch of rows holds about the same mixture.

    Args:
        ids: Token ids of each kind of text (tokens).
        samples: Number of rows.
        body: Tokens in a row.
        generator: Source of randomness.

    Returns:
        Token ids, int64 (samples x body).
    """
    counts = rows_per_kind(samples)
    rows = [windows(text, counts[kind], body, generator) for kind, text in ids.items()]
    passage = -(-body // 2)
    per_kind = -(-counts[REPEATED] // len(ids))
    passages = torch.cat([windows(text, per_kind, passage, generator) for text in ids.values()])
    passages = passages[torch.randperm(len(passages), generator=generator)[: counts[REPEATED]]]
    # Uniform over the ids that occur in some text: the embeddings of other ids are hardly trained.
    known = torch.cat(list(ids.values())).unique()
    random_ids = known[torch.randint(len(known), (counts[REPEATED_IDS], passage), generator=generator)]
    return spread([*rows, *(once.repeat(1, 2)[:, :body] for once in (passages, random_ids))])


def rows_per_kind(samples: int) -> dict[str, int]:
    """Return the number of rows of each kind: its share of the samples, rounded so that the sum is `samples`."""
    total = sum(SHARES.values())
    ends = [round(samples * so_far / total) for so_far in accumulate(SHARES.values())]
    return {kind: end - start for kind, start, end in zip(SHARES, [0, *ends], ends, strict=False)}


def spread(parts: list[Tensor]) -> Tensor:
    """Return the rows of several tensors together; the rows of each tensor are spread evenly over the result."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def _texts(documents: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    """Return the texts of documents, with conversations as the tokenizer's chat template renders them."""
    return [render_or_join(one["messages"], tokenizer) if "messages" in one else one["text"] for one in documents]


_SPACINGS = (
    (r"(?<=\w)-(?=\w)", " @-@ "),
    (r'([;:!?()"\[\]]|,(?!\d)|\.(?=\s|$))', r" \1 "),
    (r"(?<=\d)([.,])(?=\d)", r" @\1@ "),
    (r"(?<=\w)('s|n't|'re|'ve|'ll|'d|')(?=\s|$)", r" \1"),
    (r"\n+", " \n "),
    (" +", " "),
)


def spaced(text: str) -> str:
    """Return a text in the spelling of WikiText and the Penn Treebank: spaces around every word and mark."""
    head, _, body = text.partition("\n")
    for pattern, replacement in _SPACINGS:
        body = re.sub(pattern, replacement, body)
    return f" = {head} = \n\n {body}"


@cache
def _documents_of(*files: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the documents of files by kind."""
    documents: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                documents.setdefault(document["kind"], []).append(document)
    return documents
