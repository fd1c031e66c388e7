"""Kinds of units that can be removed, as `--modules` names them and records list them."""

from secateur.model.axes import axis_kinds

KINDS = tuple(dict.fromkeys(kind.unit for kind in axis_kinds().values() if kind.removable))
"""All of `secateur.model.units`, heads first: in the order of the roles of modules."""
