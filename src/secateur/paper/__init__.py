"""The paper's own variants and its tables: recipes, and comparisons under one protocol, by the public steps."""
