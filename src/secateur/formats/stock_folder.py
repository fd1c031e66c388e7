"""The format `stock`: a folder whose blocks have one width, for the family's own class."""

from collections.abc import Mapping
from typing import Any

from secateur.formats.folder import Biases, Folder
from secateur.formats.registry import output_format
from secateur.formats.stock import stock_config, stock_unsupported
from secateur.model.axes import Width, alike, model_width
from secateur.model.facts import head_dim
from secateur.plan.problem import Plan


@output_format(
    "stock",
    help="a folder in which all blocks have the same width, loaded by the standard transformers class",
    uniform=True,
)
class StockFolder(Folder):
    """One width for all blocks."""

    advice = "take --format hf"

    def own_reason(self, width: Width) -> str | None:
        """Ask the family's class."""
        stream, dense, config = self.stream, self.dense(width), self.stream.checkpoint.config
        if len(self.block_range) < len(stream) and width != dense:
            return (
                f"a stock class has one width for all {len(stream)} blocks, and only {self.block_range.start}:"
                f"{self.block_range.stop} are to be pruned; leave the block range out, or take --format hf"
            )
        if (reason := stock_unsupported(config, width, dense)) is not None:
            return reason
        if self.biases and any(m.may_gain_bias and not m.bias for block in stream.blocks for m in block.modules):
            return (
                f"the stock class of {config.model_type} has no level-2 biases, which --recovery bias adds; leave it "
                "out, or take --format hf"
            )
        return None

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Compare the blocks, then ask for their width."""
        if not alike(widths.get(index, block.width) for index, block in enumerate(self.stream.blocks)):
            return "it holds one width for all blocks; take --format hf"
        return super().unsupported_plan(widths)

    def own_config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the dense config with another width."""
        checkpoint = self.stream.checkpoint
        return stock_config(
            checkpoint.raw_config,
            checkpoint.config,
            width=model_width(plan.widths.values()),
            head_dim=head_dim(checkpoint.config),
            dtype=self.dtype,
        )
