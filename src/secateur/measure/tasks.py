"""Multiple-choice tasks of lm-eval, opened with their items before any model is loaded."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.hub_source import out_of_reach

_FILES = {"arrow", "csv", "json", "parquet", "text"}
"""Values of `dataset_path` in task files that mean local files."""


@dataclass(frozen=True)
class OpenTask:
    """A task with its items, ready to be scored on any model."""

    name: str
    source: Any
    """The lm-eval task, which turns log-likelihoods into metrics."""
    items: list[tuple[Any, list[tuple[str, str]]]]
    """Each item as an lm-eval document, with the pairs of question and answer to score for it."""


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
