"""How far `prune` is from the products that it cannot do without, and what choosing widths takes beside it.

    python benchmarks/floor.py MODEL --calibration text.txt

The products are those that a dry run counts: for each fit two forwards of the blocks, each module's statistics and
solve once, and the steps of level 1; and, where the model writes rows, two operations a parameter and token. They are
turned into seconds by the speed of this machine's matrix products, measured in the same process before and after the
run, at the better of the two.
"""

import argparse
import tempfile
import time
from pathlib import Path

from secateur import prune
from secateur.commands.dry_run import SLACK
from secateur.commands.options import Options, Running
from secateur.commands.plan import propose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--length", type=int, default=Options.length)
    parser.add_argument("--effort", default=Options.effort)
    parser.add_argument("--modules", default="heads,channels")
    arguments = vars(parser.parse_args())
    model = arguments.pop("model")
    options = Options(modules=tuple(arguments.pop("modules").split(",")), **arguments)

    with tempfile.TemporaryDirectory() as folder:
        survey, out = Path(folder) / "survey.json", Path(folder) / "out"
        before = prune(model, out, options, Running(dry_run=True)).seconds / SLACK
        start = time.perf_counter()
        propose(model, options, Running(survey=survey))
        choosing = time.perf_counter() - start
        seconds = prune(model, out, options, Running(survey=survey)).seconds
        after = prune(model, Path(folder) / "again", options, Running(dry_run=True)).seconds / SLACK
    floor = min(before, after)
    print(f"products {floor:.1f} s ({before:.1f} before the run, {after:.1f} after it)")
    print(f"prune {seconds:.1f} s, {seconds / floor:.2f} times that")
    print(f"choosing widths {choosing:.1f} s, {choosing / seconds:.2f} of it")


if __name__ == "__main__":
    main()
