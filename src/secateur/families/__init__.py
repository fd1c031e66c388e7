"""What is known of each model family: one entry a model_type, one file a lineage."""
