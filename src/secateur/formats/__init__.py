"""What a pruned model is written as: a stock class, per-layer widths, GGUF; and how files reach the disk."""
