"""Zero-shot accuracy on multiple-choice tasks of lm-eval, which makes prompts, likelihoods and metrics.

Tasks are opened with their items before any model is loaded.
"""

import copy
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.facts import positions_of
from secateur.checkpoints.hub_source import out_of_reach
from secateur.measure.perplexity import device_of, scoring

_FILES = {"arrow", "csv", "json", "parquet", "text"}
"""Values of `dataset_path` in task files that mean local files."""
_QUANTILE = 1.959964
"""Quantile of the normal distribution for a 95 % interval."""
_ITEMS_PER_STEP = 64
"""Items between two steps of the progress bar; lm-eval batches items of about equal length among them."""
_LOGITS = 1 << 27
"""Largest number of logits of one forward pass, unless a single question with its answer has more."""


@dataclass(frozen=True)
class OpenTask:
    """A task with its items, ready to be scored on any model."""

    name: str
    source: Any
    """The lm-eval task, which turns log-likelihoods into metrics."""
    items: list[tuple[Any, list[tuple[str, str]]]]
    """Each item as an lm-eval document, with the pairs of question and answer to score for it."""


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


def open_tasks(
    names: Sequence[str],
    *,
    limit: int | None = None,
    task_path: str | Path | None = None,
    watcher: Watcher | None = None,
) -> list[OpenTask]:
    """Open tasks with their items; no model is needed.

    Args:
        names: Names of tasks, tags or groups of lm-eval, or of tasks in `task_path`, which come first. A group opens
            all its members.
        limit: Number of items from the start of each task; None for all.
        task_path: A folder that is searched, with its subfolders, for task files (.yaml) in lm-eval's form.
        watcher: Progress output.

    Raises:
        SecateurError: lm-eval is not installed, a folder or task does not exist, its data cannot be read, or it does
            not count right and wrong answers.
    """
    if limit is not None and limit < 1:
        raise SecateurError(f"the limit is {limit}; it must be at least 1 item")
    folder = None if task_path is None else local_path(task_path)
    if folder is not None and not folder.is_dir():
        raise SecateurError(f"{task_path}: no such folder; name one with task files (.yaml)")
    if not names:
        return []
    watcher = watcher or Silent()
    with watcher.busy("Looking for tasks"), silence():
        managers = _managers(names, folder)
    opened: dict[str, OpenTask] = {}
    for name, manager in managers.items():
        with watcher.busy(f"Opening task {name}"):
            opened |= {task.task_name: _open(task, limit) for task in _load(manager, name)}
    return list(opened.values())


def _managers(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Return the index in which each name is found: the folder's if it has the name, else lm-eval's own."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SecateurError(
            f"tasks need lm-eval, which cannot be imported ({first_line(error)}); pip install 'secateur[tasks]'"
        ) from error
    own = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    own_names = [] if own is None else own.all_tasks
    managers: dict[str, Any] = {}
    for name in names:
        managers[name] = own if name in own_names else _default_manager()
        if name not in managers[name].all_tasks:
            raise _unknown_task(name, [*managers[name].all_tasks, *own_names], folder)
    return managers


def _unknown_task(name: str, known: Sequence[str], folder: Path | None) -> SecateurError:
    """Return an error that names the tasks with the most similar names."""
    where = "lm-eval" if folder is None else f"lm-eval and {folder}"
    near = ", ".join(get_close_matches(name, known, n=5))
    advice = f"near it: {near}" if near else "`lm-eval ls tasks` lists all, --task-path adds others"
    return SecateurError(f"task '{name}' does not exist in {where}; {advice}")


@cache
def _default_manager() -> Any:
    """Return the index of lm-eval's own tasks, which are thousands of files and take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str) -> list[Any]:
    """Return the lm-eval tasks of a name, with their data."""
    config = manager.task_index[name].cfg or {}
    path = config.get("dataset_path")
    local = "custom_dataset" in config or path in _FILES or (path is not None and Path(path).exists())
    # Check first whether the hub answers, because its client would retry for half a minute before it reads its cache.
    reason = None if local else out_of_reach()
    try:
        with silence(), _offline() if reason else nullcontext():
            return list(manager.load(name)["tasks"].values())
    except Exception as error:  # from a wrong path to a missing package, each has its own class
        if reason is not None:
            raise SecateurError(
                f"task {name} cannot be loaded ({first_line(error)}); if it needs its data set"
                f"{f' {path}' if path else ''} from the hub: that is not reachable ({reason}); give --task-path with a "
                "task file that reads local files"
            ) from error
        raise SecateurError(f"task {name} cannot be loaded: {first_line(error)}") from error


def _open(task: Any, limit: int | None) -> OpenTask:
    """Return an lm-eval task with its items.

    Raises:
        SecateurError: The task does not choose between answers, or does not count right ones.
    """
    name = task.task_name
    try:
        with silence():
            task.set_config("num_fewshot", 0)
            task.build_all_requests(limit=limit)
        requests = sorted(task.instances, key=lambda request: (request.doc_id, request.idx))
        items = [list(group) for _, group in groupby(requests, key=lambda request: request.doc_id)]
        _check_multiple_choice(task, items[0])
    except SecateurError:
        raise
    except Exception as error:  # task files hold templates and code, which can do anything
        raise SecateurError(f"task {name}: its items do not have what its file expects: {first_line(error)}") from error
    return OpenTask(name, task, [(item[0].doc, [request.args for request in item]) for item in items])


def _check_multiple_choice(task: Any, item: Sequence[Any]) -> None:
    """Check on the requests of one item that a task chooses between answers, and counts the right ones."""
    if any(request.request_type != "loglikelihood" for request in item):
        raise SecateurError(f"task {task.task_name} is not multiple-choice; only multiple-choice tasks can be scored")
    # Invented scores of the answers show whether the task's accuracy is 0 or 1: some tasks call a share of the
    # probability an accuracy.
    scores = [(-1.0 - rank, False) for rank in range(len(item))]
    if task.process_results(item[0].doc, scores).get("acc") not in (0, 1):
        raise SecateurError(f"task {task.task_name} does not measure accuracy (acc); only tasks that do can be scored")


@contextmanager
def silence(stderr: bool = True) -> Iterator[None]:
    """Suppress the messages of lm-eval and datasets.

    Args:
        stderr: Whether standard error is suppressed too, which also hides progress bars that have no switch.
    """
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars_disabled = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with quiet(), redirect_stderr(io.StringIO()) if stderr else nullcontext():
            yield
    finally:
        logger.setLevel(level)
        if not bars_disabled:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """Make the datasets library look at its cache only."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


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
