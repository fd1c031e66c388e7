"""Kinds of units, one file each: the axes along which units lie, and the tensors of a block that belong to them.

A file registers its axes with `axis_kind` and a function with `describes`; `secateur.base.names` lists the files.
"""
