"""Resources that a run is opened with: processes, memory, folder of the unfinished run, progress output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from secateur.base.memory import MemoryBudget
from secateur.base.processes import Processes
from secateur.base.progress import Silent, Watcher
from secateur.base.run_folder import RunFolder

BATCH_TOKENS = 2048
"""Tokens that run through a block at once: enough for fast products, and small next to the weights of a block."""


@dataclass(frozen=True)
class Services:
    """Resources of one run; by default one process, no saved state and no progress output."""

    processes: Processes = field(default_factory=Processes)
    """Processes that share the calibration rows."""
    batch_tokens: int = BATCH_TOKENS
    """Largest number of tokens in a batch; smaller if the memory of the device is small."""
    has_retried: bool = False
    """Whether the device ran out of memory, and the run is resumed with smaller batches."""
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    """Memory for activations and for weights that are used again; the rest goes to files, or is read again."""
    run_folder: RunFolder | None = None
    """Folder of the unfinished run, at rank 0 only: results of steps, checkpoints of passes, activations in files."""
    watcher: Watcher = field(default_factory=Silent)
    """Progress output."""

    @classmethod
    def join(cls, watcher: Watcher | None) -> Services:
        """Return services with all processes that a launcher has started; only rank 0 reports progress."""
        processes = Processes.join()
        return cls(processes, watcher=watcher if watcher and processes.is_first else Silent())

    def saved_result(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of a step, as JSON holds it: from the run folder, or computed by all processes together.

        Args:
            name: Name of the step.
            make: Computes the result.
        """
        folder = self.run_folder
        is_saved = self.processes.broadcast(lambda: folder is not None and folder.has_result(name))
        result = None if is_saved else make()
        return self.processes.broadcast(lambda: result if folder is None else folder.result(name, lambda: result))
