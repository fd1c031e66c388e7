"""Cutting of a vocabulary: which tokens are kept, and the tokenizer and config files with their new ids."""
