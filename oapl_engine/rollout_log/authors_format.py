"""Rollouts in the format of the OAPL authors (the paper's code experiment): text, one response per row, and all rewards
that were recorded for the prompt, for the group value. Behaviour log-probs must be recomputed."""

import hashlib
import json
from collections.abc import Iterable
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
from oapl_engine.rows import Row, check_messages
from oapl_engine.samples import Prompt, Rollout, Span, group_key, make_rollout
from oapl_engine.text import encode_messages, encode_response, encode_text

AUTHORS = ("prompt", "response", "precomputed_reward", "response_rewards")  # finish and status are read where given
REFUSED = (*MASKS, *WEIGHTS, "tools", "chat_template_kwargs", "images", "videos")


def read_authors_format(rows: Iterable[Row], limits: Limits, tokenizer: Any) -> RolloutFile:
    """Groups of the rows, one per prompt. Raises ConfigError that names file and line."""
    prompts: dict[str, Prompt] = {}
    samples: dict[str, int] = {}
    recorded: dict[str, NDArray[np.float64]] = {}
    rollouts: list[tuple[str, Rollout]] = []
    for place, _, row in rows:
        check_columns(place, row, AUTHORS, REFUSED, "write the columns of `oapl rollouts` instead, with token ids")
        text = json.dumps(row["prompt"], sort_keys=True, default=str)
        prompt_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        if prompt_id not in prompts:
            prompts[prompt_id] = Prompt(prompt_id, _prompt_tokens(place, row["prompt"], limits, tokenizer), TASK)
        group = group_key(0, prompt_id, 0)
        sample = samples.get(group, 0)
        samples[group] = sample + 1
        rollouts.append((place, _rollout(place, row, prompts[prompt_id], group, sample, limits, tokenizer)))
        _record_rewards(place, row["response_rewards"], group, recorded)
    return RolloutFile(group_rollouts(rollouts), recorded, False)


def _rollout(
    place: str, row: dict[str, Any], prompt: Prompt, group: str, sample: int, limits: Limits, tokenizer: Any
) -> Rollout:
    text, finish, status = row["response"], read_finish(place, row), read_status(place, row)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{place}: response is empty or not text: a rollout needs at least one token")
    if finish in (None, "stop"):
        ids = encode_response(tokenizer, text, limits.ends)
    else:  # it was cut, and no end was sampled
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    response = check_tokens(place, "response", ids, limits)[: limits.max_new_tokens]
    if not len(response):
        raise ConfigError(f"{place}: response {text!r:.40} has zero tokens")
    return make_rollout(
        prompt,
        group,
        sample,
        response,
        spans=(Span(0, 0, len(response)),),
        finish="length" if len(ids) > limits.max_new_tokens else finish or "stop",
        status=status,
        reward=check_reward(place, "precomputed_reward", row["precomputed_reward"]) if status == "scored" else None,
    )


def _prompt_tokens(place: str, prompt: Any, limits: Limits, tokenizer: Any) -> NDArray[np.int32]:
    """A chat (list of role and content) through the tokenizer's template, or text as it is."""
    messages = () if isinstance(prompt, str) and prompt else check_messages(prompt, place, "prompt")
    try:
        ids = encode_messages(tokenizer, messages, limits.system) if messages else encode_text(tokenizer, prompt)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not ids:
        raise ConfigError(f"{place}: prompt {prompt!r:.40} has zero tokens")
    return check_tokens(place, "prompt", ids, limits)


def _record_rewards(place: str, values: Any, group: str, recorded: dict[str, NDArray[np.float64]]) -> None:
    """Keep all rewards of a prompt, which each of its rows repeats; null or an empty list: none were recorded."""
    if values is None or values == []:
        return
    if not isinstance(values, list):
        raise ConfigError(f"{place}: response_rewards = {values!r:.40} must be a list of numbers")
    rewards = np.array([check_reward(place, "response_rewards", value) for value in values])
    known = recorded.setdefault(group, rewards)
    if not np.array_equal(np.sort(known), np.sort(rewards)):
        raise ConfigError(
            f"{place}: response_rewards are not those of an earlier row with the same prompt; each row of a prompt has "
            "all of its rewards"
        )
