"""From fitted blocks to a folder or a file, whole or not at all."""
