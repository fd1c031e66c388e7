"""Split the loss on conversations into the chat template's own words and the words of the messages.

    python benchmarks/chat.py DENSE PRUNED ... --texts TEXTS

Rows are those of the kind `chat` of basket.py, where the template adds the same words to every conversation. A model
that learns these words has a low perplexity on chats, even if it predicts the messages no better. For each model, the
script prints the mean negative log-likelihood of each kind of token, in nats, and the ratio of the perplexity to the
first model's. Tokens that are partly outside messages, such as blank lines between conversations, count as template.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basket import Basket, token_scores
from secateur import open_checkpoint
from secateur.measure.loading import load
from secateur.measure.perplexity import scoring
from secateur.text.documents import render_or_join


def inside_messages(tokenizer: Any, path: str, rows: Tensor) -> Tensor:
    """Return which tokens of the rows of a file of conversations are inside a message (bool, the shape of rows)."""
    text, inside = "", list[bool]()
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        conversation = render_or_join(messages, tokenizer) + "\n\n"
        mask, at = [False] * len(conversation), 0
        for message in messages:
            content = message["content"].strip()
            start = conversation.index(content, at)
            at = start + len(content)
            mask[start:at] = [True] * len(content)
        text, inside = text + conversation, inside + mask
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"][: rows.numel()] != rows.flatten().tolist():
        raise SystemExit("the rows are not the beginning of the file: use a tokenizer that adds no BOS")
    places = encoded["offset_mapping"][: rows.numel()]
    return torch.tensor([all(inside[start:end]) for start, end in places]).view_as(rows)


def losses(network: Any, rows: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token after the first of its row (rows x length - 1), in nats."""
    with scoring(network):
        return torch.cat([token_scores(network, part, part.shape[1] - 1)[1] for part in rows.split(8)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    dense = open_checkpoint(arguments.models[0])
    basket = Basket(dense, arguments.texts, arguments.tokens, dense.max_positions or 1 << 20, ["chat"])
    rows = basket.rows["chat"]
    own = inside_messages(basket.tokenizer, basket.file("chat"), rows)[:, 1:]
    print(f"{int(own.sum())} of {own.numel()} tokens are inside messages")
    first: list[float] = []
    for model in arguments.models:
        found = losses(load(open_checkpoint(model), torch.float32, torch.device("cpu")), rows)
        nats = [float(found[own].mean()), float(found[~own].mean())]
        first = first or nats
        print(Path(model).name)
        for kind, mine, its in zip(("messages", "template"), nats, first, strict=True):
            print(f"  {kind}: {mine:.3f} nats, {math.exp(mine - its):.3f} times the first model's perplexity")


if __name__ == "__main__":
    main()
