"""Zero-shot accuracy on multiple-choice tasks; lm-eval makes prompts, likelihoods and metrics."""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.checkpoints.facts import positions_of
from secateur.measure.perplexity import device_of, scoring
from secateur.measure.tasks import OpenTask, silence

_QUANTILE = 1.959964
"""Quantile of the normal distribution for a 95 % interval."""
_ITEMS_PER_STEP = 64
"""Items between two steps of the progress bar; lm-eval batches items of about equal length among them."""
_LOGITS = 1 << 27
"""Largest number of logits of one forward pass, unless a single question with its answer has more."""


@dataclass(frozen=True)
class Accuracy:
    """Share of items answered correctly."""

    value: float
    standard_error: float | None
    """Standard error of the share; None for a single item."""
    outcomes: list[int]
    """Outcome of each item in the task's order, 1 for correct and 0 for wrong, by which two models are compared."""

    @classmethod
    def of(cls, outcomes: list[int]) -> "Accuracy":
        """Return the accuracy of the outcomes of at least one item."""
        count = len(outcomes)
        value = sum(outcomes) / count
        return cls(value, math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None, outcomes)


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of one model on one task."""

    name: str
    items: int
    """Number of items."""
    acc: Accuracy
    """Accuracy of the answer with the highest log-likelihood."""
    acc_norm: Accuracy | None
    """Accuracy of the answer with the highest log-likelihood per length, as lm-eval defines it; None if the task
    does not have this metric."""

    def accuracies(self) -> dict[str, Accuracy]:
        """Return the accuracies of this task by lm-eval's names of the metrics."""
        return {"acc": self.acc} if self.acc_norm is None else {"acc": self.acc, "acc_norm": self.acc_norm}


@dataclass(frozen=True)
class AccuracyRatio:
    """Accuracy of one model over the accuracy of another one on the same items."""

    ratio: float
    interval: tuple[float, float] | None
    """95 % confidence interval of the ratio; None if the first model has no item right."""


def accuracy_ratio(first: Accuracy, second: Accuracy) -> AccuracyRatio | None:
    """Return the first accuracy over the second, both on the same items; None if the second is 0.

    The interval is normal on the logarithm of the ratio (delta method). The variance of the logarithm is the variance
    of the mean of `x / mean(x) - y / mean(y)` over the items' outcomes x and y. For outcomes of 0 and 1 it is the
    number of items that only one model has right, divided by the product of the two models' numbers of right items. So
    items on which both models agree do not widen the interval.
    """
    x, y = sum(first.outcomes), sum(second.outcomes)
    if not y:
        return None
    ratio = x / y
    if not x:
        return AccuracyRatio(ratio, None)
    differ = sum(a != b for a, b in zip(first.outcomes, second.outcomes, strict=True))
    factor = math.exp(_QUANTILE * math.sqrt(differ / (x * y)))
    return AccuracyRatio(ratio, (ratio / factor, ratio * factor))


def zero_shot(
    network: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[OpenTask],
    *,
    watcher: Watcher | None = None,
    what: str = "Scoring",
) -> list[TaskResult]:
    """Measure the accuracy of a model on each task, without examples in the prompt and without a chat template.

    Args:
        network: A causal language model of transformers, scored on its device and in its dtype.
        tokenizer: Its tokenizer.
        tasks: Tasks from `open_tasks`.
        watcher: Progress output.
        what: Label of the progress bar; the task's name is added.

    Raises:
        SecateurError: The tokenizer belongs to another model or has neither BOS nor EOS, an answer has no tokens or
            more than the model has positions, or logits are not finite.
    """
    results: list[TaskResult] = []
    if not tasks:
        return results
    with scoring(network), silence(stderr=False):
        scorer = _scorer(network, tokenizer)
        for task in tasks:
            metrics = []
            starts = range(0, len(task.items), _ITEMS_PER_STEP)
            for start in (watcher or Silent()).track(starts, f"{what} {task.name}"):
                items = task.items[start : start + _ITEMS_PER_STEP]
                scores = iter(scorer([pair for _, pairs in items for pair in pairs]))
                metrics += [task.source.process_results(item, [next(scores) for _ in pairs]) for item, pairs in items]
            results.append(_result(task.name, metrics))
    return results


def _result(name: str, metrics: Sequence[dict[str, Any]]) -> TaskResult:
    """Return a task's accuracies from the metrics of each item."""
    acc, norm = ([int(item[key]) for item in metrics if key in item] for key in ("acc", "acc_norm"))
    return TaskResult(name, len(metrics), Accuracy.of(acc), Accuracy.of(norm) if norm else None)


def _scorer(network: Any, tokenizer: Any) -> Callable[[list[tuple[str, str]]], list[tuple[float, bool]]]:
    """Return a function from pairs of question and answer to lm-eval's log-likelihoods; the model is not changed."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    vocabulary, positions = network.get_input_embeddings().weight.shape[0], positions_of(network.config) or sys.maxsize

    class Scorer(HFLM):
        """HFLM with batches bounded by the number of logits, and with error messages of one line."""

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            for texts, question, answer in requests:
                _check_request(texts, question, answer, vocabulary, positions)
            longest = min(positions, max(len(question) + len(answer) for _, question, answer in requests))
            options["override_bs"] = max(1, _LOGITS // (vocabulary * longest))
            scores = super()._loglikelihood_tokens(requests, **options)
            if any(math.isnan(log) for log, _ in scores):
                raise SecateurError("the model's logits are NaN: its weights are damaged, or its dtype overflows")
            return scores

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SecateurError("the tokenizer has neither BOS nor EOS, and lm-eval needs one of them")
    # A partial function, not a module: HFLM would tie the weights of a module, even where the checkpoint unties them.
    forward: Any = partial(network, use_cache=False)
    forward.config, forward.device = network.config, device_of(network)
    # The tokenizer is copied, since HFLM sets its padding token. The softmax is in float32, since likelihoods rounded
    # to bfloat16 are equal too often.
    settings = {"tokenizer": copy.deepcopy(tokenizer), "max_length": positions, "softmax_dtype": torch.float32}
    scorer = Scorer(forward, "causal", batch_size="auto", **settings)
    return lambda pairs: scorer.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], True)


def _check_request(texts: Any, question: list[int], answer: list[int], vocabulary: int, positions: int) -> None:
    """Raise `SecateurError` if a model cannot score an answer to a question (token ids)."""
    if not question or not 0 < len(answer) <= positions:
        lengths = f"{len(question)} and {len(answer)} tokens, but only 1 to {positions} are possible"
        raise SecateurError(f"question and answer {texts!r:.60} have {lengths}")
    if max(*question, *answer) >= vocabulary:
        raise SecateurError(f"ids outside the model's vocabulary of {vocabulary}; use the model's own tokenizer")
