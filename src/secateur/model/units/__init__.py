"""Kinds of removable units, a file each: the axes along which they lie, and where a block has them.

A file makes its axes known with `axis_kind` and a function with `describes`; nothing else lists the files.
"""
