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
from dataclasses import replace
from importlib import import_module
from typing import IO, Any

import torch

import secateur.model.pass_checkpoint
import secateur.model.stream
from secateur import BlockStream
from secateur.base.services import Services

LENGTH, TOGETHER = 24, 4
"""Tokens of a row, and rows of a batch."""
PATIENCE = 180
"""Seconds."""


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


def kill_at(time: int | None, owner: Any, name: str) -> None:
    """Kill this process when it calls a function of a module or class for the given time."""
    function, count = getattr(owner, name), 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == time:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    setattr(owner, name, counted)


def carry_out(cases: list[dict[str, Any]]) -> int:
    """Run the cases, and return the exit code of the first one that fails, or zero."""
    torch.set_num_threads(1)
    if any(case["words"][0] == "retrain" for case in cases):
        # Rounding is all that may differ; bfloat16 would make much of it.
        for name in ("retrain", "targets"):
            import_module(f"secateur.retraining.{name}").fast_dtype = lambda _: torch.float32  # type: ignore[attr-defined]
    join = Services.join
    Services.join = lambda watcher: replace(join(watcher), batch_tokens=TOGETHER * LENGTH)  # type: ignore[method-assign]
    secateur.model.stream.MIXED = 1
    # Every block is kept, whatever that costs.
    secateur.model.pass_checkpoint.SPENT = float("inf")
    for case in cases:
        own: dict[str, Any] = case.get("own", {}).get(os.environ.get("RANK", "0"), {})
        kill_at(own.get("ends"), BlockStream, "filled")
        if "step" in own:
            kill_at(own["step"], import_module("secateur.retraining.student").Student, "forward")
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
