"""Limits of time and memory for a fuzz case, and the comparison of its result with the expected one."""

import contextlib
import io
import json
import random
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import SMALL
from transformers import AutoConfig

from models import blocks_of, layers_of, logits_of, masked, narrowed, relative, token_rows
from secateur import BlockStream, SecateurError, cli, open_checkpoint, prune
from secateur.base.quiet import quiet
from secateur.checkpoints.expert_matrices import whole
from secateur.fit.final_norm import scaled_final_norm
from secateur.fit.fitted_block import FittedBlock
from secateur.model.per_layer import model_class
from secateur.model.surgery import assign
from secateur.steps import write_model

SECONDS = 10
"""Limit of CPU time for a case, in seconds; most take 0.1."""
MEMORY = 2**30
"""Limit of additional address space for a case, in bytes; input files have about 100 kB."""
GROWTH = 300 * 2**20
"""Limit of additional resident memory for a case, in bytes; imports take most of it."""
TOLERANCE = 2e-4


class Hung(BaseException):
    """Raised when a case takes too long."""


class Fault(AssertionError):
    """Raised when a case ends in a wrong way."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limit the time and the memory of a case."""

    def stop(*_: object) -> None:
        raise Hung(f"more than {SECONDS} s")

    now, held = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2])
    # Reset the peak of resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
    most = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    if int(most.split()[1]) * 1024 - held > GROWTH:
        raise Fault(f"{most}, before it {held // 1024} kB")


class Skipped(Exception):
    """Raised where the random input is not a model at all."""


def command(*arguments: str | Path) -> None:
    """Run a command of secateur in this process; raise `SecateurError` with its error line."""
    out, log = io.StringIO(), io.StringIO()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with (
            patch.object(sys, "argv", ["secateur", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(log),
        ):
            cli.main()
    except SystemExit as end:
        said = log.getvalue().strip().splitlines()
        if end.code == 2 and said and said[-1].startswith("error: ") and "Traceback" not in log.getvalue():
            raise SecateurError(said[-1]) from None
        if end.code:
            raise Fault(f"exit code {end.code}: {said}") from None
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def pruned(rng: random.Random, model: Path, out: Path, **settings: Any) -> list[FittedBlock]:
    """Prune by the library or, at times, by the command line; return the written blocks."""
    settings = SMALL | settings
    blocks: list[FittedBlock] = []
    cut = write_model.slice_fitted

    def noticed(stream: BlockStream, block: FittedBlock, **how: Any) -> Any:
        # The values may be in files that are deleted with the run.
        blocks.append(replace(block, changed={name: whole(tensor) for name, tensor in block.changed.items()}))
        return cut(stream, block, **how)

    with patch.object(write_model, "slice_fitted", noticed):
        if rng.random() < 0.15:
            said = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in settings.items()}
            given = (part for name, value in said.items() for part in (f"--{name.replace('_', '-')}", value))
            command("prune", model, out, *map(str, given))
        else:
            prune(model, out, **settings)
    return blocks


def loaded(folder: Path) -> Any:
    """Return the model of a folder, loaded by transformers."""
    config = AutoConfig.from_pretrained(folder)
    with quiet():
        model, found = model_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"] or found["mismatched_keys"]:
        raise Fault(f"{folder.name}: {sorted(found['missing_keys'])[:3]} {sorted(found['mismatched_keys'])[:3]}")
    model.config.allow_global_per_layer_attribute_access = True
    return model.eval().requires_grad_(False)


def compare(dense: Path, out: Path, blocks: list[FittedBlock], recovery: str) -> None:
    """Check that the written model computes what the dense model computes with the removed units silenced."""
    ids = token_rows(2, 6)
    try:
        full = loaded(dense)
        ids %= full.config.vocab_size
        logits_of(full, ids)
        keeps = {block.index: block.keep for block in blocks}
        described = blocks_of(full)
    except (Exception, Fault):
        # transformers cannot run the dense model.
        open_checkpoint(out)
        return
    if recovery == "none":
        with masked(full, keeps):
            wanted = logits_of(full, ids)
    else:
        small = narrowed(full, keeps, {block.index: block.changed for block in blocks})
        scale = json.loads((out / "secateur.json").read_text())["final_norm_scale"]
        if scale is not None:
            for path, tensor in scaled_final_norm(BlockStream(open_checkpoint(dense)), scale).items():
                assign(small, path, tensor.float())
        wanted = logits_of(small, ids)
    assert len(described) == len(layers_of(full))
    found = logits_of(loaded(out), ids)
    if not torch.isfinite(wanted).all():
        return
    # Some configs make all logits zero.
    if not (torch.equal(found, wanted) or relative(found, wanted) < TOLERANCE):
        raise Fault(f"logits differ by {relative(found, wanted):.2e}")
