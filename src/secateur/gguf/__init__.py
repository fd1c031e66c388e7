"""GGUF files, llama.cpp's: as models to prune, and as an output format."""
