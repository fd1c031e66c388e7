"""Format `stock`: a folder with one width for all blocks, which the standard transformers class opens."""

from collections.abc import Mapping
from typing import Any

from secateur.base.names import FORMATS
from secateur.checkpoints.facts import head_dim
from secateur.formats.folder import Biases, Folder
from secateur.formats.stock import stock_config, stock_unsupported
from secateur.model.axes import Width, alike, model_width
from secateur.plan.problem import Plan


class StockFolder(Folder):
    """Folder of the format `stock`: all blocks have the same width."""

    declaration = FORMATS["stock"]
    advice = "use --format hf"

    def format_reason(self, width: Width) -> str | None:
        """Return why the family's class cannot hold blocks of a width."""
        stream, dense, config = self.stream, self.dense(width), self.stream.checkpoint.config
        if len(self.block_range) < len(stream) and width != dense:
            return (
                f"a stock class has one width for all {len(stream)} blocks, and only {self.block_range.start}:"
                f"{self.block_range.stop} are to be pruned; leave the block range out, or use --format hf"
            )
        return stock_unsupported(config, width, dense) or self._earlier_reason() or self._bias_reason()

    def _earlier_reason(self) -> str | None:
        """Return why the family's class cannot hold what an earlier pruning left; None if it can."""
        for index, (block, stock) in enumerate(zip(self.stream.blocks, self.stream.stock.blocks, strict=True)):
            if block.modules != block.modules_left:
                return f"an earlier pruning left block {index} without heads or without channels; use --format hf"
            if any(own.bias != before.bias for own, before in zip(block.modules, stock.modules, strict=True)):
                return f"{self._no_biases()}, and an earlier pruning added one to block {index}; use --format hf"
        return None

    def _bias_reason(self) -> str | None:
        """Return why the family's class cannot hold biases that the recovery adds; None if it adds none."""
        if self.biases and any(m.may_gain_bias and not m.bias for block in self.stream.blocks for m in block.modules):
            return f"{self._no_biases()}, which --recovery bias adds; leave it out, or use --format hf"
        return None

    def _no_biases(self) -> str:
        """Return the beginning of a reason why biases cannot be written."""
        return f"the stock class of {self.stream.checkpoint.config.model_type} has no biases of output projections"

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why blocks at these widths cannot be written: the widths differ, or the class does not support the
        width."""
        if not alike(widths.get(index, block.width) for index, block in enumerate(self.stream.blocks)):
            return "it holds one width for all blocks; use --format hf"
        return super().unsupported_plan(widths)

    def language_config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the stock model's config with the new width."""
        stock = self.stream.stock
        return stock_config(
            stock.raw_config,
            stock.config,
            width=model_width(plan.widths.values()),
            head_dim=head_dim(stock.config),
            dtype=self.dtype,
        )
