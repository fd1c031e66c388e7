"""The figures of a run, as the command prints them."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.model.structure import Width


@dataclass(frozen=True)
class Summary:
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
    sparsity: float
    of: str
    note: str | None
    vllm: str | None
    """Why vLLM does not serve it; None where it does, or where it is no folder."""
    bos: bool
    tokens: int
    seconds: float
    peak_bytes: int
    """Peak resident memory of the process; on a dry run the expected peak above the libraries' own."""
    dry: bool

    @property
    def uniform(self) -> bool:
        """Whether the pruned blocks have one width."""
        return len(set(self.widths.values())) == 1

    def now(self) -> list[Width]:
        """The width of every block after pruning."""
        return [self.widths.get(index, dense) for index, dense in enumerate(self.dense)]
