"""Surveys: error curves of all modules, probes at the model's output, and the cost of each width."""
