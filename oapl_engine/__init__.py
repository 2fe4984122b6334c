"""OAPL Engine: off-policy reinforcement learning for language models (arXiv 2602.19362)."""

__version__ = "0.2.0"
