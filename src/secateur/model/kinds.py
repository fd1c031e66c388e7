"""Kinds of units that can be removed, as `--modules` names them and records list them."""

from secateur.model.axes import axis_kinds

KINDS = tuple(dict.fromkeys(kind.unit for kind in axis_kinds().values() if kind.removable))
"""Kinds of units in `secateur.model.units`, in the order in which a block runs its modules: heads first."""
