"""One process of several that prune together: `RANK=0 WORLD_SIZE=2 ... python member.py CASES`, a JSON file.

A case has the words of a command, and what single processes have of their own: more `words`, or the block, counted as
blocks are filled, at which they are killed. Without a launcher's variables, this is a process on its own.
"""

import json
import os
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur.fit.level1_step
import secateur.model.journal
import secateur.model.rows
from secateur.cli import main
from secateur.model.stream import BlockStream

LENGTH, TOGETHER = 24, 4
"""Tokens of a row, and rows of a batch."""


def end_at(filling: int | None) -> None:
    """Let this process be killed."""
    filled, count = BlockStream.filled, 0

    def counted(stream: BlockStream, index: int) -> AbstractContextManager[nn.Module]:
        nonlocal count
        count += 1
        if count == filling:
            os.kill(os.getpid(), signal.SIGKILL)
        return filled(stream, index)

    BlockStream.filled = counted  # type: ignore[method-assign]


def run(words: list[str]) -> int:
    """A command's exit code."""
    sys.argv = ["secateur", *words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Rounding is all that may differ; bfloat16 would make much of it.
    secateur.fit.level1_step.fast_dtype = lambda _: torch.float32
    secateur.model.rows.BATCH_TOKENS = TOGETHER * LENGTH
    # Every block is kept, whatever that costs.
    secateur.model.journal.SPENT = float("inf")
    for case in json.loads(Path(sys.argv[1]).read_text()):
        own: dict[str, Any] = case.get("own", {}).get(os.environ.get("RANK", "0"), {})
        end_at(own.get("ends"))
        if code := run([*case["words"], *own.get("words", [])]):
            sys.exit(code)
