"""Compare pruned models with their dense model on many kinds of text, copying, free answers and tasks.

    python benchmarks/texts.py TEXTS --data FOLDER --unpacked UNPACKED
    python benchmarks/basket.py DENSE PRUNED ... --texts TEXTS

The script prints one table row for each model:

- the ratio of its perplexity to the dense model's on every kind of text of which TEXTS has a file;
- the geometric mean and the worst of these ratios, of the kinds that the calibration text `general` contains (seen:
  `seen_kinds.py`) and of those that it does not contain (unseen: `unseen_kinds.py`);
- accuracy and loss (nats per token) of tokens that can be copied from the context;
- agreement: the share of the dense model's greedy answer tokens that this model would have chosen too;
- repeats: the share of its own answers that contain a run of eight tokens twice (loops).

Agreement and repeats are measured as `secateur eval` does, on other prompts: the first questions of conversations.

`--fast` skips the answers. `--only unseen` scores the unseen kinds of text and nothing else; `--only` also takes `seen`
and names of kinds. With `--only unseen`, a model like SmolLM2-135M takes about four minutes of one thread (EPYC with
AVX-512); with `--tokens 4096 --dtype bfloat16` as well, about one. `--peers` prunes the dense model by other methods,
in memory. `--tasks` adds zero-shot accuracies, from files in the folder that TASK_DATA names. `--json FILE` keeps all
figures, and figures that FILE holds are not measured again.
"""

import argparse
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from peers import PEERS, pruned_by
from secateur import BlockStream, Options, consecutive_rows, open_checkpoint
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.tokens import encode
from secateur.measure.answers import agreement, greedy_answers, loop_share, question_ids
from secateur.measure.generation import end_tokens
from secateur.measure.loading import load
from secateur.measure.perplexity import perplexity, scoring
from secateur.measure.tasks import open_tasks, zero_shot
from secateur.text.documents import read_documents
from seen_kinds import SEEN
from tables import put
from unseen_kinds import UNSEEN

LONG = "wikipedia"
"""Kind of text that is also scored in rows of 2,048 tokens."""
GROUPS = {"seen": [*SEEN, "long"], "unseen": [*UNSEEN]}
"""Kinds of text that `general` contains and that it does not contain."""
COPIED, PROSE, KEYS = 100, 100, 60
"""Number of rows of each copying test."""
PIECE = 60
"""Number of tokens that a row of a copying test holds twice."""
DISTANCES = (200, 500, 1000, 2000)
"""Number of tokens between the sentence that gives a number and the one that asks for it."""
PROMPTS, LONGEST_PROMPT = 100, 200
"""Number of prompts, and most tokens of one."""


class Basket:
    """Rows, prompts and questions for all models, drawn once.

    Args:
        checkpoint: the dense model, whose tokenizer all models share.
        texts: folder that texts.py wrote.
        tokens: number of tokens of each kind of text.
        positions: the longest row that the model takes, in tokens.
        only: kinds of text; all that `texts` has where none is given.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Path, tokens: int, positions: int, only: list[str] | None = None):
        self.tokenizer, self.texts, self.positions = checkpoint.tokenizer(), texts, positions
        how: dict[str, Any] = {"vocab_size": checkpoint.config.vocab_size, "tokens": tokens}
        kinds = only or [kind for kind in (*SEEN, *UNSEEN) if Path(self.file(kind)).exists()]
        # Conversations are scored only where the tokenizer has a chat template.
        kinds = [kind for kind in kinds if kind != "chat" or self.tokenizer.chat_template]
        self.rows = {kind: consecutive_rows(self.tokenizer, self.file(kind), length=128, **how).ids for kind in kinds}
        if positions >= 2048 and LONG in kinds:
            self.rows["long"] = consecutive_rows(self.tokenizer, self.file(LONG), length=2048, **how).ids

    @property
    def groups(self) -> dict[str, list[str]]:
        """Kinds of text that are scored, by the name of their group."""
        groups = {name: [kind for kind in kinds if kind in self.rows] for name, kinds in GROUPS.items()}
        return {name: kinds for name, kinds in groups.items() if kinds}

    def file(self, kind: str) -> str:
        """Return the file with the half of a kind of text that is scored."""
        return str(self.texts / f"{kind}.evaluation.jsonl")

    @cached_property
    def twice(self) -> dict[str, Tensor]:
        """Rows that hold a passage of random ids, or of prose, twice."""
        generator = torch.Generator().manual_seed(0)
        # Ids that no text holds are hardly trained, and no model copies them well.
        plain = torch.cat([rows.flatten() for rows in self.rows.values()]).unique()
        plain = plain[~torch.isin(plain, torch.tensor(self.tokenizer.all_special_ids))]
        ids = plain[torch.randint(len(plain), (COPIED, PIECE), generator=generator)]
        prose = self.rows["web"].flatten()
        prose = prose[: prose.numel() // PIECE * PIECE].view(-1, PIECE)[:PROSE]
        return {"ids twice": torch.cat([ids, ids], 1), "prose twice": torch.cat([prose, prose], 1)}

    @cached_property
    def keys(self) -> list[tuple[Tensor, int]]:
        """Rows that ask for a number named before, each with the number's tokens."""
        return list(self.hidden_values(self.positions))

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Questions as token ids of a prompt."""
        return list(islice(self.questions(), PROMPTS))

    def hidden_values(self, positions: int) -> Iterator[tuple[Tensor, int]]:
        """Yield token ids in which a number is given, followed by text, and asked for; and the tokens of the number."""
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

    def questions(self) -> Iterator[list[int]]:
        """Yield the first question of each conversation as token ids of a prompt."""
        for line in Path(self.file("chat")).read_text(encoding="utf-8").splitlines():
            ids = question_ids(self.tokenizer, json.loads(line)["messages"][0]["content"])
            if len(ids) <= LONGEST_PROMPT:
                yield ids


def perplexities(network: Any, basket: Basket, kinds: list[str] | None = None) -> dict[str, float]:
    """Return the perplexity on kinds of text: on all of the basket where none is named."""
    return {kind: perplexity(network, basket.rows[kind]).perplexity for kind in kinds or basket.rows}


def copying(network: Any, basket: Basket) -> dict[str, tuple[float, float]]:
    """Return accuracy and loss (nats per token) of the tokens that can be copied, for each copying test."""
    found = {}
    with scoring(network):
        for name, rows in basket.twice.items():
            parts = [token_scores(network, part, PIECE - 1) for part in rows.split(16)]
            found[name] = mean(torch.cat([part.flatten(1) for part in parts], 1))
        parts = [token_scores(network, ids[None], count) for ids, count in basket.keys]
        found["key and value"] = mean(torch.cat([part.flatten(1) for part in parts], 1))
    return found


def token_scores(network: Any, ids: Tensor, last: int) -> Tensor:
    """Return whether each of the last tokens is the likeliest, and its loss in nats (2 x rows x last)."""
    logits = network(input_ids=ids, use_cache=False, logits_to_keep=last + 1).logits[:, :-1].float()
    wanted = ids[:, -last:]
    nats = logits.logsumexp(-1) - logits.gather(-1, wanted[..., None])[..., 0]
    return torch.stack([(logits.argmax(-1) == wanted).float(), nats])


def mean(scores: Tensor) -> tuple[float, float]:
    """Return the mean accuracy and the mean loss in nats per token."""
    return float(scores[0].double().mean()), float(scores[1].double().mean())


def tests_of(arguments: argparse.Namespace) -> list[str]:
    """Return the names of the tests that are run beside the kinds of text."""
    tests = [] if arguments.only else ["copying"] if arguments.fast else ["copying", "answers"]
    return [*tests, "tasks"] if arguments.tasks else tests


def measure(
    network: Any, basket: Basket, found: dict[str, Any], dense: dict[str, Any], missing: list[str], tasks: list[str]
) -> None:
    """Add the missing kinds of text and tests to the figures `found` of one model; `dense` holds the dense model's."""
    if kinds := [kind for kind in missing if kind in basket.rows]:
        found["perplexity"] |= perplexities(network, basket, kinds)
    if "copying" in missing:
        found["copying"] = copying(network, basket)
    if "answers" in missing:
        found["answers"] = greedy_answers(network, basket.prompts, end_tokens(network, basket.tokenizer))
        found["repeats"] = loop_share(found["answers"])
        found["agreement"] = agreement(network, basket.prompts, dense["answers"])
    if "tasks" in missing:
        opened = open_tasks(tasks, task_path=Path(__file__).parent / "tasks")
        scores = zero_shot(network, basket.tokenizer, opened)
        found["tasks"] = {score.name: (score.acc_norm or score.acc).value for score in scores}


def centres(found: dict[str, Any], dense: dict[str, Any], basket: Basket) -> dict[str, tuple[float, float]]:
    """Return the geometric mean and the worst of the ratios of each group of kinds."""
    before, after = dense["perplexity"], found["perplexity"]
    groups = {name: [after[kind] / before[kind] for kind in kinds] for name, kinds in basket.groups.items()}
    return {name: (geometric_mean(ratios), max(ratios)) for name, ratios in groups.items()}


def heads(basket: Basket, found: dict[str, Any], tests: list[str]) -> list[str]:
    """Return the heads of the table's columns; `found` holds the figures of one model."""
    cells = ["model", *(kind for kinds in basket.groups.values() for kind in kinds)]
    cells += [f"{name}: {what}" for name in basket.groups for what in ("mean", "worst")]
    columns = {"copying": [*found.get("copying", ())], "answers": ["agreement", "repeats"]}
    return cells + [head for test in tests for head in columns.get(test, [*found.get("tasks", ())])]


def row(name: str, found: dict[str, Any], dense: dict[str, Any], basket: Basket, tests: list[str]) -> list[str]:
    """Return the table cells of one model."""
    ratios = {kind: value / dense["perplexity"][kind] for kind, value in found["perplexity"].items()}
    cells = [name, *(f"{ratios[kind]:.2f}" for kinds in basket.groups.values() for kind in kinds)]
    for mean, worst in found["ratios"].values():
        cells += [f"**{mean:.3f}**", f"{worst:.2f}"]
    if "copying" in tests:
        cells += [f"{share:.1%}, {nats:.2f}" for share, nats in found["copying"].values()]
    if "answers" in tests:
        cells += [f"{found['agreement']:.3f}", f"{found['repeats']:.0%}"]
    return cells + [f"{value:.1%}" for value in found["tasks"].values()] if "tasks" in tests else cells


def network_of(source: str, arguments: argparse.Namespace, stream: BlockStream) -> Any:
    """Return a network in memory: loaded from a folder, or pruned by a peer method."""
    if source not in arguments.peers:
        return load(open_checkpoint(source), getattr(torch, arguments.dtype), torch.device("cpu"))
    drawn: dict[str, int] = {"samples": Options.samples, "length": Options.length, "seed": arguments.seed}
    peer = pruned_by(source, stream, arguments.sparsity, arguments.calibration, **drawn)
    return peer.network.to(getattr(torch, arguments.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned", nargs="*")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--tokens", type=int, default=8192, help="number of tokens of each kind of text")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--fast", action="store_true", help="skip the free answers")
    parser.add_argument(
        "--only", nargs="+", choices=[*GROUPS, *SEEN, *UNSEEN], help="score these kinds of text and nothing else"
    )
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=PEERS, help="other methods, which prune DENSE in memory"
    )
    parser.add_argument("--sparsity", type=float, default=0.25, help="of the peers")
    parser.add_argument("--calibration", default=Options.calibration, help="of the peers")
    parser.add_argument("--seed", type=int, default=0, help="of the peers")
    parser.add_argument("--json", type=Path, help="file of all figures; figures that it holds are not measured again")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kept: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text(encoding="utf-8"))
    lines: list[str] = []
    checkpoint = open_checkpoint(arguments.dense)
    stream = BlockStream(checkpoint)
    only = [kind for name in arguments.only or () for kind in GROUPS.get(name, [name]) if kind != "long"]
    basket = Basket(checkpoint, arguments.texts, arguments.tokens, checkpoint.max_positions or 1 << 20, only)
    tests, settings = tests_of(arguments), [str(arguments.texts), arguments.tokens, arguments.dtype]
    how = f"{arguments.sparsity}, {Path(arguments.calibration).name}, seed {arguments.seed}"
    for source in [arguments.dense, *arguments.pruned, *arguments.peers]:
        key = f"{source}, {how}" if source in arguments.peers else source
        if kept.get(key, {}).get("settings") != settings:
            kept[key] = {"settings": settings, "perplexity": {}}
        found, dense = kept[key], kept[arguments.dense]
        missing = [kind for kind in basket.rows if kind not in found["perplexity"]]
        missing += [test for test in tests if test not in found]
        if missing:
            measure(network_of(source, arguments, stream), basket, found, dense, missing, arguments.tasks)
        found["ratios"] = centres(found, dense, basket)
        if arguments.json:
            arguments.json.write_text(json.dumps(kept), encoding="utf-8")
        if not lines:
            names = heads(basket, found, tests)
            lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
            print("\n".join(lines), flush=True)
        lines.append("| " + " | ".join(row(Path(key).name, found, dense, basket, tests)) + " |")
        print(lines[-1], flush=True)
        if arguments.out:
            put(arguments.out, f"basket {Path(arguments.dense).name}", lines)


if __name__ == "__main__":
    main()
