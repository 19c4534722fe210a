"""What a run keeps in memory: planned, chosen, tried, and explained where it was too much."""
