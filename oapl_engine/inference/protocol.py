"""What travels between EngineClient and the engine process: length-prefixed msgpack frames over a unix socket."""

import asyncio
import struct
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

LENGTH = struct.Struct("<I")
FRAME_LIMIT = 1 << 30  # bytes; a longer length prefix means that the stream is out of step


class Sampling(msgspec.Struct, frozen=True):
    """How responses are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off; stop_token_ids empty: the eos of
    the model; seed: of this request, None draws from the engine's own stream; ignore_stops: run to max_new_tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_stops: bool = False


class Sample(msgspec.Struct, frozen=True):
    """One finished response. token_ids: i32 little-endian, the stop token included; logprobs: f32 little-endian,
    processed (temperature applied), one a token; spans: (version, start, end) over response tokens;
    cached_tokens: prompt tokens that were read from the prefix cache."""

    index: int
    token_ids: bytes
    logprobs: bytes
    finish: Literal["stop", "length", "abort"]
    spans: tuple[tuple[int, int, int], ...]
    cached_tokens: int = 0

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
