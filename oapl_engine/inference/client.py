"""EngineClient: the engine process as asyncio methods; BlockingControl: the same for callers without a loop."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from oapl_engine.errors import RunError
from oapl_engine.inference import protocol
from oapl_engine.inference.protocol import Reply, Request, Sample, Sampling
from oapl_engine.weights.control import UpdateReply, UpdateRequest

TokenIds = Sequence[int] | NDArray[np.int32]
PauseMode = Literal["drain", "abort", "keep"]


class EngineLostError(ConnectionError):
    """The engine process is gone; whatever it was computing is lost."""


class EngineRefusedError(RunError):
    """The engine is well but does not carry out this call; the message says why."""


class EngineClient:
    """Calls into one engine process, all from one event loop. The socket is opened by the first call.

    Every method raises EngineLostError when the process is gone and EngineRefusedError when it refuses.
    """

    def __init__(self, connection: socket.socket, incarnation: int = 0) -> None:
        self.incarnation = incarnation
        self._socket = connection
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Reply | EngineLostError]] = {}
        self._connecting: asyncio.Task[asyncio.StreamWriter] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._lost: EngineLostError | None = None

    async def generate(self, token_ids: TokenIds, n: int, sampling: Sampling) -> AsyncIterator[Sample]:
        """Yields n samples of a prompt, each when it is finished (pause("abort") finishes them early)."""
        arguments = {"token_ids": _ints(token_ids), "n": n, "sampling": msgspec.to_builtins(sampling)}
        async for reply in self._call("generate", **arguments):
            if reply.kind == "sample":
                yield msgspec.convert(reply.body, Sample)

    async def score(self, token_ids: TokenIds) -> NDArray[np.float32]:
        """Log-probs [len - 1] f32 of token_ids[1:] given the tokens before each, at temperature 1, current weights.

        Works while paused (not in the middle of an update): probe prompts are scored before a version serves.
        """
        return np.frombuffer(await self._result("score", token_ids=_ints(token_ids)), "<f4")

    async def pause(self, mode: PauseMode) -> None:
        """Stop generation and drop all KV. Calls to generate wait for resume meanwhile.

        mode: "drain": after what runs has finished; "abort": running samples end with finish "abort"; "keep": they
        continue after resume, their prefix recomputed
        """
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

    async def update(self, request: UpdateRequest) -> UpdateReply:
        """One request of a weight update (weights.control)."""
        return msgspec.convert(await self._result("update", request=msgspec.to_builtins(request)), UpdateReply)

    async def counters(self) -> dict[str, Any]:
        """incarnation, tokens_generated, samples_running, version, state, pid."""
        return cast(dict[str, Any], await self._result("counters"))

    async def _result(self, method: str, **arguments: Any) -> Any:
        async for reply in self._call(method, **arguments):
            if reply.kind == "result":
                return reply.body
        raise EngineLostError(f"{method}: no result")

    async def _call(self, method: str, **arguments: Any) -> AsyncIterator[Reply]:
        writer = await self._open()
        if writer.is_closing():  # asyncio would print a line for every write to it
            raise EngineLostError(f"{method}: engine incarnation {self.incarnation} closed its socket")
        number, replies = next(self._ids), asyncio.Queue[Reply | EngineLostError]()
        self._waiting[number] = replies
        try:
            writer.write(protocol.pack(Request(number, method, arguments)))
            await writer.drain()
            while True:
                reply = await replies.get()
                if isinstance(reply, EngineLostError):
                    raise EngineLostError(f"{method}: {reply}")
                if reply.kind == "refused":
                    raise EngineRefusedError(f"{method}: {reply.body}")
                yield reply
                if reply.kind == "result":
                    return
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EngineLostError(f"{method}: engine incarnation {self.incarnation} closed its socket") from error
        finally:
            del self._waiting[number]

    async def _open(self) -> asyncio.StreamWriter:
        if self._lost:
            raise self._lost
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)  # a caller that is cancelled leaves the connection to the others

    async def _connect(self) -> asyncio.StreamWriter:
        try:
            reader, writer = await asyncio.open_connection(sock=self._socket)
        except OSError as error:
            self._lose(str(error))
            raise EngineLostError(f"engine incarnation {self.incarnation} cannot be reached: {error}") from error
        self._reading = asyncio.create_task(self._read(reader, writer))
        return writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reason = "its socket was closed"
        try:
            while (frame := await protocol.read_frame(reader)) is not None:
                reply = msgspec.msgpack.decode(frame, type=Reply)
                if reply.id in self._waiting:
                    self._waiting[reply.id].put_nowait(reply)
        except OSError as error:
            reason = str(error)
        finally:
            self._lose(reason)
            writer.close()

    def _lose(self, reason: str) -> None:
        self._lost = EngineLostError(f"engine incarnation {self.incarnation} is gone: {reason}")
        for replies in self._waiting.values():
            replies.put_nowait(self._lost)


class BlockingControl:
    """weights.control.EngineControl over an EngineClient whose loop runs on another thread.

    call:    runs a coroutine in that loop and returns its result (Collector.call)
    client:  () -> the present client; another one after a restart
    """

    def __init__(self, call: Callable[[Coroutine[Any, Any, Any]], Any], client: Callable[[], EngineClient]) -> None:
        self._call = call
        self._client = client

    def pause(self, mode: str) -> None:
        self._call(self._client().pause(cast(PauseMode, mode)))

    def resume(self) -> None:
        self._call(self._client().resume())

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return cast(NDArray[np.float32], self._call(self._client().score(token_ids)))

    def update(self, request: UpdateRequest) -> UpdateReply:
        return cast(UpdateReply, self._call(self._client().update(request)))


def _ints(token_ids: TokenIds) -> list[int]:
    return np.asarray(token_ids).tolist()
