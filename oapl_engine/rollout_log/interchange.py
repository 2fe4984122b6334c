"""Finished rollouts as rows: exported from a run (`oapl rollouts`), imported from a file for offline training.

Two formats are read. Ours (JSONL or Parquet, what the export writes) has token ids and behaviour log-probs. The OAPL
authors' Parquet (the paper's code experiment) has text, one response per row, and all rewards that were recorded for
the prompt, for the group value; its behaviour log-probs must be recomputed.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oapl_engine.errors import ConfigError
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.samples import Group, Prompt, Rollout, Span, Status, group_key, make_rollout

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
)
AUTHORS = ("prompt", "response", "precomputed_reward", "response_rewards")
TASK = "offline"
Row = tuple[str, dict[str, Any]]  # where ("FILE line 3"), and the fields


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
    max_new_tokens:  responses are cut here
    ends:            token ids that end a response
    group_size:      rollouts that a group has at least
    """

    vocabulary: int
    max_new_tokens: int
    ends: tuple[int, ...]
    group_size: int


def export_rollouts(run_dir: Path) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per rollout of a run, in order of arrival: the columns of OURS and `trained_steps`.

    Example: `json.dumps(next(export_rollouts(Path("runs/micro"))))` is a line that read_rollouts reads back.
    """
    uses = Journal.reading(run_dir / "journal.sqlite").uses()
    for path in sorted((run_dir / "rollouts").glob("rank*.sqlite")):
        for rollout in RolloutLog.reading(path).rollouts():
            yield _exported(rollout, uses.get(rollout.key, []))


def _exported(rollout: Rollout, trained_steps: list[int]) -> dict[str, Any]:
    versions = [span.version for span in rollout.spans] or [0]
    return {
        "key": rollout.key,
        "prompt_id": rollout.prompt_id,
        "group": rollout.group,
        "sample": rollout.sample,
        "version_first": min(versions),
        "version_last": max(versions),
        "prompt_token_ids": rollout.token_ids[: rollout.prompt_length].tolist(),
        "response_token_ids": rollout.response_ids.tolist(),
        "behavior_logprobs": [float(x) for x in rollout.behavior_logprob[rollout.prompt_length :]],
        "reward": rollout.reward,
        "status": rollout.status,
        "trained_steps": trained_steps,
    }


def read_rollouts(path: str | Path, limits: Limits, tokenizer: Any = None) -> RolloutFile:
    """All rollouts of a .jsonl or .parquet file; the tokenizer is needed for text. ConfigError names file and line."""
    path = Path(path)
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"rollouts {path}: the file is empty")
    found, rows = set(first[1]), itertools.chain([first], rows)
    if set(OURS) <= found:
        return _ours(path, rows, limits)
    if set(AUTHORS) <= found:
        return _authors(rows, limits, tokenizer)
    raise ConfigError(
        f"rollouts {path}: columns {', '.join(sorted(found))}; wanted are {', '.join(OURS)} (oapl rollouts) or "
        f"{', '.join(AUTHORS)} (the OAPL authors' format)"
    )


def _rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise ConfigError(f"rollouts {path}: {'is a directory' if path.is_dir() else 'does not exist'}; name a file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    raise ConfigError(f'rollouts {path}: unknown kind "{path.suffix}"; use .jsonl or .parquet')


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is a JSON {type(row).__name__}: write one object per line")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"rollouts {path} is damaged or not a Parquet file: {error}") from error


def _ours(path: Path, rows: Iterable[Row], limits: Limits) -> RolloutFile:
    groups: dict[str, list[Rollout]] = {}
    seen: set[str] = set()
    behavior = True
    for where, row in rows:
        missing = [name for name in OURS if name not in row]
        if missing:
            raise ConfigError(f"{where}: field {missing[0]} is missing; wanted are {', '.join(OURS)}")
        if row["key"] in seen:
            raise ConfigError(f"{where}: key {row['key']} is there twice; every rollout has its own")
        seen.add(row["key"])
        behavior = behavior and row["behavior_logprobs"] is not None
        groups.setdefault(row["group"], []).append(_our_rollout(where, row, limits))
    for name, rollouts in groups.items():
        if len(rollouts) < limits.group_size:
            raise ConfigError(
                f"rollouts {path}: group {name} has {len(rollouts)} rollouts, schedule.group_size = "
                f"{limits.group_size}; complete the file, or set schedule.group_size = {len(rollouts)}"
            )
    return RolloutFile(tuple(_group(name, rollouts) for name, rollouts in groups.items()), {}, behavior)


def _group(name: str, rollouts: list[Rollout]) -> Group:
    first = rollouts[0]
    prompt = Prompt(first.prompt_id, first.token_ids[: first.prompt_length], first.task)
    return Group(name, prompt, tuple(rollouts), min(r.spans[0].version for r in rollouts))


def _our_rollout(where: str, row: dict[str, Any], limits: Limits) -> Rollout:
    if row["status"] not in get_args(Status):
        raise ConfigError(f'{where}: status = "{row["status"]}" is not one of {", ".join(get_args(Status))}')
    prompt = _tokens(where, "prompt_token_ids", row["prompt_token_ids"], limits)
    response = _tokens(where, "response_token_ids", row["response_token_ids"], limits)
    scored = row["status"] == "scored"
    if not len(prompt) or (scored and not len(response)):
        raise ConfigError(f"{where}: rollout {row['key']} has zero {'response' if len(prompt) else 'prompt'} tokens")
    mask = np.ones(len(response), np.uint8) if row.get("loss_mask") is None else np.array(row["loss_mask"], np.uint8)
    behavior = row["behavior_logprobs"]
    values = 0.0 if behavior is None else _behavior(where, behavior, mask, response)
    return make_rollout(
        Prompt(row["prompt_id"], prompt, TASK),
        row["group"],
        int(row["sample"]),
        response,
        values,
        mask,
        key=row["key"],
        spans=_spans(where, row, len(response)),
        finish="stop" if len(response) and response[-1] in limits.ends else "length",
        status=row["status"],
        reward=_reward(where, "reward", row["reward"]) if scored else None,
    )


def _spans(where: str, row: dict[str, Any], tokens: int) -> tuple[Span, ...]:
    """The export keeps the first and the last version only; the first counts, so that lag is never understated."""
    first, last = row["version_first"], row["version_last"]
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last):
        raise ConfigError(f"{where}: version_first = {first}, version_last = {last}; wanted 0 <= first <= last")
    return (Span(first, 0, tokens),)


def _tokens(where: str, name: str, values: Any, limits: Limits) -> NDArray[np.int32]:
    ids = np.array(values if isinstance(values, list) and values else np.zeros(0, np.int64))
    if not isinstance(values, list) or ids.dtype.kind != "i" or ids.ndim != 1:
        raise ConfigError(f"{where}: {name} must be a list of integers")
    wrong = ids[(ids < 0) | (ids >= limits.vocabulary)]
    if len(wrong):
        raise ConfigError(f"{where}: {name} holds {wrong[0]}; the model's token ids are 0 to {limits.vocabulary - 1}")
    return ids.astype(np.int32)


def _behavior(where: str, values: Any, mask: NDArray[np.uint8], response: NDArray[np.int32]) -> NDArray[np.float32]:
    if not isinstance(values, list) or not len(values) == len(mask) == len(response):
        raise ConfigError(f"{where}: behavior_logprobs must be {len(response)} numbers, one per response token")
    numbers = np.array(values, np.float64)  # None becomes NaN
    wrong = np.flatnonzero((mask != 0) & ~(np.isfinite(numbers) & (numbers <= 0)))
    if len(wrong):
        raise ConfigError(
            f"{where}: behavior_logprobs[{wrong[0]}] = {values[wrong[0]]}; a log-prob is finite and at most 0. Without "
            'them, set all of behavior_logprobs to null and objective.behavior = "recomputed"'
        )
    return np.where(mask, numbers, 0).astype(np.float32)


def _reward(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {name} = {value!r}; a scored rollout needs a finite number")
    return float(value)


def _authors(rows: Iterable[Row], limits: Limits, tokenizer: Any) -> RolloutFile:
    groups: dict[str, list[Rollout]] = {}
    recorded: dict[str, NDArray[np.float64]] = {}
    for where, row in rows:
        text = json.dumps(row["prompt"], sort_keys=True)
        prompt_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = group_key(0, prompt_id, 0)
        rollouts = groups.setdefault(name, [])
        rollouts.append(_authors_rollout(where, row, name, prompt_id, len(rollouts), limits, tokenizer))
        if row["response_rewards"]:
            rewards = [_reward(where, "response_rewards", r) for r in row["response_rewards"]]
            recorded[name] = np.array(rewards, np.float64)
    return RolloutFile(tuple(_group(name, rollouts) for name, rollouts in groups.items()), recorded, False)


def _authors_rollout(
    where: str, row: dict[str, Any], group: str, prompt_id: str, sample: int, limits: Limits, tokenizer: Any
) -> Rollout:
    prompt = _tokens(where, "prompt", _prompt_tokens(where, row["prompt"], tokenizer), limits)
    if not isinstance(row["response"], str) or not row["response"]:
        raise ConfigError(f"{where}: response is empty or not text: a rollout needs at least one token")
    ids = list(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
    if ids[-1] not in limits.ends:
        ids.append(tokenizer.eos_token_id)  # text loses the stop token that the policy sampled
    response = _tokens(where, "response", ids, limits)[: limits.max_new_tokens]
    return make_rollout(
        Prompt(prompt_id, prompt, TASK),
        group,
        sample,
        response,
        spans=(Span(0, 0, len(response)),),
        finish="stop" if len(ids) <= limits.max_new_tokens else "length",
        status="scored",
        reward=_reward(where, "precomputed_reward", row["precomputed_reward"]),
    )


def _prompt_tokens(where: str, prompt: Any, tokenizer: Any) -> list[int]:
    """A chat (list of role and content) through the tokenizer's template, or text as it is."""
    if isinstance(prompt, list):
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{where}: prompt is a chat but the tokenizer has no chat template: use an instruct model"
            )
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: prompt must be text or a list of messages, and not empty")
    return list(tokenizer(prompt)["input_ids"])
