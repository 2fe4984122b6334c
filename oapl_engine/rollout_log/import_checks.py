"""What imported rollouts are checked against, whatever the format of their file. Errors name file and line."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from oapl_engine.errors import ConfigError
from oapl_engine.samples import Finish, Group, Prompt, Rollout, Status

TASK = "offline"
# Columns by which other programs say which tokens are trained, and how much each one counts.
MASKS = (
    "loss_mask",
    "response_mask",
    "assistant_mask",
    "assistant_masks",
    "action_mask",
    "completion_mask",
    "tool_mask",
    "attention_mask",
    "labels",
)
WEIGHTS = (
    "weight",
    "weights",
    "sample_weight",
    "sample_weights",
    "loss_weight",
    "loss_weights",
    "token_weights",
    "advantage",
    "advantages",
    "returns",
    "token_level_rewards",
    "token_level_scores",
)


@dataclass(frozen=True)
class RolloutFile:
    """What a file holds.

    groups:            in order of the file
    recorded_rewards:  group id to all rewards of the prompt (the authors' format)
    has_behavior:      False where the policy that generated the rollouts must recompute behaviour log-probs
    """

    groups: tuple[Group, ...]
    recorded_rewards: dict[str, NDArray[np.float64]]
    has_behavior: bool


@dataclass(frozen=True)
class Limits:
    """What a rollout is checked against.

    vocabulary:      rows of the head; token ids are below it
    max_new_tokens:  responses given as text are cut here
    ends:            token ids that end a response: text.end_token_ids
    group_size:      rollouts that a group has at least
    system:          message that chats without one start with
    """

    vocabulary: int
    max_new_tokens: int
    ends: tuple[int, ...]
    group_size: int
    system: str = ""


def check_columns(
    place: str, row: dict[str, Any], required: Iterable[str], refused: Iterable[str], way_out: str
) -> None:
    """Raises ConfigError for a column that is missing, and for one in `refused` that is not null: it would change what
    is trained, and is not read."""
    missing = [name for name in required if name not in row]
    if missing:
        raise ConfigError(f"{place}: field {missing[0]} is missing; wanted are {', '.join(required)}")
    unread = [name for name in refused if row.get(name) is not None]
    if unread:
        raise ConfigError(
            f"{place}: {unread[0]} changes what is trained, and is not read in this format: {way_out}, or remove it"
        )


def check_tokens(place: str, name: str, values: Any, limits: Limits) -> NDArray[np.int32]:
    """Token ids [T]. Raises ConfigError where they are not a list of integers below limits.vocabulary."""
    if not isinstance(values, list) or set(map(type, values)) - {int}:  # True is an int for isinstance
        raise ConfigError(f"{place}: {name} must be a list of integers")
    if values and not 0 <= min(values) <= max(values) < limits.vocabulary:
        outside = next(value for value in values if not 0 <= value < limits.vocabulary)
        raise ConfigError(f"{place}: {name} holds {outside}; the model's token ids are 0 to {limits.vocabulary - 1}")
    return np.array(values, np.int32)


def check_reward(place: str, name: str, value: Any) -> float:
    """A finite number. Raises ConfigError."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN compares as False
        raise ConfigError(f"{place}: {name} = {value!r:.40}; a scored rollout needs a finite number")
    return float(value)


def read_status(place: str, row: dict[str, Any]) -> Status:
    """What became of the response; "scored" where the row does not say. Raises ConfigError."""
    status: Status = "scored" if row.get("status") is None else row["status"]
    if status not in get_args(Status):
        raise ConfigError(f'{place}: status = "{status}" is not one of {", ".join(get_args(Status))}')
    return status


def read_finish(place: str, row: dict[str, Any]) -> Finish | None:
    """How generation ended; None where the row does not say. Raises ConfigError."""
    finish: Finish | None = row.get("finish")
    if finish is not None and finish not in get_args(Finish):
        raise ConfigError(f'{place}: finish = "{finish}" is not one of {", ".join(get_args(Finish))}')
    return finish


def group_rollouts(rollouts: Iterable[tuple[str, Rollout]]) -> tuple[Group, ...]:
    """Groups of (place, rollout), in order. Raises ConfigError where a group has two prompts, or a prompt id has."""
    groups: dict[str, list[Rollout]] = {}
    prompts: dict[str, bytes] = {}
    for place, rollout in rollouts:
        prompt = rollout.token_ids[: rollout.prompt_length].tobytes()
        if prompts.setdefault(rollout.prompt_id, prompt) != prompt:
            raise ConfigError(
                f"{place}: prompt_id {rollout.prompt_id} had other prompt tokens before: give each prompt its own id"
            )
        members = groups.setdefault(rollout.group, [])
        if members and members[0].prompt_id != rollout.prompt_id:
            raise ConfigError(
                f"{place}: group {rollout.group} is of prompt {members[0].prompt_id}, and now of {rollout.prompt_id}: "
                "a group has one prompt"
            )
        members.append(rollout)
    return tuple(_make_group(name, members) for name, members in groups.items())


def _make_group(name: str, rollouts: list[Rollout]) -> Group:
    first = rollouts[0]
    prompt = Prompt(first.prompt_id, first.token_ids[: first.prompt_length], first.task)
    return Group(name, prompt, tuple(rollouts), min(r.spans[0].version for r in rollouts))
