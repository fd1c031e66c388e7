"""What the blocks of a model consist of, and how to run one of them."""
