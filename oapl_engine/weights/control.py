"""What a publisher asks of an engine: typed requests, one reply type, and the protocol that an engine's control has.

    Init → Start → Bucket … Bucket → Finish → Attest      one publish (Init only when a plan must be recorded)

A bucket's way: Publisher → EngineControl.update → EngineClient → socket → WeightUpdates.answer → vLLM's update_weights
→ the worker's InPlaceUpdate.receive: seven calls, the request is matched in one of them (WeightUpdates.answer).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray


class BucketSlice(NamedTuple):
    """Elements [start, start + length) of a tensor, row-major, at a byte offset of a bucket.

    label:   the tensor's name, with the range where the tensor is split
    name:    the tensor's
    bucket:  number, from 0
    offset:  bytes
    """

    label: str
    name: str
    start: int
    length: int
    bucket: int
    offset: int


class TensorEntry(NamedTuple):
    """A tensor that will be sent: name, dtype ("float32", "bfloat16", …), shape."""

    name: str
    dtype: str
    shape: list[int]


class Init(msgspec.Struct, frozen=True, tag=True):
    """Record the plan for these tensors and attach the transport.

    manifest:  all tensors, in order
    layout:    all slices, in order
    buffers:   the transport's own description (Transport.describe)
    """

    manifest: list[TensorEntry]
    layout: list[BucketSlice]
    buffers: dict[str, Any]


class Start(msgspec.Struct, frozen=True, tag=True):
    """Version `version` begins; the engine must be paused."""

    version: int


class Bucket(msgspec.Struct, frozen=True, tag=True):
    """Bucket `bucket` is there: its first `length` bytes, and the checksum of each slice in it by label."""

    bucket: int
    length: int
    checksums: dict[str, int]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """All buckets have been sent; the reply has each rank's report."""


class Attest(msgspec.Struct, frozen=True, tag=True):
    """The publisher accepts the version, which may then serve, or refuses it."""

    accepted: bool


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Changes nothing; the reply's reports are checksums of the parameters by the engine's names, one dict per rank."""


UpdateRequest = Init | Start | Bucket | Finish | Attest | Inspect


class UpdateReply(msgspec.Struct, frozen=True):
    """What an engine answers to an UpdateRequest.

    state:    of the weights: complete, incomplete, unattested
    version:  of the weights in place
    error:    why the request was refused; None if it was carried out
    refused:  {parameter, expected, found} where a check of the engine itself failed
    reports:  one per rank, after an error, Finish or Inspect (InPlaceUpdate.report)
    """

    state: str = ""
    version: int = -1
    error: str | None = None
    refused: dict[str, str] = {}
    reports: list[dict[str, Any]] = []


class EngineControl(Protocol):
    """A live engine as a publisher sees it; all calls block. inference.client.BlockingControl and StockServer have it.

    Raises what its connection raises when the engine is gone.
    """

    def pause(self, mode: str) -> None:
        """Stop generation: "drain" waits for what runs, "abort" ends it, "keep" continues it after resume."""

    def resume(self) -> None:
        """Serve again. Refused unless the weights are those of one complete, attested version."""

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probs [len - 1] of token_ids[1:], each given the tokens before it, at temperature 1."""
        ...

    def update(self, request: UpdateRequest) -> UpdateReply:
        """Carry out one request."""
        ...


def to_fields(request: UpdateRequest) -> dict[str, Any]:
    """A request's fields as plain JSON, without its tag."""
    fields: dict[str, Any] = msgspec.to_builtins(request)
    return {name: value for name, value in fields.items() if name != "type"}
