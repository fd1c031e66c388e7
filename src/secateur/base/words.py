"""Numbers of parameters in words."""

from __future__ import annotations


def counted(value: float, digits: int = 2) -> str:
    """`134.52 M`; the plain number below a million, of which decimals would leave little or nothing."""
    return f"{value / 1e6:,.{digits}f} M" if value >= 1e6 else f"{value:,.0f}"
