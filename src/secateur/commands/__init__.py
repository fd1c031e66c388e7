"""Commands that are made of the steps of a pruning, or that tell about models and engines."""
