"""Functions of the commands, and the steps that they share."""
