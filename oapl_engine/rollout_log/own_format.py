"""Rollouts in our format, what `oapl rollouts` writes: token ids and behaviour log-probs, one rollout per row."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.errors import ConfigError
from oapl_engine.rollout_log.import_checks import (
    MASKS,
    TASK,
    WEIGHTS,
    Limits,
    RolloutFile,
    check_columns,
    check_reward,
    check_tokens,
    group_rollouts,
    read_finish,
    read_status,
)
from oapl_engine.rows import Row
from oapl_engine.samples import Prompt, Rollout, Span, make_rollout
from oapl_engine.text import is_ended

OURS = (
    "key",
    "prompt_id",
    "group",
    "sample",
    "version_first",
    "version_last",
    "prompt_token_ids",
    "response_token_ids",
    "behavior_logprobs",
    "reward",
    "status",
)  # loss_mask and finish are read where they are there
REFUSED = tuple(name for name in (*MASKS, *WEIGHTS) if name != "loss_mask")
LARGEST = 2**63  # what SQLite holds is below it


def read_own_format(path: Path, rows: Iterable[Row], limits: Limits) -> RolloutFile:
    """Groups of the rows. Raises ConfigError that names file and line."""
    rollouts: list[tuple[str, Rollout]] = []
    seen: set[str] = set()
    behavior = True
    for place, _, row in rows:
        check_columns(place, row, OURS, REFUSED, "write 0 or 1 for every response token into loss_mask")
        rollout = _rollout(place, row, limits)
        if rollout.key in seen:
            raise ConfigError(f"{place}: key {rollout.key} is there twice; every rollout has its own")
        seen.add(rollout.key)
        behavior = behavior and row["behavior_logprobs"] is not None
        rollouts.append((place, rollout))
    groups = group_rollouts(rollouts)
    for group in groups:
        if len(group.rollouts) < limits.group_size:
            raise ConfigError(
                f"rollouts {path}: group {group.id} has {len(group.rollouts)} rollouts, schedule.group_size = "
                f"{limits.group_size}; complete the file, or set schedule.group_size = {len(group.rollouts)}"
            )
    return RolloutFile(groups, {}, behavior)


def _rollout(place: str, row: dict[str, Any], limits: Limits) -> Rollout:
    key, prompt_id, group = (_name(place, row, name) for name in ("key", "prompt_id", "group"))
    sample, status = _number(place, row, "sample"), read_status(place, row)
    if key != f"{group}.{sample}":
        raise ConfigError(f"{place}: key = {key}; wanted is {group}.{sample}, the row's group and sample")
    prompt = check_tokens(place, "prompt_token_ids", row["prompt_token_ids"], limits)
    response = check_tokens(place, "response_token_ids", row["response_token_ids"], limits)
    scored = status == "scored"
    if not len(prompt) or (scored and not len(response)):
        raise ConfigError(f"{place}: rollout {key} has zero {'response' if len(prompt) else 'prompt'} tokens")
    mask = _loss_mask(place, row.get("loss_mask"), len(response))
    return make_rollout(
        Prompt(prompt_id, prompt, TASK),
        group,
        sample,
        response,
        _behavior(place, row["behavior_logprobs"], mask),
        mask,
        key=key,
        spans=(Span(_oldest_version(place, row), 0, len(response)),),
        finish=read_finish(place, row) or ("stop" if is_ended(response, limits.ends) else "length"),
        status=status,
        reward=check_reward(place, "reward", row["reward"]) if scored else None,
    )


def _name(place: str, row: dict[str, Any], field: str) -> str:
    name = row[field]
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{place}: {field} = {name!r:.40} must be a text that is not empty")
    return name


def _number(place: str, row: dict[str, Any], field: str) -> int:
    number: int = row[field]
    if type(number) is not int or not 0 <= number < LARGEST:  # True is an int for isinstance
        raise ConfigError(f"{place}: {field} = {number!r:.40} must be a whole number, 0 or more")
    return number


def _oldest_version(place: str, row: dict[str, Any]) -> int:
    """A row has the first and the last version only; the first counts, so that lag is never understated."""
    first, last = _number(place, row, "version_first"), _number(place, row, "version_last")
    if first > last:
        raise ConfigError(f"{place}: version_first = {first}, version_last = {last}; wanted is first <= last")
    return first


def _loss_mask(place: str, values: Any, tokens: int) -> NDArray[np.uint8]:
    """[tokens]; null: every token was sampled by the policy."""
    if values is None:
        return np.ones(tokens, np.uint8)
    flags = isinstance(values, list) and set(map(type, values)) <= {int, float, bool} and set(values) <= {0, 1}
    if not flags or len(values) != tokens:
        raise ConfigError(f"{place}: loss_mask must be {tokens} numbers that are 0 or 1, one per response token")
    return np.array(values, np.uint8)


def _behavior(place: str, values: Any, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[tokens] nats; zeros where there are none to read."""
    if values is None:
        return np.zeros(len(mask), np.float32)
    numeric = isinstance(values, list) and set(map(type, values)) <= {int, float, type(None)}
    if not numeric or len(values) != len(mask):
        raise ConfigError(f"{place}: behavior_logprobs must be {len(mask)} numbers, one per response token")
    try:
        numbers = np.array(values, np.float64)  # None becomes NaN
    except OverflowError as error:
        raise ConfigError(f"{place}: behavior_logprobs: {error}; a log-prob is finite and at most 0") from error
    wrong = np.flatnonzero((mask != 0) & ~((numbers >= np.finfo(np.float32).min) & (numbers <= 0)))
    if len(wrong):
        raise ConfigError(
            f"{place}: behavior_logprobs[{wrong[0]}] = {values[wrong[0]]}; a log-prob is finite and at most 0. Without "
            'them, set all of behavior_logprobs to null and objective.behavior = "recomputed"'
        )
    return np.where(mask, numbers, 0).astype(np.float32)
