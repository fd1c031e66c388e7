"""Second moments, ridge least squares and elimination, which criteria and fits share."""
