"""Names of the files in the folder of a model, as patterns."""

SIDE_FILES = (
    # Licences require these files to accompany the weights.
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "*processor_config.json",
)
"""Files beside the weights and config.json that a pruned model keeps."""
MODEL_FILES = (
    *SIDE_FILES,
    *("*.json", "*.safetensors", "*.bin", "*.pth", "*.py", "*.md", "*.html", ".gitattributes"),
)
"""All files of a model. A folder with others holds something that must not be replaced."""
