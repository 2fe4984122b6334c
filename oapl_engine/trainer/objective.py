"""From the recipe's [objective] to an `oapl_kernels` objective; from its declarations to the normaliser."""

import inspect
from typing import Any

from oapl_kernels import Objective
from oapl_kernels.objectives import OBJECTIVES, with_reference_kl

from oapl_engine.config import ObjectiveConfig
from oapl_engine.errors import ConfigError, load_object, naming_own_code, nearest


def make_objective(section: ObjectiveConfig, beta2: float) -> Objective:
    """The objective of a step: one of OBJECTIVES, or what "package.module:factory" makes.

    beta2 is passed where the factory has a parameter of that name. Raises ConfigError for an unknown name or option.
    """
    name = section.name
    factory = _factory(name)
    if not callable(factory):
        raise ConfigError(f'objective.name = "{name}" is {factory!r:.80}, not a factory: a function that returns one')
    allowed = inspect.signature(factory).parameters
    options = ({"beta2": beta2} if "beta2" in allowed else {}) | section.options
    for option in options:
        if option not in allowed:
            raise ConfigError(f"objective.options.{option}: {name} has only {', '.join(allowed) or 'no options'}")
    with naming_own_code(f'objective.name = "{name}" fails'):
        try:
            objective = factory(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"objective.options of {name}: {error}") from error
    if not isinstance(objective, Objective):
        raise ConfigError(
            f'objective.name = "{name}" made a {type(objective).__name__}: a factory returns oapl_kernels.Objective'
        )
    return with_reference_kl(objective, section.reference_coefficient) if section.reference_coefficient else objective


def unread_fields(section: ObjectiveConfig) -> tuple[str, ...]:
    """Fields of the recipe that this objective does not look at. Raises ConfigError."""
    objective = make_objective(section, section.beta2)
    unread = [] if objective.baseline == "value" else ["objective.beta1"]
    if "beta2" not in inspect.signature(_factory(section.name)).parameters:
        unread += ["objective.beta2", "objective.scale_free_nats"]
    return tuple(unread)


def _factory(name: str) -> Any:
    if name not in OBJECTIVES and ":" not in name:
        hint = nearest(name, [*OBJECTIVES, "package.module:factory"])
        raise ConfigError(f'objective.name = "{name}" is unknown; {hint}')
    return OBJECTIVES.get(name) or load_object(name, "objective.name")


def normalizer(objective: Objective, sequences: int, tokens: int, max_new_tokens: int) -> float:
    """What the summed loss of an optimizer step is divided by; sequences and tokens are those of all ranks."""
    divisors = {"sequences": sequences, "tokens": tokens, "constant": sequences * max_new_tokens}
    return float(divisors[objective.normalizer])
