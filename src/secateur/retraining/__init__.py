"""Retraining: a pruned model is trained further. No other step runs a backward pass through the whole model."""
