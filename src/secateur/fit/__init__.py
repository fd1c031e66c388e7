"""The central loop: block by block, what stays is refitted to what the dense model gives."""
