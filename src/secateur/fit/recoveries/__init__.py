"""Recoveries: how the remaining weights compensate for removed units. One file holds one recovery."""
