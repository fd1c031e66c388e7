"""Results of each command, which tables, pages and JSON show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.model.axes import Width, alike, model_width, present
from secateur.plan.problem import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NotebookView:
    """Result with widths that a notebook shows: as a table at the end of a cell, and as a plot."""

    dense: tuple[Width, ...]
    """Width of every block of the dense model."""

    def pruned_widths(self) -> list[Width]:
        """Return the width of every block after pruning."""
        raise NotImplementedError

    def plot(self) -> "Figure":
        """Return a bar chart of the share of units that each block keeps, as a figure of matplotlib."""
        from secateur.report.plots import plot_widths

        return plot_widths(self.dense, self.pruned_widths())

    def _repr_html_(self) -> str:
        axes = present(self.dense)
        rows: list[tuple[str, ...]] = [("block", *(kind.total for kind in axes))]
        for index, (pruned, dense) in enumerate(zip(self.pruned_widths(), self.dense, strict=True)):
            rows.append((str(index), *(f"{kind.count(pruned):,}/{kind.count(dense):,}" for kind in axes)))
        return f"<table>{''.join('<tr><td>' + '</td><td>'.join(row) + '</td></tr>' for row in rows)}</table>"


@dataclass(frozen=True)
class Summary(NotebookView):
    """Result of a pruning run or a dry run; pairs are before and after pruning."""

    parameters: tuple[int, int]
    """Number of parameters of the whole model."""
    bytes: tuple[int, int]
    """Bytes of the weights, both in the output's format and type."""
    cache_bytes: tuple[int, int]
    """Bytes of one token's keys and values in all blocks, in the output's dtype; for a GGUF file in float16."""
    dense: tuple[Width, ...]
    """Width of every block of the dense model."""
    widths: dict[int, Width]
    """Width of every pruned block by its index."""
    format: str
    """Name of the output format."""
    auto_class: str
    """Name of the auto class with which transformers opens a folder."""
    sparsity: float
    """Share of the parameters of `blocks` that is removed."""
    blocks: str | None
    """Range of the blocks that were pruned, as in `--blocks`; None for all."""
    note: str | None
    """Remark of the plan about a target that it misses or exceeds."""
    vllm_unsupported: str | None
    """Reason why vLLM cannot serve the model; None if it can, and for a GGUF file."""
    begins_with_bos: bool
    """Whether calibration rows begin with BOS."""
    tokens: int
    """Number of tokens of the calibration text, without resampled copies."""
    vocabulary: tuple[int, int] | None
    """Number of tokens of the vocabulary, before and after; None if all are kept."""
    seconds: float
    """Wall-clock time of the run; on a dry run the expected time."""
    peak_bytes: int
    """Peak resident memory of the process; on a dry run the expected peak without the memory of the libraries."""
    effort_seconds: dict[str, float]
    """Expected seconds at each effort, on a dry run; empty otherwise."""

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing was pruned."""
        return bool(self.effort_seconds)

    @property
    def uniform(self) -> bool:
        """Whether all pruned blocks have the same width."""
        return alike(self.widths.values())

    def pruned_widths(self) -> list[Width]:
        """Return the width of every block after pruning."""
        return [self.widths.get(index, dense) for index, dense in enumerate(self.dense)]


@dataclass(frozen=True)
class Proposal(NotebookView):
    """Result of `secateur plan`: a plan, with the model that it was made for."""

    model: str
    """Folder, GGUF file or hub id of the model."""
    fingerprint: str
    """Hash of the model's weights."""
    dense: tuple[Width, ...]
    """Width of every block of the dense model."""
    plan: Plan
    parameters: tuple[float, float]
    """Number of parameters of the whole model, before and after pruning."""
    blocks: str | None
    """Range of the blocks that the plan prunes, as in `--blocks`; None for all."""

    def pruned_widths(self) -> list[Width]:
        """Return the width of every block after pruning."""
        return [self.plan.widths.get(index, dense) for index, dense in enumerate(self.dense)]

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of a plan file, as `secateur prune --plan` reads it."""
        blocks: list[dict[str, Any]] = []
        for index, width in self.plan.widths.items():
            # A plan that does not list units leaves their choice to the pruning run.
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
    """Size and perplexity of one model of `secateur sizes`."""

    folder: str
    sparsity: float
    """Share of the parameters of the pruned blocks that is removed."""
    parameters: int
    """Number of parameters of the whole model."""
    bytes: int
    """Bytes of the weights."""
    perplexity: dict[str, float]
    """Perplexity by text."""


@dataclass(frozen=True)
class SurveySummary:
    """Result of `secateur survey`: plans at several sparsities."""

    dense: tuple[Width, ...]
    """Width of every block of the dense model."""
    plans: dict[float, Plan]
    """Plan by sparsity, up to the largest sparsity that the modules can reach."""
    parameters: dict[float, float]
    """Number of parameters of the whole model by sparsity."""
    line: str
    """Command that prunes from this survey."""


@dataclass(frozen=True)
class Trimmed:
    """Result of `trim`; pairs are before and after."""

    path: str
    """The new folder."""
    tokens: tuple[int, int]
    """Number of tokens."""
    parameters: tuple[int, int]
    """Number of parameters of the whole model."""
    bytes: tuple[int, int]
    """Bytes of the weights."""
    bits_per_byte: tuple[float, float] | None
    """Bits per byte of calibration text whose tokens were not counted; None where the choice ignores the text."""
    loading: str
    """Line that says how to load the folder."""


T = TypeVar("T", bound=float)


def before_and_after(label: str, pair: tuple[T, T], form: Callable[[T], str]) -> tuple[str, str, str, str]:
    """Return a row of a table: label, value before and value after a step in some form, and their ratio."""
    before, after = pair
    return label, form(before), form(after), f"{after / before:.3f}" if before else ""


def pruned_part(blocks: str | None) -> str:
    """Return words for the parameters of which a sparsity is the share; the range of blocks is as in `--blocks`."""
    if blocks is None:
        return "the blocks' parameters"
    first, end = blocks.split(":")
    first, last = first or "0", str(int(end) - 1) if end else "the last"
    return f"the parameters of block {first}" if first == last else f"the parameters of blocks {first} to {last}"


def estimated_loss(cost: float, by: str = "") -> str:
    """Return a sentence about the expected rise of the loss, in nats per token; `by` may say what causes it."""
    return f"Estimated loss increase{by}: {cost:.3f} nats per token (sum over modules, each pruned and refitted alone)."


def each_keeps(widths: Mapping[int, Width], blocks: int) -> tuple[str, Width]:
    """Return words for all blocks of a plan in which they have one width, and this width, along the axes of `present`.

    Args:
        widths: Width of every pruned block by its index.
        blocks: Number of blocks of the model.
    """
    first, last = min(widths), max(widths)
    where = f"each of blocks {first} to {last}" if last - first + 1 == len(widths) else f"each of {len(widths)} blocks"
    where = "every block" if len(widths) == blocks else f"block {first}" if len(widths) == 1 else where
    axes, every = present(widths.values()), model_width(widths.values())
    some = any(kind.name not in one for one in widths.values() for kind in axes)
    return where + " (as far as it has them)" * some, Width({kind.name: every[kind.name] for kind in axes})


def bos_note(begins_with_bos: bool) -> str:
    """Return a clause about whether rows begin with BOS."""
    return f"rows begin with{'' if begins_with_bos else 'out'} BOS"
