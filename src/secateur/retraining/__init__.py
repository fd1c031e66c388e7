"""Retraining: a pruned model trained on. No other step has a backward pass through the whole model."""
