"""A frame arrives as it was sent, or not at all."""

import asyncio

import msgspec
import pytest

from oapl_engine.inference import protocol
from oapl_engine.inference.protocol import Reply, Request, Sample, Sampling, pack, read_frame


def read_all(data):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        frames = []
        while (frame := await read_frame(reader)) is not None:
            frames.append(frame)
        return frames

    return asyncio.run(read())


def test_frames_arrive_whole_and_in_order():
    requests = [Request(i, "generate", {"token_ids": list(range(i)), "raw": bytes(i)}) for i in range(50)]
    frames = read_all(b"".join(map(pack, requests)))
    assert [msgspec.msgpack.decode(f, type=Request) for f in frames] == requests


def test_a_sample_survives_the_way_through_a_reply():
    sample = Sample(3, b"\1\0\0\0", b"\0\0\x80\xbf", "stop", ((7, 0, 1),))
    (frame,) = read_all(pack(Reply(9, "sample", sample)))
    reply = msgspec.msgpack.decode(frame, type=Reply)
    assert msgspec.convert(reply.body, Sample) == sample


def test_sampling_survives_as_plain_values():
    how = Sampling(0.5, 0.9, 7, 11, (1, 2), True)
    assert msgspec.convert(msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.to_builtins(how))), Sampling) == how


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_a_stream_that_ends_within_a_frame_is_an_error(cut):
    with pytest.raises(ConnectionError, match="stream ended"):
        read_all(pack(Request(1, "pause"))[:cut])


def test_a_length_past_the_limit_is_an_error():
    with pytest.raises(ConnectionError, match="out of step"):
        read_all(protocol.LENGTH.pack(protocol.FRAME_LIMIT + 1) + b"x")
