"""Output formats of a pruned model: a stock folder, a folder with a width per block, GGUF."""
