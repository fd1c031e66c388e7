"""Output of a command: progress and notes on standard error, results on standard output or as JSON."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secateur import __version__
from secateur.base.errors import SecateurError
from secateur.base.files import real_path
from secateur.base.options import option
from secateur.base.output import REPORT, REPORT_KEY, Output

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

MESSAGES = "Messages"
"""Panel of the options that every command has."""

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
    """
    if IS_WORKER:
        return
    if output_options.json is not None:
        value = _json_value(result)
        found = {REPORT_KEY: f"secateur {__version__}", **(value if isinstance(value, dict) else {"results": value})}
        text = json.dumps(found, indent=2)
        if output_options.json_printed:
            table, lines, times = None, [text], ""
        elif _report is not None:
            with _report as partial:
                partial.write_text(f"{text}\n")
    console = Console(highlight=False, markup=False)
    if table is not None:
        console.print(table, crop=False)
    for line in [*lines, f"Time: {times}."] if times else lines:
        console.print(line, soft_wrap=True)


def _json_value(value: Any) -> Any:
    """Return a value as JSON can hold it.

    Data classes and named tuples become dictionaries, paths become text, and numbers that are not finite become None.
    """
    if hasattr(value, "as_dict"):
        return _json_value(value.as_dict())
    if hasattr(value, "_asdict"):
        return _json_value(value._asdict())
    if is_dataclass(value):
        return {field.name: _json_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _json_value(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
