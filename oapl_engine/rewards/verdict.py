"""How a response is scored: `verify` calls a verifier by name and makes a Verdict of whatever it does.

A verifier is `function(response, record, options)`; it returns a reward, or (reward, detail), and raises where the
*record* is unusable. A wrong answer is a reward, 0. Besides the names below, "package.module:function" names your own.
"""

import functools
import importlib
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from oapl_engine.errors import ConfigError, nearest
from oapl_engine.rewards.exact import check_extract

Verifier = Callable[[str, dict[str, Any], dict[str, Any]], Any]

VERIFIERS = {
    "exact": "oapl_engine.rewards.exact:score",
    "math": "oapl_engine.rewards.math_answer:score",
    "reasoning_gym": "oapl_engine.rewards.reasoning:score",
}
REASON_CHARACTERS = 2000


@dataclass(frozen=True)
class Verdict:
    """scored: reward is a finite number. invalid: it ran out of time or memory, or its reward is no finite number.

    error: the verifier raised or its process died. Without a reward detail["reason"] says why; nothing is trained.
    """

    status: Literal["scored", "invalid", "error"]
    reward: float | None
    detail: dict[str, Any] = field(default_factory=dict)


def verify(name: str, response: str, record: dict[str, Any], options: dict[str, Any] | None = None) -> Verdict:
    """Verdict on one response, in this process and without limits (VerifierPool has them).

    Raises ConfigError where `name` or an option is unknown; whatever the verifier raises becomes the verdict.
    """
    check_verifier(name, options or {})
    function = load_verifier(name)
    try:
        return _checked(function(response, record, options or {}))
    except MemoryError:
        return Verdict("invalid", None, {"reason": "out of memory (reward.memory_mb)"})
    except Exception as error:  # whatever a verifier raises is reported as its verdict
        return Verdict("error", None, {"reason": f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]})


@functools.cache
def load_verifier(name: str) -> Verifier:
    """The verifier of that name, imported. Raises ConfigError."""
    module, _, function = VERIFIERS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'reward.name = "{name}" cannot be loaded: {error}') from error
    return found  # type: ignore[no-any-return]


def check_verifier(name: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for an unknown name, and an unknown or contradictory option of one of our verifiers."""
    if name not in VERIFIERS and ":" not in name:
        hint = nearest(name, [*VERIFIERS, "package.module:function"])
        raise ConfigError(f'reward.name = "{name}" is no verifier; {hint}')
    if name in ("exact", "reasoning_gym"):
        check_extract(options)
    elif name == "math" and options:
        raise ConfigError(f'reward.options = {options}: the verifier "math" has none; remove them')


def _checked(result: Any) -> Verdict:
    reward, detail = result if isinstance(result, tuple) else (result, {})
    if not isinstance(reward, numbers.Real):
        return Verdict("invalid", None, {**detail, "reason": f"reward {reward!r:.100} is no number"})
    if not math.isfinite(reward):
        return Verdict("invalid", None, {**detail, "reason": f"reward is {float(reward)}, not finite"})
    return Verdict("scored", float(reward), detail)
