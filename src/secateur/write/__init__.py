"""Write a pruned model: tensors, the files beside them, and the upload."""
