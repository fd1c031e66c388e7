"""Sources of weights: folders, hub ids, quantised folders and models in memory, each with its config."""
