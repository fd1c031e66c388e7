"""Resources of a run: processes, memory, a folder to resume from, progress output. A model is opened with them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from secateur.base.processes import Processes
from secateur.base.progress import Silent, Watcher
from secateur.base.run_folder import RunFolder

BATCH_TOKENS = 2048
"""Tokens that run through a block at once: enough for fast products, little next to a block's weights."""


@dataclass(frozen=True)
class Services:
    """Resources of one run; by default those of a process alone that saves nothing and says nothing."""

    processes: Processes = field(default_factory=Processes)
    """The processes that share the rows."""
    batch_tokens: int = BATCH_TOKENS
    """Most tokens of a batch; fewer where the memory of the device is small."""
    activation_bytes: int | None = None
    """Bytes of activations that stay in memory, others go to files; by default a quarter of the machine's memory."""
    run_folder: RunFolder | None = None
    """Folder of the unfinished run, of rank 0: results of steps, checkpoints of passes, activations in files."""
    watcher: Watcher = field(default_factory=Silent)
    """Progress output."""

    @classmethod
    def join(cls, watcher: Watcher | None) -> Services:
        """Return services with all processes that a launcher has started, of which rank 0 reports progress."""
        processes = Processes.join()
        return cls(processes, watcher=watcher if watcher and processes.is_first else Silent())

    def saved_result(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a step's result as JSON holds it; all processes make it together unless the run folder has it."""
        folder = self.run_folder
        made = None if self.processes.broadcast(lambda: folder is not None and folder.has_result(name)) else make()
        return self.processes.broadcast(lambda: made if folder is None else folder.result(name, lambda: made))
