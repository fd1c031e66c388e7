"""Criteria: which units of a module are removed first. One file holds one criterion or several close variants."""
