"""Variants and tables of the paper, and comparisons under one protocol, made with the public steps of a run."""
