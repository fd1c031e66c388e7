"""Zero-shot accuracy on multiple-choice tasks: questions, prompts, likelihoods and metrics are lm-eval's."""

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
from secateur.measure.perplexity import device_of, scoring
from secateur.model.facts import positions_of
from secateur.model.hub_source import out_of_reach

_FILES = {"arrow", "csv", "json", "parquet", "text"}
"""What a task file calls its data set where the data are files of one's own."""
_QUANTILE = 1.959964
"""Of the normal distribution, for 95 % in the middle."""
_ITEMS = 64
"""From one step of the progress bar to the next; lm-eval puts those of about equal length into a batch."""
_LOGITS = 1 << 27
"""Of a forward, at most, unless a single answer with its question has more."""


@dataclass(frozen=True)
class Accuracy:
    """Share of items that are right."""

    value: float
    standard_error: float | None
    """None for a single item."""
    outcomes: list[int]
    """1 for an item that is right, else 0, in the task's order: what two models can be compared by."""

    @classmethod
    def of(cls, outcomes: list[int]) -> "Accuracy":
        """From at least one item."""
        count = len(outcomes)
        value = sum(outcomes) / count
        return cls(value, math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None, outcomes)


@dataclass(frozen=True)
class TaskResult:
    """One model on one task."""

    name: str
    items: int
    acc: Accuracy
    """By the answers' log-likelihood."""
    acc_norm: Accuracy | None
    """By log-likelihood over length, as lm-eval defines it; None where the task does not have it."""

    def accuracies(self) -> dict[str, Accuracy]:
        """Those that there are, by lm-eval's names."""
        return {"acc": self.acc} if self.acc_norm is None else {"acc": self.acc, "acc_norm": self.acc_norm}


@dataclass(frozen=True)
class Kept:
    """How much of another model's accuracy is left, from the same items."""

    ratio: float
    interval: tuple[float, float] | None
    """95 %; None where nothing is right."""


@dataclass(frozen=True)
class OpenTask:
    """A task whose items are read, ready for any model."""

    name: str
    source: Any
    """lm-eval's task, which turns likelihoods into metrics."""
    items: list[tuple[Any, list[tuple[str, str]]]]
    """Each item as lm-eval has it, and what to score for it: questions and answers."""


def zero_shot(
    network: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[OpenTask],
    *,
    watcher: Watcher | None = None,
    what: str = "Scoring",
) -> list[TaskResult]:
    """Accuracy of a model on each task, without examples in the prompt and without a chat template.

    Args:
        network: a causal language model of transformers, scored on the device and in the dtype it is in.
        tokenizer: its tokenizer.
        tasks: from `open_tasks`.
        watcher: told about progress.
        what: what to tell it is being done; the task's name is added.

    Raises:
        SecateurError: the tokenizer is not the model's or has neither BOS nor EOS, an answer has no tokens or more than
            the model has positions, or logits are not numbers.
    """
    results: list[TaskResult] = []
    if not tasks:
        return results
    with scoring(network), _silence(stderr=False):
        scorer = _scorer(network, tokenizer)
        for task in tasks:
            metrics = []
            for start in (watcher or Silent()).track(range(0, len(task.items), _ITEMS), f"{what} {task.name}"):
                items = task.items[start : start + _ITEMS]
                found = iter(scorer([pair for _, asked in items for pair in asked]))
                metrics += [task.source.process_results(item, [next(found) for _ in asked]) for item, asked in items]
            acc, norm = ([int(m[key]) for m in metrics if key in m] for key in ("acc", "acc_norm"))
            results.append(TaskResult(task.name, len(metrics), Accuracy.of(acc), Accuracy.of(norm) if norm else None))
    return results


def _scorer(network: Any, tokenizer: Any) -> Callable[[list[tuple[str, str]]], list[tuple[float, bool]]]:
    """lm-eval's log-likelihoods of answers to questions, by a model that is left as it is."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    vocabulary, positions = network.get_input_embeddings().weight.shape[0], positions_of(network.config) or sys.maxsize

    class Scorer(HFLM):
        """HFLM with batches as large as memory is meant to hold, and errors of one line."""

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            for texts, question, answer in requests:
                if not question or not 0 < len(answer) <= positions:
                    lengths = f"{len(question)} and {len(answer)} tokens, where 1 to {positions} are possible"
                    raise SecateurError(f"question and answer {texts!r:.60} have {lengths}")
                if max(*question, *answer) >= vocabulary:
                    raise SecateurError(f"ids outside the model's {vocabulary}: wrong tokenizer for this model")
            longest = min(positions, max(len(question) + len(answer) for _, question, answer in requests))
            options["override_bs"] = max(1, _LOGITS // (vocabulary * longest))
            found = super()._loglikelihood_tokens(requests, **options)
            if not any(math.isnan(log) for log, _ in found):
                return found
            raise SecateurError("the model's logits are not numbers: its weights are damaged, or its dtype overflows")

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SecateurError("the tokenizer has neither BOS nor EOS, of which lm-eval needs one")
    # No module, since HFLM would tie its weights, which a checkpoint may keep apart against its config.
    forward: Any = partial(network, use_cache=False)
    forward.config, forward.device = network.config, device_of(network)
    # A copy, since HFLM sets a token for padding. Likelihoods rounded to bfloat16 would be equal too often.
    settings = {"tokenizer": copy.deepcopy(tokenizer), "max_length": positions, "softmax_dtype": torch.float32}
    scorer = Scorer(forward, "causal", batch_size="auto", **settings)
    return lambda pairs: scorer.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], True)


def kept(first: Accuracy, second: Accuracy) -> Kept | None:
    """The first accuracy over the second, both on the same items; None where the second is 0.

    The interval is the normal one of the ratio's logarithm (delta method). Its variance is that of the mean of
    `x / mean(x) - y / mean(y)` over the items' outcomes x and y, which is (items that one model alone has right) /
    (right of the first * right of the second): items on which the models agree cost no precision.
    """
    x, y = sum(first.outcomes), sum(second.outcomes)
    if not y:
        return None
    ratio = x / y
    if not x:
        return Kept(ratio, None)
    differ = sum(a != b for a, b in zip(first.outcomes, second.outcomes, strict=True))
    factor = math.exp(_QUANTILE * math.sqrt(differ / (x * y)))
    return Kept(ratio, (ratio / factor, ratio * factor))


def open_tasks(
    names: Sequence[str],
    *,
    limit: int | None = None,
    task_path: str | Path | None = None,
    watcher: Watcher | None = None,
) -> list[OpenTask]:
    """Tasks with their items, read before there is a model.

    Args:
        names: of lm-eval's tasks, tags or groups, or of those in `task_path`, which come first; a group gives all its
            members.
        limit: items from the start of each; None for all.
        task_path: a folder, searched with those below it for task files (.yaml) in lm-eval's form.
        watcher: told about progress.

    Raises:
        SecateurError: lm-eval is missing, there is no such folder or task, its data cannot be had, or it has no
            right and wrong answers that could be counted.
    """
    if limit is not None and limit < 1:
        raise SecateurError(f"the limit is {limit}; it must be at least 1 item")
    folder = None if task_path is None else local_path(task_path)
    if folder is not None and not folder.is_dir():
        raise SecateurError(f"{task_path}: no such folder; name one with task files (.yaml)")
    if not names:
        return []
    watcher = watcher or Silent()
    with watcher.busy("Looking for tasks"), _silence():
        managers = _managers(names, folder)
    opened: dict[str, OpenTask] = {}
    for name, manager in managers.items():
        with watcher.busy(f"Opening task {name}"):
            opened |= {task.task_name: _open(task, limit) for task in _load(manager, name)}
    return list(opened.values())


def _managers(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The index that each name is looked up in: the folder's where it is there, else lm-eval's own."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SecateurError(
            f"tasks need lm-eval, which does not import ({first_line(error)}); pip install 'secateur[tasks]'"
        ) from error
    given = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    listed = [] if given is None else given.all_tasks
    found: dict[str, Any] = {}
    for name in names:
        found[name] = given if name in listed else _own_index()
        known = found[name].all_tasks
        if name not in known:
            near = get_close_matches(name, [*known, *listed], n=5)
            where = "lm-eval" if folder is None else f"lm-eval and {folder}"
            raise SecateurError(
                f"task '{name}' does not exist in {where}; "
                + (f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists all, --task-path adds others")
            )
    return found


@cache
def _own_index() -> Any:
    """lm-eval's own tasks, thousands of files that take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str) -> list[Any]:
    """lm-eval's tasks of a name, with their data."""
    config = manager.task_index[name].cfg or {}
    path = config.get("dataset_path")
    local = "custom_dataset" in config or path in _FILES or (path is not None and Path(path).exists())
    # Asked first: the hub's client would retry for half a minute before it looked at its cache.
    reason = None if local else out_of_reach()
    try:
        with _silence(), _offline() if reason else nullcontext():
            return list(manager.load(name)["tasks"].values())
    except Exception as error:  # from a wrong path to a missing package, each has its own class
        if reason is not None:
            raise SecateurError(
                f"task {name} needs its data set{f' {path}' if path else ''} from the hub, which is not reachable "
                f"({reason}); give --task-path with a task file that reads local files"
            ) from error
        raise SecateurError(f"task {name} does not open: {first_line(error)}") from error


def _open(task: Any, limit: int | None) -> OpenTask:
    """The items of lm-eval's task, if these have right and wrong answers."""
    name = task.task_name
    try:
        with _silence():
            task.set_config("num_fewshot", 0)
            task.build_all_requests(limit=limit)
        requests = sorted(task.instances, key=lambda request: (request.doc_id, request.idx))
        asked = [list(group) for _, group in groupby(requests, key=lambda request: request.doc_id)]
        if any(request.request_type != "loglikelihood" for request in asked[0]):
            raise SecateurError(f"task {name} is not one of choosing between answers; only those can be scored here")
        # Some tasks call a share of the probability an accuracy.
        tried = task.process_results(asked[0][0].doc, [(-1.0 - rank, False) for rank in range(len(asked[0]))]).get(
            "acc"
        )
        if tried not in (0, 1):
            raise SecateurError(f"task {name} does not count right answers (acc); only such tasks can be scored here")
    except SecateurError:
        raise
    except Exception as error:  # task files hold templates and code, which can do anything
        raise SecateurError(
            f"task {name}: its items do not give what its file asks for: {first_line(error)}"
        ) from error
    return OpenTask(name, task, [(group[0].doc, [request.args for request in group]) for group in asked])


@contextmanager
def _silence(stderr: bool = True) -> Iterator[None]:
    """None of the notes of lm-eval and datasets, and on standard error none of their bars, which have no switch."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with quiet(), redirect_stderr(io.StringIO()) if stderr else nullcontext():
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """Make datasets look at its cache alone."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
