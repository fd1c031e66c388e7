"""ByteDance's Seed-OSS."""

from secateur.families.entry import Family
from secateur.families.llama import LLAMA_GGUF

FAMILIES = {"seed_oss": Family(gguf=LLAMA_GGUF)}
