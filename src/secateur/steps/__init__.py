"""The steps of a pruning, and what each hands on to the next."""
