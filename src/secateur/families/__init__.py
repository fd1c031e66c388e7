"""Entries of model families: one entry for each model_type, one file for each lineage."""
