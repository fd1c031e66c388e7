"""Structure of a model, read off its class: a tiny twin of the model runs, and gradients tell what feeds what."""
