"""Karpathy's nanochat."""

from secateur.families.entry import Family

FAMILIES = {"nanochat": Family(up="fc1", gate=None, down="fc2")}
