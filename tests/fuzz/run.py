"""Run many fuzz cases in several processes: `python run.py [FIRST] [COUNT]`.

The default of COUNT is the environment variable FUZZ. `python run.py NUMBER 1` runs a single case. For a process that
dies, the number of its case is printed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 120
"""Seconds without output after which a process is killed."""


def child(place: str, numbers: range) -> None:
    """Run cases one after the other, and print a line for each."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import torch
    from bench import Bench
    from cases import kind_of, run
    from right import Fault

    torch.set_num_threads(1)
    os.fsync = lambda _: None
    bench = Bench(Path(place))
    for number in numbers:
        print(f"case {number}", flush=True)
        try:
            print(f"end {kind_of(number)} {run(bench, number)}", flush=True)
        except Fault as fault:
            print(f"end {kind_of(number)} FAILED\n{fault}", flush=True)


class Part:
    """Process that runs some of the cases, and its output."""

    def __init__(self, numbers: range):
        self.numbers, self.last, self.kept = numbers, None, ""
        self.place = tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True)
        self.log = Path(self.place.name) / "log"
        command = [sys.executable, __file__, "child", self.place.name]
        command += map(str, (numbers.start, numbers.stop, numbers.step))
        with self.log.open("w") as file:
            how = {"stdout": file, "stderr": subprocess.STDOUT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
            self.process = subprocess.Popen(command, **how)
        self.read = self.log.open(errors="replace")

    def lines(self) -> list[str]:
        """Return the lines that the process has printed since the last call."""
        *found, self.kept = (self.kept + self.read.read()).split("\n")
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.read.close()
        self.place.cleanup()


def main(first: int, count: int) -> int:
    ends: Counter[tuple[str, str]] = Counter()
    workers = max(1, min(len(os.sched_getaffinity(0)), count))
    parts = [Part(range(first + worker, first + count, workers)) for worker in range(workers)]
    died = 0
    try:
        while parts:
            time.sleep(0.2)
            for part in list(parts):
                # The order matters: output after this check is read in the next round.
                ended = part.process.poll() is not None
                for line in part.lines():
                    if line.startswith("case ") and line.removeprefix("case ").isdecimal():
                        part.last = int(line.removeprefix("case "))
                    elif line.startswith("end ") and part.last is not None:
                        _, kind, end = line.split()
                        ends[kind, end] += 1
                        part.last = None
                    elif line.strip():
                        print(line, flush=True)
                if not ended and time.time() - part.log.stat().st_mtime > PATIENCE:
                    part.process.kill()
                if ended:
                    part.close()
                    parts.remove(part)
                    if part.last is not None:
                        died += 1
                        print(f"case {part.last}: the process died or hung ({part.process.returncode})", flush=True)
                        if rest := range(part.last + part.numbers.step, part.numbers.stop, part.numbers.step):
                            parts.append(Part(rest))
                    elif part.process.returncode:
                        died += 1
    finally:
        for part in parts:
            part.close()
    for kind in sorted({kind for kind, _ in ends}):
        print(kind, *(f"{end} {times}" for (one, end), times in sorted(ends.items()) if one == kind))
    failed = died + sum(times for (_, end), times in ends.items() if end == "FAILED")
    print(f"{ends.total() + died} cases, {failed} failed; one alone: python {Path(__file__).name} NUMBER 1")
    return bool(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], range(*map(int, sys.argv[3:])))
    else:
        given = [int(number) for number in sys.argv[1:]]
        sys.exit(main(*(given + [0, int(os.environ.get("FUZZ", "10000"))][len(given) :])))
