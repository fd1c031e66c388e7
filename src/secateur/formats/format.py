"""The questions that an output format answers, and what it is handed to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher
from secateur.base.run_folder import PARTIAL_OUTPUT
from secateur.formats.registry import CLASSES, FORMATS, Declaration
from secateur.model.axes import Width
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.stream import BlockStream
from secateur.plan.meters import Meter, byte_meter
from secateur.plan.problem import Plan


@dataclass(frozen=True)
class Loading:
    """How a person opens an output."""

    line: str
    """What the terminal says at the end of a run."""
    expression: str = ""
    """Python that gives the model, by a class of transformers; empty where transformers does not open it."""
    runs_code: bool = False
    """Opening the output runs a Python file in it, which engines must be allowed (`--trust-remote-code`)."""
    registered: str = ""
    """A call after which the expression needs no permission to run code; empty where there is none."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model that is about to be written."""

    plan: Plan
    blocks: Iterable[tuple[int, dict[str, Tensor]]]
    """Each pruned block's tensors by their names inside the block, in order; made one by one."""
    records: Mapping[str, Any] = field(default_factory=dict)
    """Files to add, name to contents: text, what is to be JSON, or a function that gives either once the blocks are
    done."""
    final_norm: Callable[[], Mapping[str, Tensor]] = dict
    """Gives other values for the final norm, by their names in the model, once the blocks are done."""
    fit_checkpoint: PassCheckpoint | None = None
    """Checkpoint of the pass that fits the blocks, which also saves how far the files are written."""
    state: Path | None = None
    """The folder of the run's state, where a run that was stopped goes on."""
    overwrite: bool = False
    watcher: Watcher = field(default_factory=Silent)

    @property
    def growing(self) -> Path | None:
        """Where the output grows in the folder of the run's state."""
        return None if self.state is None else self.state / PARTIAL_OUTPUT


class Format(ABC):
    """An output format, bound to an open model: the widths that it holds, and how it writes them."""

    declaration: ClassVar[Declaration]
    """What `@output_format` says of the class."""
    other_kernels: ClassVar[str | None] = None
    """The engine whose kernels run the output; None for torch's, by which speed is measured."""

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
        """Bind the format to a model.

        Args:
            stream: the dense model.
            block_range: the blocks to prune; all by default.
            dtype: of the weights; the checkpoint's by default.
            type: of the tensors, one of the declared types.
            biases: the recovery adds biases to output projections that have none.
            same_width: all pruned blocks get the same width, not one of their own each.
        """
        self.stream = stream
        self.block_range = range(len(stream)) if block_range is None else block_range
        self.dtype = dtype or stream.checkpoint.dtype
        self.type = type or next(iter(self.declaration.types), "")
        self.biases = biases
        self.same_width = same_width

    @classmethod
    def check_type(cls, type: str) -> None:
        """Raise `SecateurError` for a type of tensors that the format does not have."""
        if type not in cls.declaration.types:
            raise SecateurError(f"no type {type!r}; choose one of {', '.join(cls.declaration.types)}")

    @classmethod
    @abstractmethod
    def how_to_load(cls, auto_class: str, path: str) -> Loading:
        """Return how a person opens an output.

        Args:
            auto_class: the class of transformers that opens the dense model, such as AutoModelForCausalLM.
            path: the output.
        """

    @abstractmethod
    def unsupported_reason(self, width: Width) -> str | None:
        """Return why a plan may not give this width to blocks, or None.

        The reason is a clause that ends in what can be done instead. It costs nothing to ask.
        """

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why the format cannot hold blocks at these widths together, or None; absent blocks are dense."""
        return next(filter(None, map(self.unsupported_reason, dict.fromkeys(widths.values()))), None)

    @abstractmethod
    def write(self, out: Path, pruned: PrunedModel) -> int:
        """Write the pruned model, whole or not at all, and return the bytes of its weights.

        Raises:
            SecateurError: the format cannot hold the plan, or the output cannot be written.
        """

    def byte_meter(self) -> Meter:
        """Return the meter of the bytes that weights take in the output, without headers."""
        return byte_meter(self.stream, self.dtype, self.biases)

    @property
    def number_type(self) -> str:
        """The type of the numbers in the output, for people."""
        return self.type or str(self.dtype).removeprefix("torch.")

    def check_output(self, out: Path, *, overwrite: bool = False, growing: Path | None = None) -> None:
        """See that the model can be written to a place: its name, room on the disk, the range of its numbers.

        Args:
            out: the output.
            overwrite: an output that is there may be replaced.
            growing: where an earlier run that was stopped has begun to write.

        Raises:
            SecateurError: it cannot.
        """
        self.output(out, overwrite=overwrite, at=growing).check()
        self.check_range()

    def check_range(self) -> None:
        """Raise `SecateurError` for weights that the numbers of the output do not hold."""
        if self.dtype == torch.float16:
            self.stream.checkpoint.check_range(torch.float16)

    def output(self, out: Path, plan: Plan | None = None, *, overwrite: bool = False, at: Path | None = None) -> Output:
        """Return the output of the weights at the widths of a plan, dense ones by default."""
        meter = self.byte_meter()
        output = self.declaration.output(out, source=self.stream.checkpoint.path, overwrite=overwrite)
        output.expected_bytes, output.resume_path = round(meter.total(plan.widths if plan else {})), at
        return output

    def check_tokenizer(self, tokenizer: Any) -> None:  # noqa: B027 (most outputs hold any)
        """Raise `SecateurError` for a tokenizer that the output cannot hold."""

    def check_family(self) -> None:  # noqa: B027 (an output without a class has none to fit)
        """See that what a person says of a family (`--family`) fits its class.

        Raises:
            SecateurError: it does not.
        """

    def vllm_unsupported_reason(self, widths: Sequence[Width]) -> str | None:
        """Return why vLLM does not serve an output with these widths; None where it does, or opens no such output."""
        return None

    def tensors(self, pruned: PrunedModel, written: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the pruned model by its stored name: what is in no pruned block, blocks, final norm.

        Args:
            pruned: the model; its blocks are consumed.
            written: names to leave out, as an earlier run has written them.
        """
        stream, checkpoint = self.stream, self.stream.checkpoint
        inside = self.names_inside(pruned.plan)
        last = {str(checkpoint.resolve(name)): name for name in stream.final_norm}
        for name, info in checkpoint.weights.items():
            if name not in inside and name not in last and name not in written:
                tensor = checkpoint.read(name)
                yield name, info.as_stored(tensor.to(self.dtype) if info.dtype.is_floating_point else tensor)
        for index, tensors in pruned.blocks:
            yield from self._as_stored(index, tensors)
            # The next block is made behind this line.
            del tensors
        changed = pruned.final_norm()
        for stored, name in last.items():
            yield stored, changed.get(name, checkpoint.read(stored)).to(self.dtype)

    def names_inside(self, plan: Plan) -> set[str]:
        """Return the stored names of all tensors in the pruned blocks of the dense model."""
        stream = self.stream
        return {
            stored for i in plan.widths for name in stream.blocks[i].shapes for stored in stream.stored_names(i, name)
        }

    def stored_name(self, index: int, name: str) -> str:
        """Return the stored name of a block's tensor; one that the checkpoint lacks is named after its weight."""
        stream = self.stream
        if name in stream.blocks[index].shapes:
            return stream.stored_name(index, name)
        return stream.stored_name(index, name.removesuffix("bias") + "weight").removesuffix("weight") + "bias"

    def _as_stored(self, index: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield a block's tensors in as many pieces as the checkpoint holds them."""
        for name, tensor in tensors.items():
            if name in self.stream.blocks[index].shapes:
                yield from self.stream.as_stored(index, name, tensor).items()
            else:
                yield self.stored_name(index, name), tensor


def format_class(name: str) -> type[Format]:
    """Return the class of a format."""
    if name not in CLASSES:
        import_module(f"secateur.formats.{FORMATS[name].file}")
    return CLASSES[name]
