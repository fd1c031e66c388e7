"""Start processes that prune together, as children of a process that has imported everything once.

Each line of standard input is a team, as JSON: the environment of each member, with a launcher's variables or without,
and the cases that all members run. The answer is one line: the exit code and the standard error of each member. A case
has the words of a command, and for single members further `words`, or the number of the block, in the order in which
blocks are filled, or of the training step (`step`), at which the member is killed.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from typing import IO, Any

import torch
from torch import nn

import secateur.fit.block_regression
import secateur.model.pass_checkpoint
import secateur.model.stream
from secateur.base.services import Services
from secateur.model.stream import BlockStream

LENGTH, TOGETHER = 24, 4
"""Tokens of a row, and rows of a batch."""
PATIENCE = 180
"""Seconds."""


def end_at(filling: int | None) -> None:
    """Kill this process when it fills a block for the given time."""
    filled, count = BlockStream.filled, 0

    def counted(stream: BlockStream, index: int) -> AbstractContextManager[nn.Module]:
        nonlocal count
        count += 1
        if count == filling:
            os.kill(os.getpid(), signal.SIGKILL)
        return filled(stream, index)

    BlockStream.filled = counted  # type: ignore[method-assign]


def end_at_step(step: int | None) -> None:
    """Kill this process when it computes the loss of a training step for the given time."""
    student = import_module("secateur.retraining.student").Student
    forward, count = student.forward, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*arguments, **named)

    student.forward = counted


def run(words: list[str]) -> int:
    """Run a command, and return its exit code."""
    # What it says depends on the launcher's variables, when it is imported.
    from secateur import cli

    sys.argv = ["secateur", *words]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def carry_out(cases: list[dict[str, Any]]) -> int:
    """Run the cases, and return the exit code of the first one that fails, or zero."""
    torch.set_num_threads(1)
    # Rounding is all that may differ; bfloat16 would make much of it.
    secateur.fit.block_regression.fast_dtype = lambda _: torch.float32
    join = Services.join
    Services.join = lambda watcher: replace(join(watcher), batch_tokens=TOGETHER * LENGTH)  # type: ignore[method-assign]
    secateur.model.stream.MIXED = 1
    # Every block is kept, whatever that costs.
    secateur.model.pass_checkpoint.SPENT = float("inf")
    if any(case["words"][0] == "retrain" for case in cases):
        for name in ("retrain", "targets"):
            import_module(f"secateur.retraining.{name}").fast_dtype = lambda _: torch.float32  # type: ignore[attr-defined]
    for case in cases:
        own: dict[str, Any] = case.get("own", {}).get(os.environ.get("RANK", "0"), {})
        end_at(own.get("ends"))
        if "step" in own:
            end_at_step(own["step"])
        if code := run([*case["words"], *own.get("words", [])]):
            return code
    return 0


def born(environment: dict[str, str], cases: list[dict[str, Any]], said: IO[bytes]) -> int:
    """Start a child, and return its process id."""
    if child := os.fork():
        return child
    # A team that waits for ever fails in place of the whole test run.
    signal.alarm(PATIENCE)
    os.environ.update(environment)
    os.dup2(said.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        code = carry_out(cases)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    # A command imports a model's code when it opens the model.
    import_module("transformers.models.llama.modeling_llama")
    for line in sys.stdin:
        team = json.loads(line)
        files = [tempfile.TemporaryFile() for _ in team["members"]]  # noqa: SIM115
        children = [born(own, team["cases"], file) for own, file in zip(team["members"], files, strict=True)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for file in files:
            file.seek(0)
        answer = [(code, file.read().decode()) for code, file in zip(codes, files, strict=True)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
