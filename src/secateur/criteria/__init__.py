"""Which units go first: one file a criterion, and what all of them share."""
