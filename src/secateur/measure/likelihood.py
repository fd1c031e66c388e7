"""How likely a model finds answers to questions: the question is run once, its answers on top of the cached keys.

Answers to a multiple-choice question share its tokens, most often the longer part. Questions of equal length make a
batch, so that nothing in front of an answer is padding and positions are right for every family.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.measure.perplexity import scoring
from secateur.model.families import positions_of
from secateur.model.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS = 1 << 27
"""Logits of answers in a forward: beyond, batches get smaller."""
_PADDING = 64
"""Tokens behind a batch's answers to fill them up to one length: beyond, a forward of its own costs less."""

_Answers = list[tuple[int, list[int]]]
"""Answers to one question: the place in what was asked for, and token ids."""
_Batch = list[tuple[tuple[int, ...], _Answers]]
"""Questions of equal length as token ids, with their answers."""


class Likelihood(NamedTuple):
    """Of one answer."""

    log: float
    """Log-probability of its tokens, summed, in nats."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 4096,
    watcher: Watcher | None = None,
    what: str = "Answers",
) -> list[Likelihood]:
    """Likelihood of each pair of question and answer, in order, as by lm-eval's `loglikelihood`.

    Args:
        model: any causal language model with a cache.
        tokenizer: the model's; what it puts in front of a text is kept.
        pairs: an empty question stands for BOS, or EOS where there is no BOS. One that is too long for the model loses
            its beginning.
        batch_size: tokens in a forward, at most, unless one question with its answers is longer.
        watcher: told about progress.
        what: what to tell it is being done.

    Raises:
        SecateurError: an answer without tokens or longer than the model, ids that the model does not have, or logits
            that are not a number.
    """
    if batch_size < 1:
        raise SecateurError(f"the batch size is {batch_size}, but at least 1 token is needed")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    questions: dict[tuple[int, ...], _Answers] = {}
    for index, (question, answer) in enumerate(pairs):
        before, after = _ids(tokenizer, question, answer)
        before = _fitting(before, after, positions_of(model.config))
        if max(*before, *after) >= vocabulary:
            raise SecateurError(f"an answer holds ids outside the model's {vocabulary}: wrong tokenizer for this model")
        questions.setdefault(tuple(before), []).append((index, after))
    batches = list(_batches(questions, min(batch_size, max(1, _LOGITS // vocabulary))))
    found: dict[int, Likelihood] = {}
    with scoring(model):
        for batch in (watcher or Silent()).track(batches, what):
            found.update(_score(model, batch))
    return [found[index] for index in range(len(pairs))]


def _ids(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Question and answer as ids, cut where lm-eval cuts: spaces between them belong to the answer."""
    if not question:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = encode(tokenizer, answer)
        if first is None:
            raise SecateurError("an answer without a question needs BOS or EOS, and the tokenizer has neither")
        before, after = (ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids)
    else:
        stripped = question.rstrip()
        whole = question + answer
        # A text that spells BOS itself must not get another one.
        special = not (tokenizer.bos_token and question.startswith(tokenizer.bos_token))
        before = encode(tokenizer, stripped, special=special)
        after = encode(tokenizer, whole, special=special)[len(before) :]
    if not before or not after:
        raise SecateurError(f"{'the question' if after else 'the answer'} of {question + answer!r:.60} has no tokens")
    return before, after


def _fitting(before: list[int], after: list[int], positions: int | None) -> list[int]:
    """The end of a question that leaves room for its answer, whose last token is never run."""
    if positions is None or len(before) + len(after) <= positions + 1:
        return before
    if len(after) > positions:
        raise SecateurError(f"an answer of {len(after)} tokens exceeds the model's {positions} positions")
    return before[len(before) + len(after) - positions - 1 :]


def _batches(questions: dict[tuple[int, ...], _Answers], tokens: int) -> Iterator[_Batch]:
    """Questions of equal length, within a number of tokens; the longest first, as these need most memory."""

    def size(entry: tuple[tuple[int, ...], _Answers]) -> tuple[int, int]:
        return len(entry[0]), max(len(answer) for _, answer in entry[1])

    batch: _Batch = []
    for entry in sorted(questions.items(), key=size, reverse=True):
        length, width = size((batch or [entry])[0])
        lengths = [len(answer) for _, answers in (*batch, entry) for _, answer in answers]
        rows = len(lengths)
        full = rows * (length + width) > tokens or rows * width - sum(lengths) > _PADDING
        if batch and (full or len(entry[0]) != length):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _score(model: Any, batch: _Batch) -> Iterator[tuple[int, Likelihood]]:
    known = inspect.signature(model.forward).parameters
    # Models outside transformers may not know how to leave out logits, and the cache has had two names.
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    name = "cache" if "cache" in known else "past_key_values"
    read = model(
        input_ids=torch.tensor([question for question, _ in batch], device=model.device), use_cache=True, **last
    )
    answers = [(owner, index, answer) for owner, (_, group) in enumerate(batch) for index, answer in group]
    owners = torch.tensor([owner for owner, _, _ in answers], device=model.device)
    firsts = torch.tensor([answer[0] for _, _, answer in answers], device=model.device)
    logs, greedy = _compare(read.logits[:, -1][owners], firsts)
    total = logs.double()
    longer = [row for row, (_, _, answer) in enumerate(answers) if len(answer) > 1]
    if longer:
        rest = [torch.tensor(answers[row][2], device=model.device) for row in longer]
        # Padding stands behind the answers, where nothing looks at it.
        padded = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids in rest], batch_first=True)
        lengths = padded.new_tensor([len(ids) - 1 for ids in rest])
        row, column = (torch.arange(padded.shape[1], device=model.device) < lengths[:, None]).nonzero(as_tuple=True)
        cache = getattr(read, name)
        cache.batch_select_indices(owners[longer])
        logits = model(input_ids=padded, use_cache=True, **{name: cache}).logits
        logs, equal = _compare(logits[row, column], torch.cat([ids[1:] for ids in rest]))
        whose = torch.tensor(longer)[row.cpu()]
        # index_add_ on the CPU adds in order, so results are the same from run to run.
        total = total.index_add_(0, whose, logs.double())
        greedy[whose[~equal]] = False
    for (_, index, _), value, best in zip(answers, total.tolist(), greedy.tolist(), strict=True):
        yield index, Likelihood(value, best)


def _compare(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of targets [n] under logits [n, vocabulary], and whether they are the largest, on the CPU."""
    logs = -cross_entropy(logits.float(), targets, reduction="none").cpu()
    if logs.isnan().any():
        raise SecateurError("the model's logits are not numbers: its weights are damaged, or its dtype overflows")
    return logs, (logits.argmax(-1) == targets).cpu()
