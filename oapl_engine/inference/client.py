"""EngineClient: the engine process as asyncio methods. All calls of one client belong to one event loop."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from oapl_engine.errors import RunError
from oapl_engine.inference import protocol
from oapl_engine.inference.protocol import Reply, Request, Sample, Sampling

TokenIds = Sequence[int] | NDArray[np.int32]


class EngineLost(ConnectionError):
    """The engine process is gone; whatever it was computing is lost."""


class EngineRefusedError(RunError):
    """The engine is well but does not carry out this call; the message says why."""


class EngineClient:
    """Calls into one engine process. The socket is opened by the first call, in the loop that makes it.

    Every method raises EngineLost when the process is gone and EngineRefusedError when it says no.
    """

    def __init__(self, connection: socket.socket, incarnation: int = 0) -> None:
        self.incarnation = incarnation
        self._socket = connection
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Reply | EngineLost]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._lost: EngineLost | None = None

    async def generate(self, token_ids: TokenIds, n: int, sampling: Sampling) -> AsyncIterator[Sample]:
        """Yields n samples of a prompt, each when it is finished (pause(abort) finishes them early)."""
        async for reply in self._call(
            "generate", token_ids=_ints(token_ids), n=n, sampling=msgspec.to_builtins(sampling)
        ):
            if reply.kind == "sample":
                yield msgspec.convert(reply.body, Sample)

    async def score(self, token_ids: TokenIds) -> NDArray[np.float32]:
        """Log-probs [len - 1] f32 of token_ids[1:] given the tokens before each, at temperature 1, current weights.

        Works while paused (not in the middle of a weight transfer): golden prompts are scored before a version serves.
        """
        return np.frombuffer(await self._result("score", token_ids=_ints(token_ids)), "<f4")

    async def pause(self, mode: Literal["drain", "abort", "keep"]) -> None:
        """Stop generation and drop all KV. drain: after what runs has finished; abort: running samples end with finish
        "abort"; keep: they go on after resume, prefix recomputed. Calls to generate wait for resume meanwhile."""
        await self._result("pause", mode=mode)

    async def resume(self) -> None:
        """Serve again. EngineRefusedError while the weights are not those of one complete, attested version."""
        await self._result("resume")

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Give GPU memory back; weights are discarded. Does nothing on CPU."""
        await self._result("sleep", tags=list(tags))

    async def wake(self, tags: Sequence[str] = ()) -> None:
        """Take GPU memory again, for these tags (all if empty). Does nothing on CPU."""
        await self._result("wake", tags=list(tags))

    async def transfer(self, phase: str, payload: dict[str, Any]) -> dict[str, Any]:
        """One phase of a weight update: "init", "start", "bucket", "finish", "attest". See weights.publish."""
        return await self._result("transfer", phase=phase, payload=payload)

    async def control(self, phase: str, payload: dict[str, Any]) -> Any:
        """What weights.Publisher asks for: pause {"mode"}, resume, score {"token_ids"}, else a phase of transfer."""
        if phase == "pause":
            return await self.pause(payload["mode"])
        if phase == "resume":
            return await self.resume()
        if phase == "score":
            return await self.score(payload["token_ids"])
        return await self.transfer(phase, payload)

    async def counters(self) -> dict[str, Any]:
        """incarnation, tokens_generated, tokens_scored, samples_finished, samples_running, version, state, pid."""
        return await self._result("counters")

    async def version(self) -> int:
        """Policy version of the weights in place."""
        return int((await self.counters())["version"])

    async def _result(self, method: str, **arguments: Any) -> Any:
        async for reply in self._call(method, **arguments):
            if reply.kind == "result":
                return reply.body
        raise EngineLost(f"{method}: no result")

    async def _call(self, method: str, **arguments: Any) -> AsyncIterator[Reply]:
        writer = await self._open()
        number, replies = next(self._ids), asyncio.Queue[Reply | EngineLost]()
        self._waiting[number] = replies
        try:
            writer.write(protocol.pack(Request(number, method, arguments)))
            await writer.drain()
            while True:
                reply = await replies.get()
                if isinstance(reply, EngineLost):
                    raise EngineLost(f"{method}: {reply}")
                if reply.kind == "refused":
                    raise EngineRefusedError(f"{method}: {reply.body}")
                yield reply
                if reply.kind == "result":
                    return
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EngineLost(f"{method}: engine incarnation {self.incarnation} closed its socket") from error
        finally:
            del self._waiting[number]

    async def _open(self) -> asyncio.StreamWriter:
        if self._lost:
            raise self._lost
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        while self._writer is None:
            await asyncio.sleep(0)
            if self._lost:
                raise self._lost
        return self._writer

    async def _read(self) -> None:
        reason = "its socket was closed"
        try:
            reader, self._writer = await asyncio.open_connection(sock=self._socket)
            while (frame := await protocol.read_frame(reader)) is not None:
                reply = msgspec.msgpack.decode(frame, type=Reply)
                if reply.id in self._waiting:
                    self._waiting[reply.id].put_nowait(reply)
        except OSError as error:
            reason = str(error)
        finally:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self._lost = EngineLost(f"engine incarnation {self.incarnation} is gone: {reason}")
        for replies in self._waiting.values():
            replies.put_nowait(self._lost)
        if self._writer:
            self._writer.close()


def _ints(token_ids: TokenIds) -> list[int]:
    return np.asarray(token_ids).tolist()
