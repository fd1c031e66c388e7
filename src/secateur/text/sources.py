"""Names of the sources of rows that are no text."""

RANDOM = "random"
"""Random token ids."""
SELF = "self"
"""What the model itself writes."""
STDIN = "-"
"""Standard input."""
