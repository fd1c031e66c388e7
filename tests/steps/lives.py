"""Kill runs of `prune` at many points and resume them: `python lives.py MODEL FOLDER CASES`; prints figures as JSON.

CASES is a JSON file. A case has a name, a number of points, and options of `prune`. A first child process runs to the
end and logs each time that it touches the disk. For each point, spread evenly over the log, a second child is killed
there by SIGKILL, and a third child resumes the run. Its output is compared with that of the first child.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur.model.pass_checkpoint
from secateur import prune
from secateur.write.shards import ShardWriter

TOUCHES: list[tuple[Any, str]] = [
    (os, "fsync"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (ShardWriter, "add"),
]


def live(model: Path, out: Path, log: Path, end: int, **asked: Any) -> int:
    """Run `prune` in a child that is killed at its `end`-th touch of the disk, and return its exit status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    count = 0

    def touching(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def touched(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            with log.open("a") as lines:
                lines.write(f"{name} {given[0] if given else ''}\n")
            if count == end:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return touched

    for owner, name in TOUCHES:
        setattr(owner, name, touching(getattr(owner, name), name))
    # Every block is kept, whatever that costs.
    secateur.model.pass_checkpoint.SPENT = float("inf")
    try:
        prune(model, out, **asked)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def bytes_of(out: Path) -> dict[str, str]:
    """Return the hash of every file except the timings."""
    files = sorted(out.rglob("*")) if out.is_dir() else [out]
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.name != "timings.json"
    }


def killed_anywhere(model: Path, folder: Path, points: int, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the outcome of each run that was killed and resumed."""
    folder.mkdir()
    name = "out.gguf" if asked.get("format") == "gguf" else "out"
    first, log = folder / "first", folder / "log"
    # What is read off the model's classes is kept for later runs, which would touch the disk less often than the first.
    for place, lines in ((folder / "filling", folder / "unread"), (first, log)):
        place.mkdir()
        assert live(model, place / name, lines, 0, **asked) == 0
    wanted, touches = bytes_of(first / name), log.read_text().splitlines()
    # From where there is a state to the moment when the output takes its name.
    begin = 1 + next(number for number, line in enumerate(touches) if line.startswith("fsync"))
    last = max(number for number, line in enumerate(touches, 1) if line.split()[0] in ("rename", "replace"))
    found = []
    for number in range(points):
        end = begin + round(number * (last - begin) / (points - 1))
        place = folder / f"killed-{end}"
        place.mkdir()
        killed = live(model, place / name, log, end, **asked)
        early = (place / name).exists()
        lived = live(model, place / name, log, 0, **asked)
        same = lived == 0 and bytes_of(place / name) == wanted
        left = [one.name for one in place.iterdir() if one.name != name]
        found.append({"at": touches[end - 1], "killed": killed, "early": early, "same": same, "left": left})
    return found


def main() -> None:
    torch.set_num_threads(1)
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    # What every child would import.
    prune(model, folder / "warm", calibration="random", samples=8, length=24, effort="quick")
    cases = json.loads(Path(sys.argv[3]).read_text())
    print(json.dumps({name: killed_anywhere(model, folder / name, *case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
