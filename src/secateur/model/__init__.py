"""A checkpoint on disk, what its blocks consist of, and how to run one of them."""
