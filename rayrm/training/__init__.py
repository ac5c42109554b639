"""From rows to a checkpoint, inside Ray Train."""
