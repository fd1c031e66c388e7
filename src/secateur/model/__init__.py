"""Description of the blocks of a model, and how one of them is run."""
