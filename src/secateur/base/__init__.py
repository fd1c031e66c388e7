"""What everything else stands on: errors, progress, devices, files."""
