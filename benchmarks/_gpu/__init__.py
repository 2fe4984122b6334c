"""Stages of benchmarks/gpu_check.py: what the project promises of a GPU, proven and measured without vLLM."""
