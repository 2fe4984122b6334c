"""From the recipe's [objective] to an `oapl_kernels` objective, its advantages and its normaliser."""

import inspect

from oapl_kernels import Objective, group_advantage, grpo_advantage
from oapl_kernels.objectives import OBJECTIVES, with_reference_kl
from torch import Tensor

from oapl_engine.config import ObjectiveConfig
from oapl_engine.errors import ConfigError, nearest

# r - mean(r), as these publish it; "oapl" has its own value, and the others divide by the group's standard deviation.
MEAN_BASELINE = ("kimi", "dr_grpo", "topr")
PER_TOKEN = ("dapo", "cispo")


def make_objective(section: ObjectiveConfig, beta2: float) -> Objective:
    """The objective of a step. Raises ConfigError for an unknown name or switch."""
    if section.name not in OBJECTIVES:
        raise ConfigError(f'objective.name = "{section.name}" is unknown; {nearest(section.name, OBJECTIVES)}')
    factory = OBJECTIVES[section.name]
    options = {"oapl": {"beta2": beta2}, "kimi": {"tau": beta2}}.get(section.name, {}) | section.options
    allowed = inspect.signature(factory).parameters
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"objective.options.{name}: {section.name} has only {', '.join(allowed) or 'no switches'}"
            )
    try:
        objective = factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"objective.options of {section.name}: {error}") from error
    return with_reference_kl(objective, section.reference_coefficient) if section.reference_coefficient else objective


def advantages(section: ObjectiveConfig, reward: Tensor, cu_groups: Tensor) -> Tensor:
    """A [N] f64 of rewards [N] f64 in groups, as the objective's paper defines them."""
    if section.name == "oapl":
        return group_advantage(reward, cu_groups, section.beta1)
    if section.name in MEAN_BASELINE:
        return group_advantage(reward, cu_groups, float("inf"))
    return grpo_advantage(reward, cu_groups)


def normalizer(section: ObjectiveConfig, sequences: int, tokens: int, max_new_tokens: int) -> float:
    """What the summed loss of an optimizer step is divided by; sequences and tokens are those of all ranks."""
    if section.name in PER_TOKEN:
        return float(tokens)
    return float(sequences * max_new_tokens if section.name == "dr_grpo" else sequences)


def needs_proximal(objective: Objective) -> bool:
    """Whether the objective asks for log-probs at the start of the step (trainer.score.fill_logprobs)."""
    return objective.name.startswith("decoupled_ppo")


def rms(values: Tensor) -> float:
    """Root mean square of values [N]; 0 if there are none."""
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
