"""Prompts in, verified groups out: engine sessions, the collector, the order of prompts."""
