"""What a run says: metrics.jsonl, the terminal, TensorBoard and Weights & Biases where asked for."""
