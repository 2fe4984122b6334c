"""What travels between EngineClient and the engine process: length-prefixed msgpack frames over a unix socket."""

import asyncio
import dataclasses
import struct
from typing import Any, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import SamplingConfig

LENGTH = struct.Struct("<I")
FRAME_LIMIT = 1 << 30  # bytes; a longer length prefix means that the stream is out of step


class Sampling(msgspec.Struct, frozen=True):
    """How responses are drawn.

    temperature:     0 is greedy
    top_p, top_k:    1 and 0: off
    max_new_tokens:  tokens of a response, the stop token included
    stop_token_ids:  that end a response (text.end_token_ids); empty: nothing does before max_new_tokens
    ignore_stops:    run to max_new_tokens
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_stops: bool = False

    @classmethod
    def from_recipe(cls, section: SamplingConfig, ends: tuple[int, ...], temperature: float | None = None) -> Self:
        """[sampling] of a recipe. ends: token ids that end a response; temperature: another one, for evaluation."""
        fields = dataclasses.asdict(section) | {"stop_token_ids": ends}
        return cls(**fields if temperature is None else fields | {"temperature": temperature})


class Sample(msgspec.Struct, frozen=True):
    """One finished response.

    index:      among the n of its prompt
    token_ids:  i32 little-endian, the stop token included
    logprobs:   f32 little-endian, processed (temperature applied), one per token
    finish:     how it ended
    spans:      (version, start, end) over response tokens
    """

    index: int
    token_ids: bytes
    logprobs: bytes
    finish: Literal["stop", "length", "abort"]
    spans: tuple[tuple[int, int, int], ...]

    def ids(self) -> NDArray[np.int32]:
        return np.frombuffer(self.token_ids, "<i4")


class Request(msgspec.Struct, frozen=True):
    """A call of `method`. id is chosen by the client and comes back in every reply."""

    id: int
    method: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True):
    """sample: one of several; result: the last one; refused: the call cannot be carried out, body says why."""

    id: int
    kind: Literal["sample", "result", "refused"]
    body: Any = None


def pack(message: Request | Reply) -> bytes:
    """One frame: u32 little-endian length, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The body of the next frame, or None at the end of the stream. Raises ConnectionError in the middle of a frame."""
    try:
        head = await reader.readexactly(LENGTH.size)
        (length,) = LENGTH.unpack(head)
        if length > FRAME_LIMIT:
            raise ConnectionError(
                f"frame of {length} bytes announced, at most {FRAME_LIMIT} are sent: stream out of step"
            )
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        if not error.partial and error.expected == LENGTH.size:
            return None
        raise ConnectionError(f"stream ended after {len(error.partial)} of {error.expected} bytes") from error
