"""All commands in the order of the help, and `main`: one line for every mistake."""

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
from secateur.cli import terminal
from secateur.cli.clean import clean
from secateur.cli.compare import compare
from secateur.cli.doctor import doctor
from secateur.cli.evaluate import evaluate
from secateur.cli.export import export
from secateur.cli.families import families
from secateur.cli.plan import plan
from secateur.cli.prune import prune
from secateur.cli.retrain import retrain
from secateur.cli.sizes import sizes
from secateur.cli.survey import survey
from secateur.cli.terminal import EXIT_INTERRUPTED, IS_WORKER, exit_interrupted

app = typer.Typer(
    name="secateur",
    help="Prune a pretrained language model in one shot: fewer attention heads, narrower feed-forward layers, "
    "an ordinary checkpoint out. By default nothing is trained, and one block is in memory at a time.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(prune)
app.command()(export)
app.command()(retrain)
app.command()(plan)
app.command()(survey)
app.command()(sizes)
app.command(name="eval")(evaluate)
app.command()(doctor)
app.command()(compare)
app.command()(clean)
app.command()(families)

TOGETHER = ("prune", "survey")
"""What several processes do together."""

# Newer typers carry a click of their own; its base class of mistakes is reached through what both export.
_Mistake: type[Exception] = typer.BadParameter.__mro__[2]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Top level: only `--version`."""
    if version:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif context.invoked_subcommand not in TOGETHER and (size := process_place().size) > 1:
        raise SecateurError(
            f"{context.invoked_subcommand} runs in one process, and WORLD_SIZE is {size}; only "
            f"{' and '.join(TOGETHER)} share their work"
        )


def main() -> None:
    """Run the command line; mistakes are one line on standard error and exit code 2."""
    terminal.settle_streams()
    # Threads that wait for each other sleep: spinning, they take the cores from whatever else runs here. torch reads it
    # when it is loaded, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in () if "--verbose" in sys.argv else ("transformers", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # A polite kill cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # A closed terminal; `nohup` has it ignored.
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        code: Any = app(prog_name="secateur", standalone_mode=False)
    except SecateurError as error:
        if terminal.speech.verbose:
            traceback.print_exc()
        _fail(str(error))
    except _Mistake as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "secateur")
        _fail(f"{error.format_message().rstrip('.')}; see {where} --help")  # type: ignore[attr-defined]
    except OSError as error:
        if error.filename is None:
            if not (is_disk_full(error) and _printing(error)):
                raise
            _fail(str(terminal.output_is_full()))
        advice = "make room and run again" if is_disk_full(error) else "check the path and its permissions"
        _fail(f"{error.filename}: {error.strerror}; {advice}")
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        exit_interrupted("nothing is left half-written")
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _printing(error: OSError) -> bool:
    """Whether it came up where text is printed, help among it."""
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return frame.f_globals["__name__"].partition(".")[0] in ("rich", "typer", "click")


def _fail(message: str) -> NoReturn:
    place = f"process {os.environ['RANK']}: " if IS_WORKER else ""
    print(f"error: {place}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
