"""Symmetric matrices by panels: blocks of consecutive rows, from the diagonal to the right edge.

Only the panels are computed, and mirrored below the diagonal. This takes about 0.6 of the operations of a full product.
"""

from torch import Tensor

PANEL = 256
"""Smallest number of rows of a panel. With fewer rows, the additional calls take longer than the saved operations."""


def panel_rows(size: int) -> int:
    """Return the number of rows of a panel of a matrix (size x size)."""
    return max(PANEL, -(-size // 6))


def panels(size: int) -> list[tuple[int, int]]:
    """Return the first row and the row after the last one of each panel of a matrix (size x size)."""
    rows = panel_rows(size)
    return [(start, min(start + rows, size)) for start in range(0, size, rows)]


def mirror_panel(matrix_aa: Tensor, start: int, stop: int) -> None:
    """Copy one panel, right of its diagonal block, to its place below the diagonal."""
    matrix_aa[stop:, start:stop] = matrix_aa[start:stop, stop:].T
