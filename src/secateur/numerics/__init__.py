"""Linear algebra shared by criteria and fits: moments, ridge least squares and greedy elimination."""
