"""Write a pruned model: tensors, further files of the folder, and the upload."""
