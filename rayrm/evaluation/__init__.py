"""From a checkpoint and rows to a report."""
