"""Answers to the prompts of the package: whether a pruned model writes what its dense model writes, and without loops.

Perplexity is a mean over the tokens of a given text. Whoever uses a model reads the text that it writes itself, where
one wrong token leads to the next. Two figures describe this text, which is always the likeliest one (greedy), of at
most `ANSWER_TOKENS` tokens:

- Agreement: the dense model's answers run through the pruned model in one forward pass each (teacher-forced). Agreement
  is the share of their tokens that the pruned model ranks first, given the prompt and the answer so far. The token that
  ends an answer is not counted.
- Loops: the share of a model's own answers in which a run of `LOOP` tokens occurs twice.
"""

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import first_line
from secateur.checkpoints.facts import positions_of
from secateur.measure.generation import check_logits, end_tokens, greedy_tokens, prompt_ids
from secateur.measure.perplexity import device_of, rows_per_forward, scoring

FILE = Path(__file__).with_name("prompts.txt")
"""Prompts, with an empty line between two of them."""
ANSWER_TOKENS = 96
LOOP = 8
"""Number of tokens of a run that makes an answer count as a loop if the run occurs twice."""
TIMED_STEPS = 4
"""Number of steps after which the time of all steps is estimated. The first one also reads the prompts."""
LONG = 60.0
"""Seconds from which on the estimate is printed."""
SKIP = "--no-answers leaves them out"


@dataclass(frozen=True)
class AnswerScore:
    """Figures of one model's answers."""

    prompts: int
    """Number of prompts."""
    tokens: int
    """Number of tokens of this model's own answers."""
    loops: float
    """Share of this model's own answers that loop."""
    agreement: float | None
    """Share of the dense model's answer tokens that this model ranks first; None for the dense model itself, and where
    the two models' tokenizers differ."""


def packaged_prompts() -> list[str]:
    """Return the prompts of the package."""
    return FILE.read_text(encoding="utf-8").strip().split("\n\n")


def question_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt in the chat template, or as `Question: ... Answer:` if there is none."""
    return prompt_ids(tokenizer, prompt, f"Question: {prompt}\nAnswer:")


class AnswerTest:
    """Test that models take one after the other: the first one's answers are the reference for the others."""

    def __init__(self, watcher: Watcher | None = None):
        self._watcher = watcher or Silent()
        self._reference: tuple[list[list[int]], list[list[int]]] | None = None
        """Prompts and answers of the first model, as token ids."""
        self._skipped = False

    def score(self, network: Any, tokenizer: Any, name: str) -> AnswerScore | None:
        """Return the figures of one model; None where it cannot be tested, which is noted, or one before it could not.

        Raises:
            SecateurError: The tokenizer refuses a prompt, or the model cannot be run.
        """
        prompts = [] if tokenizer is None else [question_ids(tokenizer, prompt) for prompt in packaged_prompts()]
        if not self._skipped and (reason := _unsupported_reason(network, prompts)):
            self._watcher.note(f"Agreement and loops are not measured: {name} {reason}")
            self._skipped = True
        if self._skipped:
            return None
        ends = end_tokens(network, tokenizer)
        try:
            written = greedy_answers(network, prompts, ends, watcher=self._watcher, what=f"{name} answers")
            agreed = self._agreement(network, prompts)
        except SecateurError:
            raise
        except Exception as error:  # from memory that runs out to code that ships with a checkpoint
            raise SecateurError(f"{name}: the answers failed ({first_line(error)}); {SKIP}") from error
        if self._reference is None:
            self._reference = prompts, written
        return AnswerScore(len(prompts), sum(map(len, written)), loop_share(written), agreed)

    def _agreement(self, network: Any, prompts: list[list[int]]) -> float | None:
        """Return a model's agreement with the first model; None for the first model and for another tokenizer."""
        if self._reference is None:
            return None
        if prompts != self._reference[0]:
            self._watcher.note("Agreement is not measured: the two models' tokenizers differ")
            return None
        return agreement(network, *self._reference)


def _unsupported_reason(network: Any, prompts: Sequence[Sequence[int]]) -> str | None:
    """Return the reason why a model cannot answer the prompts, as a clause without a subject; None if it can."""
    if not prompts:
        return "has no tokenizer"
    if network.device.type == "meta":
        return "does not fit into memory, and would be read from disk once for every token"
    longest, positions = max(map(len, prompts)) + ANSWER_TOKENS, positions_of(network.config)
    if positions is not None and longest > positions:
        return f"has {positions:,} positions, but prompts and answers have up to {longest:,} tokens"
    vocabulary = network.get_input_embeddings().weight.shape[0]
    if max(map(max, prompts)) >= vocabulary:
        return f"has {vocabulary:,} token ids, and its tokenizer has more"
    return None


def greedy_answers(
    network: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    watcher: Watcher | None = None,
    what: str = "Answers",
) -> list[list[int]]:
    """Return a model's greedy answers as token ids, without the token that ends an answer.

    Where all answers are estimated to take longer than a minute, this is noted after a few tokens.

    Args:
        network: A causal language model of transformers that is in memory.
        prompts: Token ids of each prompt.
        ends: Ids of the tokens that end an answer.
        watcher: Progress output.
        what: Label of the progress bar, which counts the tokens of an answer.
    """
    # In one batch, because every step reads all weights.
    with closing(_steps(watcher or Silent(), what)) as steps:
        written = greedy_tokens(
            network, prompts, ends=ends, new_tokens=ANSWER_TOKENS, on_step=partial(next, steps, None)
        )
        # All answers may end early.
        deque(steps, maxlen=0)
    return written


def _steps(watcher: Watcher, what: str) -> Generator[int, None, None]:
    """Yield the number of each step, with progress, and with a note about the time of all steps if that is long."""
    start = 0.0
    for step in watcher.track(range(ANSWER_TOKENS), what):
        if step == 1:
            start = perf_counter()
        if step == TIMED_STEPS and (each := (perf_counter() - start) / (TIMED_STEPS - 1)) * ANSWER_TOKENS > LONG:
            watcher.note(f"{what}: up to {each * ANSWER_TOKENS / 60:,.0f} min for {ANSWER_TOKENS} steps; {SKIP}")
        yield step


def agreement(network: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Return the share of answer tokens that a model ranks first, given the prompt and the answer so far.

    Args:
        network: A causal language model of transformers.
        prompts: Token ids of each prompt.
        answers: Token ids of another model's answer to each prompt.

    Returns:
        The share; 1 if all answers are empty.
    """
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    longest = max((len(prompt) + len(answer) for prompt, answer in pairs), default=1)
    batch = rows_per_forward(network, longest, len(pairs))
    hits = [_hits(network, pairs[start : start + batch]) for start in range(0, len(pairs), batch)]
    return float(torch.cat(hits).double().mean()) if hits else 1.0


def _hits(network: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
    """Return whether a model ranks each answer token first, for all answers one after the other (tokens)."""
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    # Padded on the right, where no token before the padding depends on it.
    ids = pad_sequence(rows, batch_first=True).to(device_of(network))
    with scoring(network):
        largest, first = network(input_ids=ids, use_cache=False).logits.max(-1)
    check_logits(largest)
    hits = []
    for (prompt, answer), ranked in zip(pairs, first.cpu(), strict=True):
        # The token at a place is predicted at the place before it.
        before = len(prompt) - 1
        hits.append(ranked[before : before + len(answer)] == torch.tensor(answer))
    return torch.cat(hits)


def loops(answer: Sequence[int]) -> bool:
    """Return whether a run of `LOOP` tokens occurs twice in an answer (token ids)."""
    runs = [tuple(answer[start : start + LOOP]) for start in range(len(answer) - LOOP + 1)]
    return len(set(runs)) < len(runs)


def loop_share(answers: Sequence[Sequence[int]]) -> float:
    """Return the share of answers that loop."""
    return sum(map(loops, answers)) / len(answers)
