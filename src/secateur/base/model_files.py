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
    *("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", ".gitattributes"),
    *("README.md", "README.base.md", "report.html", "secateur.json", "timings.json", "vocabulary.json"),
    "modeling_secateur.py",
)
"""All files of a folder that secateur writes. A folder with others holds something that must not be replaced."""
