"""Base class of output formats, and the pruned model that a format writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.names import FORMATS, Declaration, find
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher
from secateur.base.run_folder import PARTIAL_OUTPUT
from secateur.checkpoints.expert_matrices import BlockTensor
from secateur.model.axes import Width
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.stream import BlockStream
from secateur.plan.meters import Meter, byte_meter, cache_meter
from secateur.plan.problem import Plan


@dataclass(frozen=True)
class Loading:
    """Instructions for opening an output."""

    line: str
    """Line that is printed at the end of a run."""
    expression: str = ""
    """Python expression that loads the model with transformers; empty if transformers cannot open it."""
    runs_code: bool = False
    """Whether opening the output runs a Python file in it; engines then need `--trust-remote-code`."""
    registered: str = ""
    """Python call after which the expression works without `trust_remote_code`; empty if there is none."""


@dataclass(frozen=True)
class PrunedModel:
    """Pruned model that is to be written."""

    plan: Plan
    blocks: Iterable[tuple[int, dict[str, BlockTensor]]]
    """Index and tensors of each pruned block, in order, by names inside the block. Blocks are computed one by one."""
    records: Mapping[str, Any] = field(default_factory=dict)
    """Contents of further files, by name: text, data for JSON, or a function that returns either when all blocks are
    written."""
    final_norm: Callable[[], Mapping[str, Tensor]] = dict
    """Function that returns changed tensors of the final norm, by their names in the model; called after all blocks are
    written."""
    fit_checkpoint: PassCheckpoint | None = None
    """Checkpoint of the pass that fits the blocks; it also saves how much of the files is written."""
    rows: Tensor | None = None
    """Calibration rows to which weights were fitted; a format may measure on them how much each weight matters."""
    state: Path | None = None
    """Folder of the run's state, from which an interrupted run resumes."""
    overwrite: bool = False
    """Whether to replace an output that exists."""
    watcher: Watcher = field(default_factory=Silent)

    @property
    def partial_output(self) -> Path | None:
        """Path of the unfinished output in the folder of the run's state; None without such a folder."""
        return None if self.state is None else self.state / PARTIAL_OUTPUT


class Format(ABC):
    """Output format for one model: which widths it can hold, and how it writes them."""

    declaration: ClassVar[Declaration]
    """Entry of the format in `secateur.base.names`."""
    other_kernels: ClassVar[str | None] = None
    """Engine whose kernels run the output; None for torch, which secateur uses to measure speed."""

    def __init__(
        self,
        stream: BlockStream,
        *,
        block_range: range | None = None,
        dtype: torch.dtype | None = None,
        type: str | None = None,
        biases: bool = False,
        same_width: bool = False,
    ):
        """Prepare the format for a model.

        Args:
            stream: The dense model.
            block_range: Blocks to prune; all by default.
            dtype: Dtype of the weights; the checkpoint's by default.
            type: Type of the tensors, one of the declared types.
            biases: Whether the recovery adds biases to output projections that have none.
            same_width: Whether all pruned blocks get the same width.
        """
        self.stream = stream
        self.block_range = range(len(stream)) if block_range is None else block_range
        self.dtype = dtype or stream.checkpoint.dtype
        self.type = type or next(iter(self.declaration.types), "")
        self.biases = biases
        self.same_width = same_width

    @classmethod
    def check_type(cls, type: str) -> None:
        """Raise `SecateurError` for a type of tensors that the format cannot write."""
        if type not in cls.declaration.types:
            raise SecateurError(f"no type {type!r}; choose one of {', '.join(cls.declaration.types)}")

    @classmethod
    @abstractmethod
    def how_to_load(cls, auto_class: str, path: str) -> Loading:
        """Return instructions for opening an output.

        Args:
            auto_class: Class of transformers that opens the dense model, such as AutoModelForCausalLM.
            path: The output.
        """

    @abstractmethod
    def unsupported_reason(self, width: Width) -> str | None:
        """Return why the format cannot hold a block of this width; None if it can. This takes no noticeable time.

        The reason is a clause that ends with what the user can do instead.
        """

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why the format cannot hold blocks of these widths together, or None; other blocks are dense."""
        return next(filter(None, map(self.unsupported_reason, dict.fromkeys(widths.values()))), None)

    @abstractmethod
    def write(self, out: Path, pruned: PrunedModel) -> int:
        """Write the pruned model completely or not at all, and return the bytes of its weights.

        Raises:
            SecateurError: The format cannot hold the plan, or the output cannot be written.
        """

    def byte_meter(self) -> Meter:
        """Return the meter of the bytes of weights in the output, without headers."""
        return byte_meter(self.stream, self.dtype, self.biases)

    def target_meter(self) -> Meter:
        """Return the meter of the bytes of weights for a target; it raises `SecateurError` if they are not known."""
        return self.byte_meter()

    @property
    def row_multiple(self) -> int:
        """Number of weights of a row that the format stores together, to which channels are rounded by default."""
        return 1

    def cache_meter(self) -> Meter:
        """Return the meter of the KV cache of an engine that runs the output."""
        return cache_meter(self.stream, self.dtype)

    @property
    def number_type(self) -> str:
        """Type of the numbers in the output, as reports name it."""
        return self.type or str(self.dtype).removeprefix("torch.")

    def check_output(self, out: Path, *, overwrite: bool = False, partial_output: Path | None = None) -> None:
        """Check that the model can be written: the output's name, room on the disk, and the range of the numbers.

        Args:
            out: The output.
            overwrite: Replace an output that exists.
            partial_output: Path of the unfinished output of an interrupted run.

        Raises:
            SecateurError: The model cannot be written.
        """
        self.output(out, overwrite=overwrite, at=partial_output).check()
        self.check_range()

    def check_range(self) -> None:
        """Raise `SecateurError` for weights that are too large for the output's type of numbers."""
        if self.dtype == torch.float16:
            self.stream.checkpoint.check_range(torch.float16)

    def output(self, out: Path, plan: Plan | None = None, *, overwrite: bool = False, at: Path | None = None) -> Output:
        """Return the output with its expected size.

        Args:
            out: The output.
            plan: Widths of the blocks; dense ones by default.
            overwrite: Replace an output that exists.
            at: Path of the output until it is complete.
        """
        meter = self.byte_meter()
        output = self.declaration.output(out, source=self.stream.checkpoint.path, overwrite=overwrite)
        output.expected_bytes, output.resume_path = round(meter.total(plan.widths if plan else {})), at
        return output

    def check_tokenizer(self, tokenizer: Any) -> None:  # noqa: B027 (most outputs hold any)
        """Raise `SecateurError` for a tokenizer that the output cannot hold."""

    def check_family(self) -> None:  # noqa: B027 (an output without a class has none to fit)
        """Check that a family's entry from a user's file (`--family`) fits the model's class.

        Raises:
            SecateurError: The entry does not fit.
        """

    def vllm_unsupported_reason(self, widths: Sequence[Width]) -> str | None:
        """Return why vLLM cannot serve an output with these widths; None if it can, or opens no such output."""
        return None

    def tensors(self, pruned: PrunedModel, written: Container[str] = ()) -> Iterator[tuple[str, BlockTensor]]:
        """Yield every tensor of the pruned model with its stored name.

        Tensors outside of pruned blocks come first, then the blocks, then the final norm.

        Args:
            pruned: The model; its blocks are consumed.
            written: Names of tensors to leave out, because an interrupted run has written them already.
        """
        stream, checkpoint = self.stream, self.stream.checkpoint
        inside, kept_dtypes = self.names_inside(pruned.plan), stream.kept_dtypes
        last = {str(checkpoint.resolve(name)): name for name in stream.final_norm}
        for name, info in checkpoint.weights.items():
            if name not in inside and name not in last and name not in written:
                tensor = checkpoint.read(name)
                keeps_dtype = name in kept_dtypes or not info.dtype.is_floating_point
                yield name, info.as_stored(tensor if keeps_dtype else tensor.to(self.dtype))
        for index, tensors in pruned.blocks:
            yield from self._split(index, tensors)
            # Free the block before the next one is computed.
            del tensors
        changed = pruned.final_norm()
        for stored, name in last.items():
            yield stored, changed.get(name, checkpoint.read(stored)).to(self.dtype)

    def names_inside(self, plan: Plan) -> set[str]:
        """Return the stored names of all tensors in the pruned blocks of the dense model."""
        stream = self.stream
        return {stored for i in plan.widths for name in stream.blocks[i].shapes for stored in stream.pieces(i, name)}

    def stored_name(self, index: int, name: str) -> str:
        """Return the stored name of a block's tensor; a bias that the checkpoint lacks is named after its weight."""
        if name not in self.stream.blocks[index].shapes:
            return self.stored_name(index, name.removesuffix("bias") + "weight").removesuffix("weight") + "bias"
        (stored,) = self.stream.pieces(index, name)
        return stored

    def _split(self, index: int, tensors: Mapping[str, BlockTensor]) -> Iterator[tuple[str, BlockTensor]]:
        """Yield a block's tensors in the pieces in which the checkpoint stores them."""
        for name, tensor in tensors.items():
            if name in self.stream.blocks[index].shapes:
                yield from self.stream.split(index, name, tensor)
            else:
                yield self.stored_name(index, name), tensor


def format_class(name: str) -> type[Format]:
    """Return the class of a format."""
    found: type[Format] = find(FORMATS[name].place)
    return found
