"""Fixtures of all tests: checkpoints of the tiny models, saved once a session, a browser, and the option `--few`."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import no_work, place, run  # noqa: F401

from models import ROWS, make_letters, save

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the cores, and so do the processes that tests start.
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)

gc.set_threshold(100_000, 50, 100)
"""Tests leave few cycles behind. With Python's own limits, a seventh of their time was spent on looking for them."""

os.fsync = lambda _: None
"""Nothing that tests write must survive a power cut, and each of thousands of files would wait for the disk."""

collect_ignore = ["serving", "older", "larger", "engines"]
"""Folders with Makefile targets of their own: `test-vllm`, `test-transformers4`, `test-larger`, `test-engines`."""

CheckpointFolder = Callable[[str], Path]
CallsOf = Callable[[Any, str], list[tuple[Any, ...]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--few",
        metavar="WORDS",
        help="of each test run one case, and cases with one of these words (separated by commas) in their name; "
        "leave out tests that are marked as slow",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the real model's tests first, so that workers that share the files end together; obey `--few`."""
    items.sort(key=lambda item: item.path.name != "test_real.py")
    if config.getoption("--few") is not None:
        items[:] = few(items, config.getoption("--few").split(","))


def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
    """Count fuzz cases whose input was refused, or was no model, apart from those with a right result."""
    # The report of a file that cannot be imported has no properties.
    end = dict(getattr(report, "user_properties", ())).get("end")
    return (end, ".", str(end).upper()) if report.when == "call" and report.passed and end else None


def few(items: list[pytest.Item], words: list[str]) -> list[pytest.Item]:
    """Return the first case of each test that is not slow, and all its cases with one of the words in their name."""
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    named = [item for item in items if any(word in item.nodeid.partition("[")[2] for word in words if word)]
    kept = {*first.values(), *named}
    return [item for item in items if item in kept and item.get_closest_marker("slow") is None]


@pytest.fixture(scope="module", autouse=True)
def _more_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    """Add the rows `MORE_ROWS` of a test file to `models.ROWS` while its tests run."""
    more = getattr(request.module, "MORE_ROWS", {})
    ROWS.update(more)
    yield
    for name in more:
        del ROWS[name]


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Return a function from the name of a row to its checkpoint folder, which tests must not change."""

    @cache
    def folder(name: str) -> Path:
        return save(name, tmp_path_factory.mktemp("dense") / name.replace(" ", "-"))

    return folder


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> CallsOf:
    """Return a function that makes a function of a module note its calls, and returns the list of their arguments."""

    def watched(owner: Any, name: str) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        function = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            calls.append((*given, named))
            return function(*given, **named)

        monkeypatch.setattr(owner, name, called)
        return calls

    return watched


@pytest.fixture(scope="session")
def letters_folder(checkpoint_folder: CheckpointFolder, tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Return a function like `checkpoint_folder`, whose models have a tokenizer that a GGUF file can hold."""

    @cache
    def folder(name: str) -> Path:
        path = shutil.copytree(checkpoint_folder(name), tmp_path_factory.mktemp("letters") / name.replace(" ", "-"))
        make_letters().save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield a headless Chromium: the system's, or else playwright's."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
