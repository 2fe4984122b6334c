"""Held-out pass@k with its standard error, and paired comparison."""
