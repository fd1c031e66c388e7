"""Formats of single files, which are converted from a folder that is written first and removed afterwards.

Pruned blocks are made one by one and never twice, even when an interrupted run resumes. A file that cannot be written
in pieces is therefore made from a folder, which can.
"""

from __future__ import annotations

import secrets
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from secateur.base.output import Output
from secateur.formats.format import Format, PrunedModel
from secateur.formats.per_layer import HfFolder
from secateur.model.axes import Width


class Converted(Format):
    """Format of files, each converted from a folder of the format `hf`."""

    @abstractmethod
    def convert(self, folder: Path, output: Output, pruned: PrunedModel) -> int:
        """Convert a folder to the file (`with output as path: ...`), and return the bytes of its weights."""

    @cached_property
    def folder(self) -> HfFolder:
        """Format of the folder."""
        return HfFolder(
            self.stream,
            block_range=self.block_range,
            dtype=self.dtype,
            biases=self.biases,
            same_width=self.same_width,
        )

    @property
    def file_bytes(self) -> int:
        """Approximate bytes of the dense model's weights in the file."""
        return round(self.folder.byte_meter().dense)

    def unsupported_reason(self, width: Width) -> str | None:
        """Return why the folder cannot hold this width, or None."""
        return self.folder.unsupported_reason(width)

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why the folder cannot hold blocks at these widths, or None."""
        return self.folder.unsupported_plan(widths)

    def check_output(self, out: Path, *, overwrite: bool = False, partial_output: Path | None = None) -> None:
        """Check that there is room for both the folder, under a hidden name in the folder of `out`, and the file."""
        both = self.folder.output(out.with_name(f".{out.name}.folder"), overwrite=overwrite, at=partial_output)
        both.expected_bytes += self.file_bytes
        both.check()
        self.check_range()

    def write(self, out: Path, pruned: PrunedModel) -> int:
        """Write a folder and convert it; a folder that an interrupted run has finished is converted as it is."""
        state = pruned.state
        folder = out.with_name(f".{out.name}.folder-{secrets.token_hex(4)}") if state is None else state / "folder"
        output = self.declaration.output(out, overwrite=pruned.overwrite)
        output.resume_path = None if state is None else state / out.name
        try:
            if not folder.exists():
                self.folder.write(folder, replace(pruned, overwrite=False))
            return self.convert(folder, output, pruned)
        finally:
            if state is None:
                shutil.rmtree(folder, ignore_errors=True)
