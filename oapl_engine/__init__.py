"""OAPL Engine: off-policy reinforcement learning for language models (arXiv 2602.19362)."""

import os

__version__ = "0.1.0"

# Read when torch loads its OpenMP library: idle threads must not spin on the cores that engine and trainer share.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
