"""Format `hf`: a folder with a width for each block, and a modeling file that transformers runs."""

from collections.abc import Mapping
from typing import Any

from secateur.base.names import FORMATS
from secateur.checkpoints.facts import head_dim
from secateur.formats.folder import Biases, Folder
from secateur.formats.per_layer import (
    MODELING_FILE,
    multimodal_per_layer_config,
    per_layer_config,
    per_layer_unsupported,
)
from secateur.model.axes import Width
from secateur.plan.problem import Plan


class HfFolder(Folder):
    """Folder of the format `hf`: each block has its own width."""

    declaration = FORMATS["hf"]
    code = (MODELING_FILE,)
    advice = "report this as a bug in secateur"

    def format_reason(self, width: Width) -> str | None:
        """Return why the first stock block with these axes cannot be written at a width."""
        block = self.block_with(width, self.block_range)
        return per_layer_unsupported(self.stream.checkpoint.config, block, width)

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why a block cannot be written at its width, for the first such block."""
        reasons = (HfFolder(self.stream, block_range=range(i, i + 1)).unsupported_reason(w) for i, w in widths.items())
        return next(filter(None, reasons), None)

    def language_config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the stock model's config with the sizes that differ from block to block."""
        stream, stock = self.stream, self.stream.stock
        return per_layer_config(
            stock.raw_config,
            stock.config,
            widths={index: block.width for index, block in enumerate(stream.blocks)} | plan.widths,
            blocks=stock.blocks,
            stored_names=stream.stored_names,
            biases=biases,
            head_dim=head_dim(stock.config),
            dtype=self.dtype,
        )

    def whole_config(self, outer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of config.json, with the classes of the modeling file."""
        return multimodal_per_layer_config(outer, own)
