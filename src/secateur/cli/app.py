"""All commands in the order of the help, and `main`, which turns every error into one line."""

import gc
import logging
import os
import signal
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from secateur import __version__
from secateur.base.errors import SecateurError
from secateur.base.files import is_disk_full
from secateur.base.launcher import process_place
from secateur.base.words import joined
from secateur.cli import terminal
from secateur.cli.clean import clean
from secateur.cli.doctor import doctor
from secateur.cli.evaluate import evaluate
from secateur.cli.export import export
from secateur.cli.families import families
from secateur.cli.plan import plan
from secateur.cli.prune import prune
from secateur.cli.retrain import retrain
from secateur.cli.sizes import sizes
from secateur.cli.streams import protect_streams
from secateur.cli.survey import survey
from secateur.cli.terminal import EXIT_INTERRUPTED, IS_WORKER
from secateur.cli.trim import trim

app = typer.Typer(
    name="secateur",
    help="Prune a pretrained language model in one shot: remove attention heads, feed-forward channels and experts, "
    "and write an ordinary checkpoint. No training is needed, and only one block is in memory at a time.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for name, command in {
    "prune": prune,
    "trim": trim,
    "export": export,
    "retrain": retrain,
    "plan": plan,
    "survey": survey,
    "sizes": sizes,
    "eval": evaluate,
    "doctor": doctor,
    "clean": clean,
    "families": families,
}.items():
    app.command(name=name)(command)

DISTRIBUTED = ("prune", "survey", "retrain")
"""Commands that several processes can run together."""

# Some versions of typer bring their own copy of click. `BadParameter` is public in both; this is its base class.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Handle `secateur` without a command, and check that the command fits the number of processes."""
    if version:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif context.invoked_subcommand not in DISTRIBUTED and (size := process_place().size) > 1:
        raise SecateurError(
            f"{context.invoked_subcommand} runs in one process, but WORLD_SIZE is {size}: unset WORLD_SIZE; only "
            f"{joined(DISTRIBUTED)} run in several processes"
        )


def main() -> None:
    """Run the command line. An error is one line on standard error and exit code 2."""
    protect_streams()
    # With Python's own limits, a fifth of the time of all imports is spent on looking for cycles among new objects.
    gc.set_threshold(10_000, 50)
    # Threads that wait for each other sleep instead of spinning, which would take cores from other programs. torch
    # reads this variable when it is imported, which has not happened yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in () if "--verbose" in sys.argv else ("transformers", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    _interrupt_on_signals()
    try:
        code: Any = app(prog_name="secateur", standalone_mode=False)
    except SecateurError as error:
        if terminal.output_options.verbose:
            traceback.print_exc()
        _fail(str(error))
    except _UsageError as error:
        command_path = getattr(getattr(error, "ctx", None), "command_path", "secateur")
        _fail(f"{error.format_message().rstrip('.')}; see {command_path} --help")  # type: ignore[attr-defined]
    except OSError as error:
        if error.filename is None:
            raise
        advice = "free some space and run again" if is_disk_full(error) else "check the path and its permissions"
        _fail(f"{error.filename}: {error.strerror}; {advice}")
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        terminal.log.print("interrupted: no partial output is left")
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt_on_signals() -> None:
    """Make a polite kill, and the closing of the terminal, clean up as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # Under `nohup`, SIGHUP is ignored and stays so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, interrupt)


def _fail(message: str) -> NoReturn:
    """Print an error as one line, with the rank of the process if it is not rank 0, and exit with code 2."""
    rank = f"process {os.environ['RANK']}: " if IS_WORKER else ""
    print(f"error: {rank}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
