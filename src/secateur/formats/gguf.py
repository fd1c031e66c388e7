"""The format `gguf`: one file for llama.cpp."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.base.names import FORMATS
from secateur.base.output import Output
from secateur.base.progress import Watcher
from secateur.formats.converted import Converted
from secateur.formats.format import Loading
from secateur.formats.gguf_as_input import storage_of
from secateur.formats.gguf_choice import gguf_unsupported
from secateur.formats.gguf_export import export
from secateur.formats.gguf_meter import gguf_byte_meter
from secateur.formats.gguf_sizes import STATED_AXES
from secateur.formats.gguf_tokenizer import vocabulary_of
from secateur.formats.gguf_types import check_type
from secateur.model.axes import Width, axis_kinds
from secateur.plan.meters import Meter, added_biases


class GgufFormat(Converted):
    """GGUF file. Blocks may differ in width if llama.cpp's architecture allows it; otherwise all have one width."""

    declaration = FORMATS["gguf"]
    other_kernels = "llama.cpp"

    @classmethod
    def check_type(cls, type: str) -> None:
        """Raise `SecateurError` for a type that cannot be written here."""
        check_type(type, cls.declaration.types)

    @classmethod
    def how_to_load(cls, auto_class: str, path: str) -> Loading:
        """Return the command of llama.cpp."""
        return Loading(f"Run it: llama-cli -m {path}")

    @property
    def file_bytes(self) -> int:
        """Approximate bytes of the dense model's weights in the file."""
        checkpoint = self.stream.checkpoint
        return int(checkpoint.bytes / checkpoint.dtype.itemsize * storage_of(self.type, checkpoint).bytes)

    def unsupported_reason(self, width: Width) -> str | None:
        """Return why the file cannot hold one block of this width (with uniform widths: all pruned blocks); None if it
        can."""
        if (reason := super().unsupported_reason(width)) is not None:
            return reason
        blocks = self.stream.blocks
        first = next((i for i in self.block_range if not blocks[i].attention.fixed), self.block_range.start)
        return self._unsupported(dict.fromkeys(self.block_range if self.same_width else [first], width))

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why the file cannot hold blocks of these widths; None if it can."""
        return super().unsupported_plan(widths) or self._unsupported(widths)

    def _unsupported(self, widths: Mapping[int, Width]) -> str | None:
        """Return why no architecture computes the model with these widths; blocks without a width are dense."""
        dense = [block.width for block in self.stream.blocks]
        every = [widths.get(index, width) for index, width in enumerate(dense)]
        for width, before in zip(every, dense, strict=True):
            narrowed = {axis for axis, number in width.items() if number != before.get(axis, number)}
            if unstated := narrowed - STATED_AXES:
                return f"GGUF files do not state numbers of {axis_kinds()[min(unstated)].label}; take --format hf"
        added = self.biases and any(added_biases(self.stream))
        return gguf_unsupported(self.stream.checkpoint, every, self.type, biases=added)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `SecateurError` for a tokenizer that GGUF cannot hold."""
        vocabulary_of(tokenizer, self.stream.checkpoint.config.vocab_size)

    def check_range(self) -> None:
        """Raise `SecateurError` for weights beyond the range of float16, if the folder or the file is stored as
        float16."""
        if self.dtype == torch.float16 or self.type == "f16":
            self.stream.checkpoint.check_range(torch.float16)

    def byte_meter(self) -> Meter:
        """Return the meter of the bytes of tensors, without the tokenizer."""
        return gguf_byte_meter(self.stream, self.type, self.biases)

    def convert(self, folder: Path, output: Output, watcher: Watcher) -> int:
        """Convert the folder as `secateur export` does, and return the bytes of its weights."""
        options: dict[str, Any] = {"overwrite": output.overwrite, "watcher": watcher, "at": output.resume_path}
        return export(folder, output.path, type=self.type, **options).bytes
