"""Length-prefixed JSON over a pipe: no pickle between the trainer and a process that reads foreign text."""

import json
import os
import select
import struct
import time
from typing import Any

LENGTH = struct.Struct("<I")
MAX_FRAME = 64 << 20


def write_frame(fd: int, message: dict[str, Any]) -> None:
    """Raises BrokenPipeError where the other end is closed."""
    body = json.dumps(message, default=_plain).encode()
    data = memoryview(LENGTH.pack(len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def _plain(value: Any) -> Any:
    """numpy's and torch's numbers and arrays as JSON has them; what JSON does not have as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_frame(fd: int, seconds: float | None = None) -> dict[str, Any]:
    """The next message. Raises EOFError at the end, TimeoutError where it is not complete after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    (length,) = LENGTH.unpack(_read(fd, LENGTH.size, deadline))
    if length > MAX_FRAME:
        raise EOFError(f"frame of {length} bytes, limit {MAX_FRAME}")
    message: dict[str, Any] = json.loads(_read(fd, length, deadline))
    return message


def _read(fd: int, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    readable = select.poll()
    readable.register(fd, select.POLLIN)
    while len(data) < size:
        if deadline is not None and not readable.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(fd, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other end is closed")
        data += piece
    return bytes(data)
