"""The figures of each command, which its table shows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.model.axes import Width, alike, present
from secateur.plan.problem import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NotebookView:
    """Widths that a notebook shows: as a table where they stand at the end of a cell, and as a picture."""

    dense: tuple[Width, ...]

    def pruned_widths(self) -> list[Width]:
        """The width of every block after pruning."""
        raise NotImplementedError

    def plot(self) -> "Figure":
        """What stays of each block, as a figure of matplotlib."""
        from secateur.report.plots import plot_widths

        return plot_widths(self.dense, self.pruned_widths())

    def _repr_html_(self) -> str:
        axes = present(self.dense)
        rows: list[tuple[str, ...]] = [("block", *(kind.total for kind in axes))]
        for index, (now, dense) in enumerate(zip(self.pruned_widths(), self.dense, strict=True)):
            rows.append((str(index), *(f"{kind.count(now):,}/{kind.count(dense):,}" for kind in axes)))
        return f"<table>{''.join('<tr><td>' + '</td><td>'.join(row) + '</td></tr>' for row in rows)}</table>"


@dataclass(frozen=True)
class Summary(NotebookView):
    """Before and after; what the command prints as its table."""

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    """Of the weights, both in the output's format and type."""
    cache_bytes: tuple[int, int]
    """Keys and values of one token in all blocks, at the output's dtype."""
    dense: tuple[Width, ...]
    """The dense width of every block."""
    widths: dict[int, Width]
    """The width of every pruned block."""
    format: str
    auto_class: str
    """transformers' auto class for a folder."""
    sparsity: float
    """Share of the parameters of `blocks` that goes."""
    blocks: str | None
    """The range of blocks to which pruning was confined, as --blocks has it; None for all."""
    note: str | None
    vllm_unsupported: str | None
    """Why vLLM does not serve it; None where it does, or where it is no folder."""
    bos: bool
    tokens: int
    seconds: float
    peak_bytes: int
    """Peak resident memory of the process; on a dry run the expected peak above the libraries' own."""
    effort_seconds: dict[str, float]
    """Seconds expected at each effort, on a dry run; empty otherwise."""

    @property
    def is_dry_run(self) -> bool:
        """Nothing was carried out."""
        return bool(self.effort_seconds)

    @property
    def uniform(self) -> bool:
        """Whether the pruned blocks have one width."""
        return alike(self.widths.values())

    def pruned_widths(self) -> list[Width]:
        """The width of every block after pruning."""
        return [self.widths.get(index, dense) for index, dense in enumerate(self.dense)]


@dataclass(frozen=True)
class Proposal(NotebookView):
    """A plan with what it belongs to."""

    model: str
    fingerprint: str
    dense: tuple[Width, ...]
    """The dense width of every block."""
    plan: Plan
    parameters: tuple[float, float]
    """Of the whole model, before and after."""
    blocks: str | None
    """The range of blocks to which pruning is confined, as --blocks has it; None for all."""

    def pruned_widths(self) -> list[Width]:
        """The width of every block after pruning."""
        return [self.plan.widths.get(index, dense) for index, dense in enumerate(self.dense)]

    def as_dict(self) -> dict[str, Any]:
        """The contents of a plan file, as `secateur prune --plan` reads it."""
        blocks: list[dict[str, Any]] = []
        for index, width in self.plan.widths.items():
            # Units that are not settled are chosen while pruning.
            units = self.plan.units.get(index, {}) if self.plan.lists_units else {}
            blocks.append({"block": index, "width": dict(width)} | {kind: list(kept) for kind, kept in units.items()})
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "sparsity": {"reached": self.plan.sparsity},
            "cost": self.plan.cost,
            "blocks": blocks,
        }


@dataclass(frozen=True)
class ModelSize:
    """One model."""

    folder: str
    sparsity: float
    parameters: int
    bytes: int
    perplexity: dict[str, float]
    """By text."""


@dataclass(frozen=True)
class SurveySummary:
    """A survey in figures, for the table."""

    dense: tuple[Width, ...]
    """The dense width of every block."""
    plans: dict[float, Plan]
    """The wanted share → its plan, as far as the modules go."""
    parameters: dict[float, float]
    """The wanted share → what the model then has."""
    line: str
    """The command that prunes from this survey."""


def pruned_part(blocks: str | None) -> str:
    """Return the parameters of which a plan's sparsity is the share, in words; the range is as --blocks has it."""
    return "the blocks' parameters" if blocks is None else f"the parameters of blocks {blocks}"
