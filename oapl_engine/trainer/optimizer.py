"""AdamW on the master weights, and the learning rate as a function of the step."""

import math

import torch

from oapl_engine import config
from oapl_engine.trainer.policy import Policy


def make_optimizer(policy: Policy, section: config.OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over everything trainable; its moments have the parameters' dtype."""
    return torch.optim.AdamW(
        list(policy.trainable().values()),
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
        fused=True,
    )


def learning_rate(section: config.OptimizerConfig, step: int, steps: int) -> float:
    """Of optimizer step `step` (from 0) of `steps`: linear warm-up to the peak, then cosine to decay_to of it."""
    warmup = round(section.warmup_share * steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    floor = section.decay_to
    return section.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
