"""Plans: from a target to a width for every module."""
