"""Recipes, and all that only a comparison needs."""
