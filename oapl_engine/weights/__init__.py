"""Weights from the trainer into live engines, in place, with proof that a version is complete before it serves."""
