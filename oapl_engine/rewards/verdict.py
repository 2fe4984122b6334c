"""VERIFIERS by name, and `verify`, which calls one and makes a Verdict of its result or its failure.

A new verifier is a module and a line in VERIFIERS. The module has `score(response, record, options)`, which returns a
reward, or (reward, detail), and raises where the *record* is unusable; a wrong answer is a reward, 0. It may have
`check_options(options)` and `check_record(record, options)`, which raise ConfigError. A verifier from elsewhere needs
no line: reward.name = "package.module:function" names its score function, and the same rules apply to its module. The
module is imported in the trainer's process too, to check name, options and records before anything starts; `score` is
called in verifier processes only.
"""

import functools
import importlib
import math
import numbers
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from oapl_engine.errors import ConfigError, load_object, naming_own_code, nearest

Verifier = Callable[[str, dict[str, Any], dict[str, Any]], Any]

VERIFIERS = {
    "exact": "oapl_engine.rewards.exact:score",
    "math": "oapl_engine.rewards.math_answer:score",
    "reasoning_gym": "oapl_engine.rewards.reasoning:score",
}
REASON_CHARACTERS, TRACEBACK_CHARACTERS = 2000, 8000
DETAIL_DEPTH = 20


@dataclass(frozen=True)
class Verdict:
    """What a verifier makes of a response.

    status:  scored: reward is a finite number; invalid: it ran out of time or memory, or its reward is not a finite
             number; error: the verifier raised or its process died
    reward:  None unless scored; nothing is trained then
    detail:  what the verifier reports; without a reward detail["reason"] says why, and detail["traceback"] where the
             verifier raised
    """

    status: Literal["scored", "invalid", "error"]
    reward: float | None
    detail: dict[str, Any] = field(default_factory=dict)


def verify(name: str, response: str, record: dict[str, Any], options: dict[str, Any] | None = None) -> Verdict:
    """Verdict on one response, in this process and without limits (VerifierPool has them).

    Raises ConfigError where `name` or an option is unknown; any exception of the verifier becomes the verdict.
    """
    check_verifier(name, options or {})
    function = load_verifier(name)
    try:
        return _checked(function(response, record, options or {}))
    except MemoryError:
        return Verdict("invalid", None, {"reason": "out of memory (reward.memory_mb)"})
    except Exception as error:  # any exception of a verifier is reported as its verdict
        reason = f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # from the verifier's own on
        shown = "".join(traceback.format_exception(error.with_traceback(frames)))
        return Verdict("error", None, {"reason": reason, "traceback": shown[-TRACEBACK_CHARACTERS:]})


@functools.cache
def load_verifier(name: str) -> Verifier:
    """The verifier of that name, imported. Raises ConfigError."""
    if name not in VERIFIERS and ":" not in name:
        hint = nearest(name, [*VERIFIERS, "package.module:function"])
        raise ConfigError(f'reward.name = "{name}" is not a verifier; {hint}')
    verifier: Verifier = load_object(VERIFIERS.get(name, name), "reward.name")
    if not callable(verifier):
        raise ConfigError(f'reward.name = "{name}" is {verifier!r:.80}, not a function')
    return verifier


def check_verifier(name: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for an unknown name, for a module that cannot be imported or lacks the function, and for
    options that the module's `check_options(options)` refuses; a module without it takes all options.

    Imports the verifier's module, a user's own too: a wrong name is found before anything starts.
    """
    module = _module(name)
    if hasattr(module, "check_options"):
        with naming_own_code(f'reward.name = "{name}": check_options fails'):
            module.check_options(options)


def check_record(name: str, record: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises ConfigError for a record that the verifier's module refuses by `check_record(record, options)`; a module
    without it takes all records. To be called for each problem of a finite source; the caller adds file and line."""
    module = _module(name)
    if hasattr(module, "check_record"):
        module.check_record(record, options)


def _module(name: str) -> Any:
    load_verifier(name)
    return importlib.import_module(VERIFIERS.get(name, name).partition(":")[0])


def _checked(result: Any) -> Verdict:
    reward, detail = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    detail = _as_detail(detail)
    value = _as_number(reward)
    if value is None:
        return Verdict("invalid", None, {**detail, "reason": f"reward {reward!r:.100} is not a number"})
    if not math.isfinite(value):
        return Verdict("invalid", None, {**detail, "reason": f"reward is {value}, not finite"})
    return Verdict("scored", value, detail)


def _as_number(reward: Any) -> float | None:
    """The number that people's code returns: Python's, numpy's and torch's scalars, Decimal. None for anything else."""
    if getattr(reward, "ndim", None) == 0 and hasattr(reward, "item"):
        reward = reward.item()
    if not isinstance(reward, numbers.Real | Decimal):
        return None
    try:
        return float(reward)
    except OverflowError:
        return math.inf


def _as_detail(detail: Any) -> dict[str, Any]:
    """Details are kept as JSON, whose keys are text, at every depth."""
    if detail is None:
        return {}
    plain: dict[str, Any] = _with_text_keys(detail if isinstance(detail, dict) else {"detail": detail})
    return plain


def _with_text_keys(value: Any, depth: int = 0) -> Any:
    if depth > DETAIL_DEPTH:
        return "…"  # also where a detail holds itself
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item, depth + 1) for key, item in value.items()}
    return [_with_text_keys(item, depth + 1) for item in value] if isinstance(value, list | tuple) else value
