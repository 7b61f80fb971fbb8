"""The loop, losses, checkpoints, metrics and the report."""
