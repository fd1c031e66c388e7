"""Output of a command: progress and notes on standard error, results on standard output or as JSON."""

import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from secateur import __version__
from secateur.base.errors import SecateurError
from secateur.base.files import is_disk_full, real_path
from secateur.base.options import option
from secateur.base.output import REPORT, REPORT_KEY, Output
from secateur.report.json_values import json_value

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

MESSAGES = "Messages"
"""Panel of the options that every command has."""

LONG_WORD = 20
"""Number of characters from which on a word of a table, such as a path, may be broken."""

IS_WORKER = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
"""Whether this is one of several processes, but not rank 0: it prints errors only."""

log = Console(stderr=True, highlight=False, markup=False, quiet=IS_WORKER)


@dataclass(frozen=True)
class OutputOptions:
    """Output options of every command: --json, --quiet and --verbose."""

    json: Path | None = option(
        None,
        MESSAGES,
        "Write the results to this file as JSON. With -, print JSON instead of the table.",
        default_text="none",
    )
    quiet: bool = option(False, MESSAGES, "Print no progress and no notes, only the result.")
    verbose: bool = option(False, MESSAGES, "Show warnings of other libraries, and the traceback of an error.")

    @property
    def json_printed(self) -> bool:
        """Whether JSON is printed instead of the table."""
        return str(self.json) == "-"


output_options = OutputOptions()
"""Output options of the command that runs in this process."""
_report: Output | None = None
"""File of --json."""


def set_output_options(options: OutputOptions, overwrite: bool, others: Iterable[Path]) -> None:
    """Set the output options of the command.

    Args:
        options: The options.
        overwrite: Whether the JSON file may replace a report.
        others: All other paths of the command line.

    Raises:
        SecateurError: The JSON file cannot be written or is one of the other paths, or exists and may not be replaced.
    """
    global output_options, _report
    output_options, log.quiet = options, IS_WORKER or options.quiet
    logging.getLogger("secateur").setLevel(logging.DEBUG if options.verbose else logging.NOTSET)
    if options.json is not None and not options.json_printed:
        _report = Output(options.json, suffix="", overwrite=overwrite, kind=REPORT)
        if _report.path in map(real_path, others):
            raise SecateurError(f"{options.json}: --json and another path of this command are the same; change one")
        _report.check()


def print_result(result: Any, table: Table | None, lines: list[str], times: str = "") -> None:
    """Print the result of a command on standard output, or write it as JSON.

    Args:
        result: Figures for JSON.
        table: Printed first.
        lines: Printed below the table.
        times: Durations of the steps, printed last.

    Raises:
        SecateurError: Standard output is full.
    """
    if IS_WORKER:
        return
    if output_options.json is not None:
        value = json_value(result)
        found = {REPORT_KEY: f"secateur {__version__}", **(value if isinstance(value, dict) else {"results": value})}
        text = json.dumps(found, indent=2)
        if output_options.json_printed:
            table, lines, times = None, [text], ""
        elif _report is not None:
            with _report as partial:
                partial.write_text(f"{text}\n")
    console = Console(highlight=False, markup=False)
    try:
        if table is not None:
            _keep_figures_whole(table)
            console.print(table, crop=False)
        for line in [*lines, f"Time: {times}."] if times else lines:
            console.print(line, soft_wrap=True)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise output_full_error("; the output files are complete") from error


def _keep_figures_whole(table: Table) -> None:
    """Make columns as wide as their figures and short words, whatever the width of the terminal; the rest is folded."""
    for column in table.columns:
        column.overflow = "fold"
        cells = [str(cell) for cell in column.cells]
        words = cells if column.justify == "right" else [word[:LONG_WORD] for cell in cells for word in cell.split()]
        column.min_width = max(map(len, words), default=0)


def output_full_error(detail: str = "") -> SecateurError:
    """Return the error for a full device behind standard output.

    Text that is still buffered is discarded, as writing it at exit would fail once more.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return SecateurError(f"standard output: the device is full{detail}; free some space or print elsewhere")


def exit_interrupted(state: str) -> NoReturn:
    """Exit after an interrupt, with one line on what is left on disk."""
    log.print(f"interrupted: {state}")
    sys.exit(EXIT_INTERRUPTED)
