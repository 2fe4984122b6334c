"""EngineClient against a scripted peer: answers find their caller, refusals and deaths are told apart."""

import asyncio
import contextlib
import socket

import msgspec
import numpy as np
import pytest

from oapl_engine.inference.client import EngineClient, EngineLostError, EngineRefusedError
from oapl_engine.inference.protocol import Reply, Request, Sample, Sampling, pack, read_frame


def run(scenario, answer):
    """Run scenario(client) against a peer that calls answer(request, send) for every request."""

    async def both():
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)

        async def peer():
            while (frame := await read_frame(reader)) is not None:
                request = msgspec.msgpack.decode(frame, type=Request)
                answer(request, lambda reply: writer.write(pack(reply)))
                if request.method == "pause":
                    writer.close()

        task = asyncio.create_task(peer())
        await asyncio.wait_for(scenario(EngineClient(ours, 4)), 10)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await task

    asyncio.run(both())


def sample(index):
    return Sample(index, np.array([index], "<i4").tobytes(), np.zeros(1, "<f4").tobytes(), "stop", ((0, 0, 1),))


def test_samples_come_one_by_one_and_calls_do_not_mix():
    held = []

    def answer(request, send):
        if request.method == "counters":
            return send(Reply(request.id, "result", {"version": 7}))
        held.append(request.id)
        if len(held) == 2:
            for i in range(3):
                for number in held:
                    send(Reply(number, "sample", sample(i * 10 + number)))
            for number in held:
                send(Reply(number, "result"))
        return None

    async def scenario(client):
        async def collect():
            return [s.index async for s in client.generate([1], 3, Sampling())]

        first, second, version = await asyncio.gather(collect(), collect(), client.counters())
        assert version == {"version": 7}
        assert {tuple(first), tuple(second)} == {tuple(i * 10 + n for i in range(3)) for n in held}

    run(scenario, answer)


def test_a_refusal_has_its_reason_and_the_client_stays_usable():
    """A refusal carries the reason and leaves the client usable."""

    def answer(request, send):
        kind, body = ("refused", "no such thing") if request.method == "resume" else ("result", {"version": 1})
        send(Reply(request.id, kind, body))

    async def scenario(client):
        with pytest.raises(EngineRefusedError, match="resume: no such thing"):
            await client.resume()
        assert await client.counters() == {"version": 1}

    run(scenario, answer)


def test_calls_in_flight_and_later_ones_end_with_engine_lost():
    """Every call in flight and every later one ends with engine lost."""

    async def scenario(client):
        async def generate():
            return [s async for s in client.generate([1], 2, Sampling())]

        results = await asyncio.gather(generate(), generate(), client.pause("abort"), return_exceptions=True)
        assert [type(r) for r in results] == [EngineLostError] * 3
        with pytest.raises(EngineLostError, match="incarnation 4"):
            await client.counters()

    run(scenario, lambda request, send: None)
