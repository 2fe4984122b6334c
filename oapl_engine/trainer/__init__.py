"""From groups of rollouts to new weights: packing, attention, head, one optimizer step, checkpoints."""
