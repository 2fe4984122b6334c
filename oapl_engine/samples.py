"""Shared data types: Prompt, Rollout, Group, Batch. Frozen; arrays are numpy and read-only by convention.

Notation as in docs: T packed tokens, N scored sequences, R scored rows, P groups (prompts), G rollouts per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Finish = Literal["stop", "length", "abort"]
Status = Literal["scored", "invalid", "aborted", "lost"]


@dataclass(frozen=True)
class Prompt:
    """One problem. `record` is for the verifier; the trainer never reads it."""

    id: str
    token_ids: NDArray[np.int32]  # [P]
    task: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Response tokens [start, end) were sampled by policy `version`; counted from the first response token."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    key:               "{epoch}.{prompt_id}.{attempt}.{sample}", unique for the life of a run
    prompt_id, group:  whose response it is; sample: its number in the group
    task:              name of the data source
    token_ids:         [S] i32, the prompt and everything after it, the stop token included
    prompt_length:     tokens of the prompt
    loss_mask:         [S] u8, 1 on tokens that the policy sampled, 0 on the prompt and on tool or environment tokens
    behavior_logprob:  [S] f32, processed log-prob under the sampling policy, nats; 0 where loss_mask is 0
    spans:             which policy version sampled which response tokens
    finish, status:    how generation ended; what became of the response
    reward:            None unless status is "scored"
    reward_detail:     what the verifier says about it
    finished_ns:       nanoseconds since the epoch when its last token was there; 0: unknown
    """

    key: str
    prompt_id: str
    group: str
    sample: int
    task: str
    token_ids: NDArray[np.int32]
    prompt_length: int
    loss_mask: NDArray[np.uint8]
    behavior_logprob: NDArray[np.float32]
    spans: tuple[Span, ...]
    finish: Finish
    status: Status
    reward: float | None = None
    reward_detail: dict[str, Any] = field(default_factory=dict)
    finished_ns: int = 0

    @property
    def response_ids(self) -> NDArray[np.int32]:
        return self.token_ids[self.prompt_length :]

    @property
    def response_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt attempt. `version`: the oldest policy version that sampled a token of it."""

    id: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    version: int

    def scored(self) -> tuple[Rollout, ...]:
        return tuple(r for r in self.rollouts if r.status == "scored")


@dataclass(frozen=True)
class PromptSpan:
    """Rows of one group in a Batch: a shared prefix (its prompt but the last token), then the responses that read it.

    start:      first row of the prefix
    length:     rows of the prefix; 0: nothing is shared, and each response's rows begin with its complete prompt
    responses:  (first row, rows) of each response, in order, without gaps
    """

    start: int
    length: int
    responses: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch: rows of several groups one after another, no padding. Made by trainer.packing.

    token_ids, positions:  [T] i64
    target:                [T] i64, the token that row t predicts, -100 where none is trained
    behavior_logprob:      [T] f32 of target, 0 where none is trained
    rows:                  [R] i64, the rows with a target (all that the head computes)
    cu_seqlens:            [N+1] i64, offsets of sequences in rows
    prompts:               one span per group
    advantage:             [N] f32
    keys:                  N rollout keys
    proximal_logprob, reference_logprob:
                           [T] f32, only for objectives that need them (trainer.score.fill_logprobs)
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    target: NDArray[np.int64]
    behavior_logprob: NDArray[np.float32]
    rows: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]
    prompts: tuple[PromptSpan, ...]
    advantage: NDArray[np.float32]
    keys: tuple[str, ...]
    proximal_logprob: NDArray[np.float32] | None = None
    reference_logprob: NDArray[np.float32] | None = None


def make_rollout(
    prompt: Prompt,
    group: str,
    sample: int,
    response: ArrayLike,
    logprobs: ArrayLike = 0.0,
    loss_mask: ArrayLike = 1,
    **fields: Any,
) -> Rollout:
    """A rollout of `prompt` with response token ids [R].

    logprobs, loss_mask:  [R], or one value for the complete response
    fields:               the others of a Rollout by name; `key` too, where it is not the group's and the sample's
    """
    prompt_length, response_length = len(prompt.token_ids), len(np.asarray(response))

    def after_prompt(values: ArrayLike) -> NDArray[Any]:
        """[prompt + response]: zeros, then the values."""
        return np.concatenate([np.zeros(prompt_length), np.broadcast_to(values, response_length)])

    return Rollout(
        key=fields.pop("key", f"{group}.{sample}"),
        prompt_id=prompt.id,
        group=group,
        sample=sample,
        task=prompt.task,
        token_ids=np.concatenate([prompt.token_ids, response]).astype(np.int32),
        prompt_length=prompt_length,
        loss_mask=after_prompt(loss_mask).astype(np.uint8),
        behavior_logprob=after_prompt(logprobs).astype(np.float32),
        **fields,
    )


def group_key(epoch: int, prompt_id: str, attempt: int) -> str:
    """Group id; a rollout's key is this plus ".{sample}"."""
    return f"{epoch}.{prompt_id}.{attempt}"


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Groups as msgpack, arrays as (dtype, bytes): what ranks send one another. decode_groups is the inverse."""
    return msgspec.msgpack.encode(groups, enc_hook=_encode_array)


def decode_groups(payload: bytes) -> list[Group]:
    return msgspec.msgpack.decode(payload, type=list[Group], dec_hook=_decode_array)


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tobytes()]
    raise TypeError(f"{type(value).__name__} does not travel between ranks")


def _decode_array(kind: Any, value: Any) -> Any:
    return np.frombuffer(value[1], value[0])
