"""Memory, open files and threads do not grow between the 30th and the 60th prune in one process."""

import gc
from typing import Any

import psutil

from models import save
from secateur import prune

WARM, RUNS = 30, 60
SLACK = 16 * 2**20
"""Accepted growth in bytes. The allocator keeps more memory from prune to prune until about the thirtieth."""


def state() -> tuple[int, int, int]:
    """Return resident bytes, and the numbers of open files and threads."""
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def test_nothing_grows(tmp_path):
    names = ("llama", "gemma2", "gpt2", "qwen3_moe")
    folders = [save(name, tmp_path / name) for name in names]
    how: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 24, "device": "cpu", "overwrite": True}
    warm = state()
    for number in range(RUNS):
        if number == WARM:
            warm = state()
        prune(folders[number % len(folders)], tmp_path / "out", sparsity=0.2 + 0.01 * (number % 7), **how)
    memory, files, threads = state()
    print(f"after {WARM}: {warm}, after {RUNS}: {(memory, files, threads)}")
    assert memory < warm[0] + SLACK
    assert (files, threads) == warm[1:]
