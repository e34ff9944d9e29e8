"""What a run shows and leaves to read: progress, metrics, tables, plots, statistics."""
