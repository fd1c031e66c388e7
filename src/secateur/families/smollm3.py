"""Hugging Face's SmolLM3; SmolLM and SmolLM2 are Llama models."""

from secateur.families.entry import Family, Gguf

FAMILIES = {"smollm3": Family(gguf=Gguf(("smollm3",)))}
