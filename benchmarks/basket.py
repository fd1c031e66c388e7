"""What pruned models can still do, beside the dense one: eight kinds of text, copying, answers, tasks.

    python benchmarks/texts.py TEXTS --data FOLDER
    python benchmarks/basket.py DENSE PRUNED ... --texts TEXTS

prints a row for each model, and beside what a person would see of each: perplexity over dense on every kind of text,
the geometric mean and the worst of these; copying in context; how many tokens of the dense model's greedy answers the
pruned model would have chosen too, and how many free answers repeat a piece of eight tokens. `--fast` leaves answers
out, `--peers` prunes by other methods in memory, `--tasks` adds zero-shot accuracies, from the files that TASK_DATA
names, and `--json FILE` keeps all figures.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from peers import PEERS, pruned_by
from secateur import BlockStream, Options, consecutive_rows, open_checkpoint
from secateur.measure.compare import load
from secateur.measure.perplexity import perplexity, scoring
from secateur.measure.tasks import open_tasks, zero_shot
from secateur.model.checkpoint import Checkpoint
from secateur.model.tokens import encode
from secateur.text.documents import read_documents
from tables import put
from texts import KINDS

LONG = "wikipedia"
"""Scored in rows of 2,048 too."""
COPIED, PROSE, KEYS = 100, 100, 60
"""Rows of each copying test."""
PIECE = 60
"""Tokens that are given twice."""
DISTANCES = (200, 500, 1000, 2000)
"""Tokens between a key with its value and the question for it."""
PROMPTS, ANSWER = 100, 96
REPEATED = 8
"""Tokens of the piece that an answer which repeats itself holds twice."""


class Basket:
    """Everything that is asked of a model, drawn once."""

    def __init__(self, checkpoint: Checkpoint, texts: Path, tokens: int, positions: int):
        self.tokenizer, self.texts = checkpoint.tokenizer(), texts
        vocab = checkpoint.config.vocab_size
        how: dict[str, Any] = {"vocab_size": vocab, "tokens": tokens}
        self.rows = {kind: consecutive_rows(self.tokenizer, self.file(kind), length=128, **how) for kind in self.kinds}
        if positions >= 2048:
            self.rows["long"] = consecutive_rows(self.tokenizer, self.file(LONG), length=2048, **how)
        generator = torch.Generator().manual_seed(0)
        # Ids that no text holds are hardly trained, and no model copies them well.
        plain = torch.cat([rows.flatten() for rows in self.rows.values()]).unique()
        plain = plain[~torch.isin(plain, torch.tensor(self.tokenizer.all_special_ids))]
        ids = plain[torch.randint(len(plain), (COPIED, PIECE), generator=generator)]
        prose = self.rows["web"].flatten()
        prose = prose[: prose.numel() // PIECE * PIECE].view(-1, PIECE)[:PROSE]
        self.twice = {"ids twice": torch.cat([ids, ids], 1), "prose twice": torch.cat([prose, prose], 1)}
        self.keys = list(self.hidden_values(positions))
        self.prompts = list(self.questions())

    @property
    def kinds(self) -> list[str]:
        """What is scored; of talk only models that have a form for it."""
        return [kind for kind in KINDS if kind != "talk" or self.tokenizer.chat_template]

    def file(self, kind: str) -> str:
        """The half of a kind that is scored."""
        return str(self.texts / f"{kind}.evaluation.jsonl")

    def hidden_values(self, positions: int) -> Iterator[tuple[Tensor, int]]:
        """A value that is named once, text, and the question for it; how many of the last tokens are the value."""
        random = Random(0)
        filler = encode(self.tokenizer, "\n\n".join(read_documents(self.file(LONG)))[:400_000])
        for at in range(KEYS):
            name = random.choice(["garden", "harbour", "library", "station", "museum", "bakery", "school", "castle"])
            value = encode(self.tokenizer, f" {random.randrange(10_000, 100_000)}")
            start = encode(self.tokenizer, f"The number of the {name} is")
            distance = DISTANCES[at % len(DISTANCES)]
            if distance + 40 < positions:
                place = random.randrange(len(filler) - distance)
                between = filler[place : place + distance]
                end = encode(self.tokenizer, ".\n\n"), encode(self.tokenizer, f"\n\nThe number of the {name} is")
                yield torch.tensor(start + value + end[0] + between + end[1] + value), len(value)

    def questions(self) -> Iterator[Tensor]:
        """First questions of conversations, ready to be answered."""
        for line in Path(self.file("talk")).read_text(encoding="utf-8").splitlines():
            ask = json.loads(line)["messages"][0]["content"]
            if self.tokenizer.chat_template:
                messages = [{"role": "user", "content": ask}]
                ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            else:
                ids = encode(self.tokenizer, f"Question: {ask}\nAnswer:")
            if len(ids) <= 200:
                yield torch.tensor(ids)


def perplexities(network: Any, basket: Basket) -> dict[str, float]:
    """Of each kind of text."""
    return {kind: perplexity(network, rows).perplexity for kind, rows in basket.rows.items()}


def copying(network: Any, basket: Basket) -> dict[str, tuple[float, float]]:
    """Accuracy and nats of a token that could be copied."""
    found = {}
    with scoring(network):
        for name, rows in basket.twice.items():
            parts = [told(network, part, PIECE - 1) for part in rows.split(16)]
            found[name] = mean(torch.cat([part.flatten(1) for part in parts], 1))
        parts = [told(network, ids[None], count) for ids, count in basket.keys]
        found["key and value"] = mean(torch.cat([part.flatten(1) for part in parts], 1))
    return found


def told(network: Any, ids: Tensor, last: int) -> Tensor:
    """Whether each of the last tokens is the likeliest, and its negative log likelihood (2 x rows x last)."""
    logits = network(input_ids=ids, use_cache=False, logits_to_keep=last + 1).logits[:, :-1].float()
    wanted = ids[:, -last:]
    nats = logits.logsumexp(-1) - logits.gather(-1, wanted[..., None])[..., 0]
    return torch.stack([(logits.argmax(-1) == wanted).float(), nats])


def mean(told: Tensor) -> tuple[float, float]:
    """Accuracy and nats."""
    return float(told[0].double().mean()), float(told[1].double().mean())


def answers(network: Any, basket: Basket) -> list[list[int]]:
    """Greedy answers, without what stands behind their end."""
    written: list[list[int]] = []
    prompts, end = basket.prompts[:PROMPTS], basket.tokenizer.eos_token_id
    with scoring(network):
        for at in range(0, len(prompts), 50):
            batch = prompts[at : at + 50]
            width = max(map(len, batch))
            ids = torch.stack([torch.nn.functional.pad(one, (width - len(one), 0), value=end) for one in batch])
            mask = torch.stack([(torch.arange(width) >= width - len(one)).long() for one in batch])
            made = network.generate(
                ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False, eos_token_id=end, pad_token_id=end
            )[:, width:]
            written += [one[: one.index(end)] if end in one else one for one in made.tolist()]
    return written


def agreement(network: Any, basket: Basket, dense: list[list[int]]) -> float:
    """Share of the dense model's greedy tokens that this one would have chosen behind the same text."""
    right = torch.zeros(2, dtype=torch.float64)
    with scoring(network):
        for prompt, answer in zip(basket.prompts, dense, strict=False):
            if answer:
                hits = told(network, torch.cat([prompt, torch.tensor(answer)])[None], len(answer))[0]
                right += torch.tensor([hits.sum(), hits.numel()], dtype=torch.float64)
    return float(right[0] / right[1])


def repeats(answer: list[int]) -> bool:
    """Whether a piece of some tokens stands in an answer twice."""
    pieces = [tuple(answer[at : at + REPEATED]) for at in range(len(answer) - REPEATED + 1)]
    return len(set(pieces)) < len(pieces)


def measured(network: Any, basket: Basket, dense: dict[str, Any], fast: bool, tasks: list[str]) -> dict[str, Any]:
    """All figures of one model; `dense` are the dense one's, empty where this is it."""
    found: dict[str, Any] = {"perplexity": perplexities(network, basket), "copying": copying(network, basket)}
    if not fast:
        found["answers"] = answers(network, basket)
        found["repeats"] = sum(map(repeats, found["answers"])) / len(found["answers"])
        found["agreement"] = agreement(network, basket, (dense or found)["answers"])
    if tasks:
        opened = open_tasks(tasks, task_path=Path(__file__).parent / "tasks")
        scores = zero_shot(network, basket.tokenizer, opened)
        found["tasks"] = {score.name: (score.acc_norm or score.acc).value for score in scores}
    return found


def row(name: str, found: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """A model's cells."""
    ratios = {kind: value / dense["perplexity"][kind] for kind, value in found["perplexity"].items()}
    centre = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    cells = [name, *(f"{ratio:.2f}" for ratio in ratios.values()), f"**{centre:.3f}**", f"{max(ratios.values()):.2f}"]
    cells += [f"{share:.1%}, {nats:.2f}" for share, nats in found["copying"].values()]
    if "answers" in found:
        cells += [f"{found['agreement']:.3f}", f"{found['repeats']:.0%}"]
    return cells + [f"{value:.1%}" for value in found.get("tasks", {}).values()]


def network_of(source: str, arguments: argparse.Namespace, stream: BlockStream) -> Any:
    """A model in memory: a folder's, or one that a peer prunes now."""
    if source not in arguments.peers:
        return load(open_checkpoint(source), getattr(torch, arguments.dtype), torch.device("cpu"))
    drawn: dict[str, int] = {"samples": Options.samples, "length": Options.length, "seed": arguments.seed}
    peer = pruned_by(source, stream, arguments.sparsity, arguments.calibration, **drawn)
    return peer.network.to(getattr(torch, arguments.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned", nargs="*")
    parser.add_argument("--texts", type=Path, required=True, help="what texts.py wrote")
    parser.add_argument("--tokens", type=int, default=8192, help="of each kind of text")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--fast", action="store_true", help="no answers are written")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS, help="pruned in memory, beside the folders")
    parser.add_argument("--sparsity", type=float, default=0.25, help="of the peers")
    parser.add_argument("--calibration", default=Options.calibration, help="of the peers")
    parser.add_argument("--seed", type=int, default=0, help="of the peers")
    parser.add_argument("--json", type=Path, help="keeps all figures, and the dense model's for the next run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kept: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text(encoding="utf-8"))
    lines: list[str] = []
    checkpoint = open_checkpoint(arguments.dense)
    stream = BlockStream(checkpoint)
    basket = Basket(checkpoint, arguments.texts, arguments.tokens, checkpoint.max_positions or 1 << 20)
    how = f"{arguments.sparsity}, {Path(arguments.calibration).name}, seed {arguments.seed}"
    for source in [arguments.dense, *arguments.pruned, *arguments.peers]:
        key = f"{source}, {how}" if source in arguments.peers else source
        if key not in kept:
            network = network_of(source, arguments, stream)
            dense = kept.get(arguments.dense, {})
            kept[key] = measured(network, basket, dense, arguments.fast, arguments.tasks)
            if arguments.json:
                arguments.json.write_text(json.dumps(kept), encoding="utf-8")
        if not lines:
            kinds, tests = list(kept[key]["perplexity"]), list(kept[key]["copying"])
            seen = [] if arguments.fast else ["agreement", "repeats"]
            heads = ["model", *kinds, "mean", "worst", *tests, *seen, *kept[key].get("tasks", {})]
            lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            print("\n".join(lines), flush=True)
        lines.append("| " + " | ".join(row(Path(key).name, kept[key], kept[arguments.dense])) + " |")
        print(lines[-1], flush=True)
        if arguments.out:
            put(arguments.out, f"basket {Path(arguments.dense).name}", lines)


if __name__ == "__main__":
    main()
