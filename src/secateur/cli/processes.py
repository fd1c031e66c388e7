"""`--processes`: processes on this machine that carry out one command together, started by torch's launcher."""

import logging
import os
import sys
from dataclasses import dataclass

from secateur.base.errors import SecateurError
from secateur.base.launcher import process_place
from secateur.base.options import option
from secateur.cli.terminal import EXIT_INTERRUPTED
from secateur.steps.options import COMPUTING


@dataclass(frozen=True)
class ProcessOptions:
    """Options of the commands that several processes can carry out together."""

    processes: int = option(
        1,
        COMPUTING,
        "Number of processes on this machine that do the work together, each with its share of the cores, or with a "
        "GPU of its own. On a CPU, two processes are faster than two threads.",
    )


def run_in_processes(options: ProcessOptions) -> None:
    """Carry out the command of this process in several others, and exit; return if this one is to carry it out.

    Raises:
        SecateurError: The number is below 1, or a launcher has started another number of processes.
    """
    count = options.processes
    if count < 1:
        raise SecateurError(f"processes is {count}; it must be at least 1")
    place = process_place()
    if count == 1 or count == place.size:
        return
    if place.size > 1:
        raise SecateurError(
            f"--processes is {count}, but a launcher has started {place.size} processes: leave out --processes"
        )
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each process prints its own error.
    logging.disable()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    config = LaunchConfig(
        1, 1, count, run_id="secateur", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "secateur", *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise SecateurError(
                f"process {rank} was ended by signal {-failure.exitcode}; if memory ran out, choose fewer processes or "
                "a lower --memory; the same command goes on"
            ) from None
        sys.exit(failure.exitcode)
    except SignalException:
        # The first process has said so.
        sys.exit(EXIT_INTERRUPTED)
    sys.exit()
