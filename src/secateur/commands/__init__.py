"""One function a command, each built of the same six steps."""
