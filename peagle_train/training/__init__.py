"""A run: its parts, the loop, checkpoints and resuming, several processes."""
